"""Dynamic quantization of activations: each token by its own range, in 8 bits, symmetric (as compressed-tensors' dynamic tokens).

int8   s = max |x| / 127.5      q = clamp(round(x / s), -128, 127)
fp8    s = max |x| / 448        q = x / s in e4m3
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cluster.schemes import Kind
from workers.quantization.weight import FP8, FP8_LARGEST

Exchange = Callable[[Tensor], Tensor]
"""[n] fp32, the largest magnitude of each token among this rank's features -> among those of all ranks that share the token."""


class Ranges:
    """An exchange that remembers what came out of it last."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._largest = torch.zeros(0)

    def __call__(self, largest: Tensor) -> Tensor:
        """See Exchange."""
        self._largest = self._exchange(largest)
        return self._largest

    def scale(self, kind: Kind) -> Tensor:
        """[n, 1] fp32: of the tokens that were quantized last."""
        return scale_of(self._largest, kind)


def scale_of(largest: Tensor, kind: Kind) -> Tensor:
    """[n] -> [n, 1] fp32; 1 where all is zero."""
    scale = largest / (FP8_LARGEST if kind == "float" else 127.5)
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)[:, None]


def quantize_tokens(x: Tensor, kind: Kind, exchange: Exchange | None = None) -> tuple[Tensor, Tensor]:
    """x [n, features] -> q of the same shape, int8 or fp8, and s [n, 1] fp32."""
    wide = x.float()
    largest = wide.abs().amax(-1)
    scale = scale_of(largest if exchange is None else exchange(largest), kind)
    if kind == "float":
        return (wide / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scale
    return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale


def scaled(sums: Tensor, by_output: Tensor | None, by_token: Tensor) -> Tensor:
    """Sums of products [n, out_features], multiplied by the weights' scales [1, out_features], where those are not in them, and the
    tokens' [n, 1]: in this order everywhere, for equal bits."""
    return (sums if by_output is None else sums * by_output) * by_token


def requantized(x: Tensor, kind: Kind) -> Tensor:
    """What quantizing leaves of x [n, features], in its dtype."""
    q, scale = quantize_tokens(x, kind)
    return (q.float() * scale).to(x.dtype)
