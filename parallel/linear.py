"""Linear layers over the flat [num_tokens, features] batch, whole or divided among tensor-parallel ranks.

Divided as in Megatron-LM (Shoeybi et al. 2019): of two linears in a row the first is cut by output features (a Linear of fewer
rows, nothing is exchanged), the second by input features (RowParallel: one sum over the ranks).

Where a CPU has no kernels of our own (workers/native), the weight is packed once into oneDNN's blocked layout and the plain copy is
dropped. Packed fp32 with a hint of 16 rows or more gives a row the same bits whatever the number of rows beside it (checked for
1..512 rows); plain fp32 `F.linear` does not.
Milliseconds of 1024 -> 6144 in fp32, packed against plain, on a 2-core Zen 3 with AVX2: 0.8 / 1.5 at 1 row, 7.3 / 12.2 at 64 rows.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.groups import Group

_PACK_ROWS = 64
"""The number of rows that the packed layout is chosen for. With 1, oneDNN takes a layout that is slower from 16 rows on and whose
single row has other bits."""


class Multiply(Protocol):
    """A linear layer, with its weight in whatever form."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features], contiguous."""


@runtime_checkable
class Deferred(Multiply, Protocol):
    """A rank's part of a linear whose outputs are not the ranks' sums but come from them."""

    def finish(self, sums: Tensor) -> Tensor:
        """[n, out_features], of what __call__ gave last, added up over the ranks -> the same of outputs, without bias."""


class Linear:
    """y = x Wᵀ + b with the weight in the form that torch multiplies best on its device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [out_features, in_features] in the dtype to compute in, bias [out_features] or None.

        Where the weight is packed, no reference to `weight` is kept: the caller drops its own to have one copy in memory.
        """
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.packed = can_pack(weight.dtype, weight.device)
        self._pad_single = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS) if self.packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features], contiguous."""
        if self._pad_single and len(x) == 1:
            # A single bf16 row runs through another kernel whose bits differ; two rows share the one of the larger batches.
            return self._multiply(x.expand(2, -1).contiguous())[:1]
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)


class RowParallel:
    """A linear whose input features are divided among the ranks of a group: y = sum over ranks of x_rank W_rankᵀ, + b."""

    def __init__(self, own: Multiply, bias: Tensor | None, group: Group) -> None:
        """own: of this rank's in_features, with the bias where the group is this rank alone. bias [out_features], the same on each
        rank, where it is not."""
        self.group = group
        self._bias = bias
        self._finish = own.finish if isinstance(own, Deferred) else None
        self.own = own
        """This rank's part."""

    def __call__(self, x: Tensor) -> Tensor:
        """[n, this rank's in_features] -> [n, out_features], the same on each rank."""
        return self.total(self.own(x))

    def total(self, part: Tensor) -> Tensor:
        """y [n, out_features] of what `own` gives on each rank, which may be overwritten."""
        y = self.group.all_reduce(part)
        if self._finish is not None:
            y = self._finish(y)
        return y if self._bias is None else y + self._bias


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies packed weights of this dtype here."""
    if device.type != "cpu" or not _has_onednn():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_computes_bfloat16())


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU has the instructions (AVX512 at least) that oneDNN wants for bf16."""
    return _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
