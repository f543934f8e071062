"""Quantized linears by torch's operators: for devices without kernels of our own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.linear import Linear
from workers.quantization.activations import Exchange, requantized
from workers.quantization.weight import QuantizedWeight


class TorchQuantizedLinear:
    """y = x Wᵀ + b. On CUDA the weight stays in few bits and is expanded for each product; on a CPU it is kept in fp32."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, exchange: Exchange | None = None) -> None:
        """bias [out_features] or None. exchange: with ranks that have other features of the same tokens, where activations are
        quantized too."""
        self.out_features, self.in_features = weight.shape
        self.scheme = weight.scheme
        self._bias, self._exchange = bias, exchange
        on_cpu = weight.values.device.type == "cpu"
        self._expanded = Linear(weight.dequantized(), None if bias is None else bias.float()) if on_cpu else None
        self._weight = None if on_cpu else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features] in x's dtype."""
        return self.wide(x).to(x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """The same in fp32."""
        if self._weight is None:
            assert self._expanded is not None
            return self._expanded(self._taken(x.float()))
        x, weight = self._taken(x), self._weight.dequantized(x.dtype)
        if x.dtype == torch.float32:
            return F.linear(x, weight, self._bias)
        y = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return y if self._bias is None else y + self._bias.float()

    def _taken(self, x: Tensor) -> Tensor:
        return requantized(x, self.scheme.kind, self._exchange) if self.scheme.dynamic else x


class TorchQuantizedHead:
    """The same for an lm_head, whose output is fp32."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.out_features, self.in_features = weight.shape
        self._linear = TorchQuantizedLinear(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features] fp32."""
        return self._linear.wide(x)
