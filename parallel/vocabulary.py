"""Embedding and lm_head, their rows (the vocabulary) whole or divided among tensor-parallel ranks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.groups import SOLO_GROUP, Group
from parallel.linear import Linear, Multiply


class Embedding:
    """Token ids to hidden states. The weight stays in the checkpoint's dtype: rows are converted as they are looked up."""

    def __init__(self, weight: Tensor, first: int, dtype: torch.dtype, group: Group = SOLO_GROUP) -> None:
        """weight [rows, hidden]: the vocabulary's rows from `first` on. dtype: that of the hidden states."""
        self._weight, self._first, self._dtype, self._group = weight, first, dtype, group

    def __call__(self, ids: Tensor) -> Tensor:
        """[n] int64 -> [n, hidden]"""
        if self._group.size == 1:
            return self._weight[ids].to(self._dtype)
        local = ids - self._first
        here = (local >= 0) & (local < len(self._weight))
        rows = self._weight[local.where(here, 0)].to(self._dtype)
        return self._group.all_reduce(rows.masked_fill_(~here[:, None], 0.0))


class LogitsHead:
    """The last linear. Its output is fp32 in every dtype: two logits that differ must not meet by rounding to bf16."""

    def __init__(self, own: Multiply, vocab: Sequence[range], group: Group = SOLO_GROUP) -> None:
        """own: [n, hidden] -> [n, this rank's rows] fp32; vocab: the rows of each rank."""
        self._own = own
        self._sizes = [len(rows) for rows in vocab]
        self._group = group

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab] fp32, the same on each rank"""
        logits = self._own(hidden)
        if self._group.size == 1:
            return logits
        gathered = self._group.all_gather(F.pad(logits, (0, max(self._sizes) - logits.shape[1])))
        return torch.cat([part[:, :size] for part, size in zip(gathered, self._sizes, strict=True)], dim=1)


class WideLinear:
    """y = x Wᵀ in fp32 whatever W is in: on a CPU the weight is kept in fp32; on CUDA in its dtype, with fp32 accumulation."""

    def __init__(self, weight: Tensor) -> None:
        """weight [out_features, in_features]"""
        self.out_features, self.in_features = weight.shape
        on_cpu = weight.device.type == "cpu"
        self._linear = Linear(weight.float()) if on_cpu else None
        self._weight = None if on_cpu else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features] fp32"""
        if self._linear is not None:
            return self._linear(x.float())
        assert self._weight is not None
        if x.dtype == torch.float32:
            return F.linear(x, self._weight)
        return torch.mm(x, self._weight.t(), out_dtype=torch.float32)
