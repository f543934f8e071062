"""Rotary position embeddings (Su et al. 2021, RoFormer) with Llama 3.1's frequency scaling (Dubey et al. 2024).

A pair (x1, x2) at distance head_dim / 2 is turned by position x frequency:
    x1' = x1 cos - x2 sin,    x2' = x2 cos + x1 sin
"""

import math

import torch
from torch import Tensor

from cluster.model import RopeScaling


class Rope:
    """The angles of all positions up to the longest sequence, in fp32."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None, max_len: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies(head_dim, theta, scaling))
        cos, sin = angles.cos(), angles.sin()
        # The second half of a head takes +sin of the first, the first takes -sin of the second: signs are stored, not applied.
        self._cos = torch.cat((cos, cos), -1).to(device)
        self._sin = torch.cat((-sin, sin), -1).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin of positions [n] int64, [n, 1, head_dim] fp32 each: looked up once per iteration, used by all
        layers."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, head_dim] turned by `Rope.at`'s angles; computed in fp32, returned in x's dtype."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[head_dim / 2] fp32: theta ** (-2i / head_dim), scaled where asked.

    Llama 3.1's scaling divides frequencies whose wavelength exceeds the original context / low_freq_factor by `factor`, leaves
    those shorter than the original context / high_freq_factor, and blends linearly (in original context / wavelength) in
    between.
    """
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / scaling.factor + blend * plain
