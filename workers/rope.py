"""Rotary position embeddings (Su et al. 2021, RoFormer) and the scalings that stretch them over longer contexts: linear (Chen et
al. 2023), Llama 3.1's (Dubey et al. 2024) and YaRN (Peng et al. 2023).

A pair (x1, x2) at distance head_dim / 2 is turned by position x frequency:
    x1' = x1 cos - x2 sin,    x2' = x2 cos + x1 sin
"""

import math

import torch
from torch import Tensor

from cluster.shape import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


class Rope:
    """The angles of all positions up to the longest sequence, in fp32."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None, max_len: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies(head_dim, theta, scaling))
        length = amplitude(scaling)
        cos, sin = angles.cos() * length, angles.sin() * length
        # The second half of a head takes +sin of the first, the first takes -sin of the second: signs are stored, not applied.
        self._cos = torch.cat((cos, cos), -1).to(device)
        self._sin = torch.cat((-sin, sin), -1).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin of positions [n] int64, [n, 1, head_dim] fp32 each: looked up once per iteration, used by all
        layers."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def halves(self) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions, [positions, head_dim / 2] fp32 each: what the two halves of a head have in common."""
        half = self._cos.shape[1] // 2
        return self._cos[:, :half].contiguous(), self._sin[:, half:].contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, head_dim] turned by `Rope.at`'s angles; computed in fp32, returned in x's dtype."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[head_dim / 2] fp32: theta ** (-2i / head_dim), scaled where asked."""
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    match scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling():
            return _llama3(plain, scaling)
        case YarnScaling():
            return _yarn(plain, scaling, head_dim, theta)


def amplitude(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by: YaRN's attention factor (section 3.4: 0.1 ln(factor) + 1, both on queries and on keys,
    which is its temperature of the softmax), else 1."""
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Frequencies whose wavelength exceeds the original context / low_freq_factor are divided by `factor`, those shorter than the
    original context / high_freq_factor stay, and in between they blend linearly (in original context / wavelength)."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / scaling.factor + blend * plain


def _yarn(plain: Tensor, scaling: YarnScaling, head_dim: int, theta: float) -> Tensor:
    """Section 3.2, "NTK-by-parts": dimensions that turn more than beta_fast times over the original context stay, those that turn
    less than beta_slow times are divided by `factor`, and in between they blend linearly in the dimension's number."""

    def dimension(turns: float) -> float:
        """The (fractional) pair that turns so often over the original context."""
        return head_dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # a range of nothing is a step
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / scaling.factor * ramp + plain * (1 - ramp)
