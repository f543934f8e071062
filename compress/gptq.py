"""GPTQ (Frantar et al. 2022): weights are rounded one input after the other, and what a rounding loses is made good in the inputs
that are still to come, as far as they go along with it in the calibration text.

    H = X^T X + damping mean(diag) I      H^-1 = U^T U, U upper triangular
    e = (w_j - rounded w_j) / U_jj        w_k -= e U_jk for all k > j

with X the linear's inputs. A group's scale and zero-point are chosen when its first input is reached, from the weights as they are
by then. Inputs are taken in order, so that groups stay runs of inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cluster.schemes import Scheme
from workers.quantization.weight import FP8, QuantizedWeight, Ranging, parameters, rounded

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""
_BLOCK = 128
"""Inputs after which the weights beyond are brought up to date, in one multiplication (section 3, step 2)."""
_ATTEMPTS = 6
_FEW = 1 << 20
"""Elements that one thread goes over sooner than two."""
_FP64 = 4096
"""Inputs up to which there is memory for fp64."""


class Hessian:
    """X^T X of a linear's inputs: half of the second derivatives of its squared output error."""

    def __init__(self, inputs: int) -> None:
        self.total = torch.zeros(inputs, inputs)
        """[inputs, inputs] fp32"""

    def add(self, rows: Tensor) -> None:
        """rows [n, inputs] fp32"""
        self.total.addmm_(rows.t(), rows)


def round_to_nearest(weight: Tensor, scheme: Scheme, ranging: Ranging, scale_dtype: torch.dtype) -> QuantizedWeight:
    """workers.quantization's quantize(), with scales that scale_dtype holds. weight [outputs, inputs]. Raises ValueError where
    groups do not divide the inputs."""
    scale, zero = parameters(weight, scheme, ranging)
    scale = _held(scale, scale_dtype)
    return QuantizedWeight(scheme, rounded(weight, scheme, scale, zero), scale, zero)


def gptq(
    weight: Tensor, hessian: Hessian, scheme: Scheme, ranging: Ranging, scale_dtype: torch.dtype, damping: float = DAMPING
) -> QuantizedWeight:
    """The same, rounded by GPTQ."""
    outputs, inputs = weight.shape
    size = scheme.group_size or inputs
    if inputs % size:
        raise ValueError(f"{inputs} inputs do not divide into groups of {size}")
    upper = inverse_factor(hessian.total, damping)
    left = weight.float().t().contiguous()  # [inputs, outputs], brought up to date row by row
    values = torch.empty(inputs, outputs, dtype=FP8 if scheme.kind == "float" else torch.int8)
    grouped = scheme.granularity == "group"
    found = [] if grouped else [parameters(weight, scheme, ranging)]
    # Whole groups, so that a group's weights are up to date when its range is taken.
    block = size * max(1, _BLOCK // size) if grouped else _BLOCK
    for begin in range(0, inputs, block):
        end = min(begin + block, inputs)
        errors = torch.empty(end - begin, outputs)
        with _threads_for(errors.numel()):
            for j in range(begin, end):
                if grouped and j % size == 0:
                    found.append(parameters(left[j : j + size].t(), scheme, ranging))
                scale, zero = _held(found[-1][0], scale_dtype), found[-1][1]
                column = QuantizedWeight(scheme, rounded(left[j, :, None], scheme, scale, zero), scale, zero)
                values[j] = column.values[:, 0]
                errors[j - begin] = (left[j] - column.dequantized()[:, 0]) / upper[j, j]
                left[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j - begin], alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1)
    scale = _held(torch.cat([own for own, _ in found], dim=1), scale_dtype)
    zeros = [own for _, own in found if own is not None]
    return QuantizedWeight(scheme, values.t().contiguous(), scale, torch.cat(zeros, dim=1) if zeros else None)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U [inputs, inputs] fp32, upper triangular, of the hessian [inputs, inputs] fp32 + damping; an input that never was anything
    but 0 goes along with no other. Damped more where the hessian is singular still. Raises ValueError where it is not finite.

    By the Cholesky factor from the other end: H = R R^T with R upper triangular, and U = R^-1. With P the reversal of all inputs,
    P H P = L L^T and U = P L^-1 P.
    """
    dtype = torch.float64 if len(hessian) <= _FP64 else torch.float32
    mean = float(hessian.diagonal().mean())
    for attempt in range(_ATTEMPTS):
        reversed_ = hessian.to(dtype).flip(0, 1)
        diagonal = reversed_.diagonal()
        diagonal[diagonal == 0] = mean or 1.0
        diagonal += damping * mean * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        del reversed_, diagonal
        if not failed:
            unit = torch.eye(len(hessian), dtype=dtype)
            inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
            return inverse.float().flip(0, 1)
    raise ValueError("the inputs of a linear in the calibration text are not finite")


@contextmanager
def _threads_for(elements: int) -> Iterator[None]:
    """One thread where operators go over few elements: on two cores that others use as well, 512 x 512 weights took 3.5 s with two
    threads and 0.6 s with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if elements < _FEW else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _held(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 that dtype holds; none becomes 0."""
    held = scale.to(dtype).float()
    return held.masked_fill(held == 0, torch.finfo(dtype).tiny)
