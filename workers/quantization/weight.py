"""Linear quantization of a weight, symmetric and asymmetric (Jacob et al. 2018; Krishnamoorthi 2018; Nagel et al. 2021).

    asymmetric   s = (max - min) / (2^b - 1)        z = round(lowest - min / s)       min <= 0 <= max
    symmetric    s = max |w| / ((2^b - 1) / 2)      z = 0
    both         q = clamp(round(w / s) + z, lowest, highest)          w ~ (q - z) s

with lowest = -2^(b-1) and highest = 2^(b-1) - 1, per tensor, per output channel or per group of inputs. These are the formulas of
compressed-tensors, so that what is written in that format means the same elsewhere. fp8 is e4m3 with s = max |w| / 448.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cluster.schemes import Scheme

Ranging = Literal["minmax", "percentile", "mse"]
"""How the range is found: all of it; all but the outermost of many; the one with the least squared error."""

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
_PERCENTILE = 0.999
_SHRUNK = 40
"""Ranges that are tried, down to half of all."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear's weight in few bits. Rows and runs of whole groups can be cut out: they are what quantizing the cut would give."""

    scheme: Scheme
    values: Tensor
    """[out_features, in_features] int8 (of 4 bits too), or float8_e4m3fn."""
    scale: Tensor
    """[out_features, groups] fp32, with one group unless the scheme has them; per tensor all are the same."""
    zero_point: Tensor | None = None
    """[out_features, groups] int8 where the scheme is asymmetric."""

    @property
    def shape(self) -> torch.Size:
        """[out_features, in_features]"""
        return self.values.shape

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out_features, in_features]"""
        grouped = _in_groups(self.values.float(), self.group_size)
        if self.zero_point is not None:
            grouped = grouped - self.zero_point[:, :, None]
        return (grouped * self.scale[:, :, None]).flatten(1).to(dtype)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same there."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return QuantizedWeight(self.scheme, self.values.to(device), self.scale.to(device), zero)

    def rows(self, own: range) -> "QuantizedWeight":
        """Some outputs."""
        return self._cut(slice(own.start, own.stop), slice(None), slice(None))

    def columns(self, own: range) -> "QuantizedWeight":
        """Some inputs. Groups that are cut through become smaller ones of the same scale."""
        if len(own) == self.shape[1]:
            return self
        if self.scale.shape[1] == 1:
            return self._cut(slice(None), slice(own.start, own.stop), slice(None))
        return self.inside_groups(own)

    def inside_groups(self, own: range) -> "QuantizedWeight":
        """The same where this is itself a cut, of which one group may be left."""
        size = math.gcd(self.group_size, own.start, own.stop)
        finer = self._finer(self.group_size // size)
        return finer._cut(slice(None), slice(own.start, own.stop), slice(own.start // size, own.stop // size))

    def _finer(self, times: int) -> "QuantizedWeight":
        if times == 1:
            return self
        zero = None if self.zero_point is None else self.zero_point.repeat_interleave(times, dim=1)
        return QuantizedWeight(self.scheme, self.values, self.scale.repeat_interleave(times, dim=1), zero)

    def _cut(self, rows: slice, columns: slice, groups: slice) -> "QuantizedWeight":
        zero = None if self.zero_point is None else self.zero_point[rows, groups]
        return QuantizedWeight(self.scheme, self.values[rows, columns], self.scale[rows, groups], zero)


def side_by_side(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight with the outputs of all, which are of one scheme and of as many groups."""
    first = parts[0]
    zero = None if first.zero_point is None else torch.cat([p.zero_point for p in parts if p.zero_point is not None])
    return QuantizedWeight(first.scheme, torch.cat([p.values for p in parts]), torch.cat([p.scale for p in parts]), zero)


def quantize(weight: Tensor, scheme: Scheme, ranging: Ranging = "minmax") -> QuantizedWeight:
    """Round to nearest. weight [out_features, in_features], of any floating-point dtype. Raises ValueError where groups do not
    divide the inputs."""
    scale, zero = parameters(weight, scheme, ranging)
    return QuantizedWeight(scheme, rounded(weight, scheme, scale, zero), scale, zero)


def parameters(weight: Tensor, scheme: Scheme, ranging: Ranging = "minmax") -> tuple[Tensor, Tensor | None]:
    """Scale [out_features, groups] fp32 and zero-point, the same in int8, of a weight [out_features, in_features]."""
    grouped = _grouped(weight.float(), scheme)  # [rows, groups, size]
    lowest, highest = _range(grouped, "minmax" if ranging == "mse" else ranging)
    if ranging == "mse":
        lowest, highest = _least_error(grouped, scheme, lowest, highest)
    scale, zero = _of_range(lowest, highest, scheme)
    rows = len(weight)
    return scale.expand(rows, -1).contiguous(), None if zero is None else zero.expand(rows, -1).contiguous()


def rounded(weight: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None) -> Tensor:
    """[out_features, in_features] int8 or fp8: the nearest values. scale, zero [out_features, groups]."""
    size = weight.shape[1] // scale.shape[1]
    grouped = _in_groups(weight.float(), size) / scale[:, :, None]
    return _nearest(grouped, scheme, None if zero is None else zero[:, :, None]).flatten(1)


def _nearest(scaled: Tensor, scheme: Scheme, zero: Tensor | None) -> Tensor:
    if scheme.kind == "float":
        return scaled.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
    placed = scaled.round() if zero is None else scaled.round() + zero
    return placed.clamp(scheme.lowest, scheme.highest).to(torch.int8)


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[rows, groups, size]: what shares a scale; per tensor of one row."""
    if scheme.granularity == "tensor":
        return weight.reshape(1, 1, -1)
    size = scheme.group_size or weight.shape[1]
    if weight.shape[1] % size:
        raise ValueError(f"{weight.shape[1]} inputs do not divide into groups of {size}")
    return _in_groups(weight, size)


def _in_groups(rows: Tensor, size: int) -> Tensor:
    """[n, inputs] -> [n, groups, size]"""
    return rows.reshape(len(rows), -1, size)


def _range(grouped: Tensor, ranging: Ranging) -> tuple[Tensor, Tensor]:
    """[rows, groups] each: the least and the greatest, zero among them."""
    if ranging == "minmax" or grouped.shape[2] < 3:
        return grouped.amin(2).clamp(max=0.0), grouped.amax(2).clamp(min=0.0)
    ordered = grouped.sort(2).values
    cut = int((1 - _PERCENTILE) / 2 * grouped.shape[2] + 0.5)
    return ordered[:, :, cut].clamp(max=0.0), ordered[:, :, -1 - cut].clamp(min=0.0)


def _of_range(lowest: Tensor, highest: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    largest = torch.maximum(-lowest, highest)
    if scheme.kind == "float":
        return _positive(largest / FP8_LARGEST), None
    steps = float(scheme.highest - scheme.lowest)
    if scheme.symmetric:
        return _positive(largest * 2 / steps), None
    scale = _positive((highest - lowest) / steps)
    zero = (scheme.lowest - lowest / scale).round().clamp(scheme.lowest, scheme.highest)
    return scale, zero.to(torch.int8)


def _positive(scale: Tensor) -> Tensor:
    """Where all is 0, any scale will do."""
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)


def _least_error(grouped: Tensor, scheme: Scheme, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """The range, of some between all and half of it, with the least sum of squares of what is lost."""
    best = torch.full_like(lowest, torch.inf)
    found = lowest.clone(), highest.clone()
    for step in range(_SHRUNK):
        share = 1 - 0.5 * step / _SHRUNK
        scale, zero = _of_range(lowest * share, highest * share, scheme)
        wide = None if zero is None else zero[:, :, None]
        values = _nearest(grouped / scale[:, :, None], scheme, wide).float()
        again = (values if wide is None else values - wide) * scale[:, :, None]
        lost = (again - grouped).square().sum(2)
        better = lost < best
        best = torch.where(better, lost, best)
        found = torch.where(better, lowest * share, found[0]), torch.where(better, highest * share, found[1])
    return found
