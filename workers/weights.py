"""The weights of linears as they are read: plain, quantized in the checkpoint, or quantized while they are read.

A rank reads its own part. Quantized parts are what cutting the quantized whole would give, so that a model has the same weights
whatever it is divided into: where a scale speaks for more than the part, the whole of what it speaks for is read.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.config import ConfigError
from cluster.quantization_config import StoredQuantization
from cluster.schemes import CASTS, Recipe, Scheme
from workers.checkpoint import Checkpoint
from workers.quantization.stored import read_linear
from workers.quantization.weight import QuantizedWeight, quantize, side_by_side

Weight = Tensor | QuantizedWeight
"""[out_features, in_features]"""

_FINEST = 8
"""Inputs of the smallest group that is kept quantized."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearWeights:
    """Reads them from a checkpoint."""

    checkpoint: Checkpoint
    stored: StoredQuantization | None
    """What is quantized in the checkpoint."""
    recipe: Recipe
    """What is quantized while it is read."""
    dtype: torch.dtype
    """Of what is not quantized."""
    device: torch.device

    def read(self, name: str, outputs: int, inputs: int, *, rows: range | None = None, columns: range | None = None) -> Weight:
        """The linear `name` ("model.layers.0.mlp.up_proj"), or this rank's rows or columns of it. Plain ones may still be in the
        file, in the checkpoint's dtype. Raises ConfigError."""
        precision = self.recipe.of(name)
        if self.stored is not None and self.stored.of(name) is not None:
            if precision is not None:
                raise ConfigError(f"{self.checkpoint.path}: {name} is quantized already, and cannot be {precision} too")
            return read_linear(self.checkpoint, self.stored, name, outputs, inputs, rows, columns)
        if isinstance(precision, Scheme):
            return self._quantized(name, precision, outputs, inputs, rows, columns)
        weight = self.checkpoint.take(f"{name}.weight", outputs, inputs, rows=rows, columns=columns)
        return weight if precision is None else weight.to(getattr(torch, CASTS[precision]))

    def tied(self, name: str, rows: Tensor) -> Weight:
        """A linear whose weight is the embedding's rows [this rank's vocabulary, hidden]."""
        precision = self.recipe.of(name)
        if not isinstance(precision, Scheme):
            return rows
        if precision.granularity == "tensor":
            raise ConfigError(
                f"{name} is the embedding, of which ranks have parts: it can't be {precision}, only with finer scales"
            )
        return self.together([_quantize(rows, precision, name)], name)

    def bias(self, name: str, size: int, rows: range | None = None) -> Tensor:
        """[this rank's outputs] of the linear `name`."""
        return self.checkpoint.take(f"{name}.bias", size, rows=rows).to(self.device, self.dtype, copy=True)

    def together(self, parts: Sequence[Weight], names: str) -> Weight:
        """The outputs of all parts as one weight on the device: quantized if all are, alike. `names` is for the log."""
        quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
        if len(quantized) == len(parts) and all(part.scheme == quantized[0].scheme for part in quantized):
            whole = side_by_side(quantized)
            if whole.scale.shape[1] == 1 or whole.group_size % _FINEST == 0:
                return whole.to(self.device)
            log.warning("%s is not kept quantized: its groups are cut into %s inputs", names, whole.group_size)
        elif quantized:
            log.warning("%s is not kept quantized: its parts differ in precision", names)
        sizes = [part.shape[0] for part in parts]
        weight = torch.empty(sum(sizes), parts[0].shape[1], dtype=self.dtype, device=self.device)
        for piece, part in zip(torch.split(weight, sizes), parts, strict=True):
            piece.copy_(part.dequantized(self.dtype) if isinstance(part, QuantizedWeight) else part)
        return weight

    def _quantized(
        self, name: str, scheme: Scheme, outputs: int, inputs: int, rows: range | None, columns: range | None
    ) -> QuantizedWeight:
        own = None if scheme.granularity == "tensor" else rows  # what shares no scale with them need not be read
        weight = self.checkpoint.take(f"{name}.weight", outputs, inputs, rows=own)
        kept = _quantize(weight, scheme, name)
        if rows is not None and own is None:
            kept = kept.rows(rows)
        return kept if columns is None else kept.columns(columns)


def _quantize(weight: Tensor, scheme: Scheme, name: str) -> QuantizedWeight:
    try:
        return quantize(weight, scheme)
    except ValueError as error:
        raise ConfigError(f"{name} cannot be quantized as {scheme}: {error}") from None
