"""Quantized linears by torch's operators: for devices without kernels of our own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.linear import Linear
from workers.quantization.activations import Exchange, Ranges, quantize_tokens, scaled
from workers.quantization.weight import QuantizedWeight


class TorchQuantizedLinear:
    """y = x Wᵀ + b. On CUDA the weight stays in few bits and is expanded for each product; on a CPU it is kept in fp32.

    Dynamic activations are multiplied as integers, in fp32: sums below 2^24 are exact, and so the same in any order.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """bias [out_features] or None."""
        self.out_features, self.in_features = weight.shape
        self.scheme = weight.scheme
        self._bias = bias
        self._after = weight.scale.t().contiguous() if self.scheme.dynamic and weight.scale.shape[1] == 1 else None
        """[1, out_features]: what the sums are still to be multiplied by."""
        on_cpu = weight.values.device.type == "cpu"
        self._expanded = Linear(self._factors(weight, torch.float32)) if on_cpu else None
        self._weight = None if on_cpu else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features] in x's dtype."""
        return self.wide(x).to(x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The same in fp32."""
        if not self.scheme.dynamic:
            y = self._sums(x)
        else:
            q, scale = quantize_tokens(x, self.scheme.kind)
            y = self._scaled(self._sums(q.to(x.dtype)), scale)
        return y if self._bias is None else y + self._bias.float()

    def _sums(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features] fp32, without what is multiplied after."""
        if self._weight is None:
            assert self._expanded is not None
            return self._expanded(x.float())
        weight = self._factors(self._weight, x.dtype)
        return F.linear(x, weight) if x.dtype == torch.float32 else torch.mm(x, weight.t(), out_dtype=torch.float32)

    def _scaled(self, sums: Tensor, scale: Tensor) -> Tensor:
        return scaled(sums, self._after, scale)

    def _factors(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        return weight.dequantized(dtype) if self._after is None else weight.values.to(dtype)


class TorchQuantizedPart(TorchQuantizedLinear):
    """Of dynamic activations, the part of a rank that has some features of each token: sums, which become outputs when those of all
    ranks are added up. Sums of int8 are whole numbers, so that the outputs are the same to the bit for any number of ranks."""

    def __init__(self, weight: QuantizedWeight, exchange: Exchange) -> None:
        super().__init__(weight)
        self._ranges = Ranges(exchange)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, this rank's in_features] -> sums [n, out_features] fp32."""
        q, _ = quantize_tokens(x, self.scheme.kind, self._ranges)
        return self._sums(q.to(x.dtype))

    def finish(self, sums: Tensor) -> Tensor:
        """See parallel.linear.Deferred."""
        return self._scaled(sums, self._ranges.scale(self.scheme.kind))


class TorchQuantizedHead(TorchQuantizedLinear):
    """The same for an lm_head, whose output is fp32."""

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features] fp32."""
        return self.wide(x)
