"""Drawing tokens from logits by filters and noise: what a Sampler leaves to the kernels."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.filters import thresholds
from workers.keys import position_keys
from workers.noise import GumbelNoise
from workers.selection import argmax, rows_of, where
from workers.sequences import Span

_MANY = 0.05
"""Share of the vocabulary above which hashing all of it is cheaper than picking out the tokens that are left."""


class Picker(Protocol):
    """Draws from the softmax of logits over temperature, of what top_k, top_p and min_p leave of it."""

    def pick(self, logits: Tensor, rows: Sequence[int], spans: Sequence[Span]) -> list[int]:
        """A token for each of `spans`, from the rows of logits [n, vocab] fp32 that belong to them, which may be overwritten.

        It depends on its row, on the span's parameters and on its end alone. Where no logit is a number it is the last one.
        """


class TorchPicker:
    """By torch's operators, on any device."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._noise = GumbelNoise(vocab_size, device)

    def pick(self, logits: Tensor, rows: Sequence[int], spans: Sequence[Span]) -> list[int]:
        """See Picker."""
        filtered = [i for i, span in enumerate(spans) if span.state.draws.filtered]
        if len(filtered) in (0, len(spans)):
            return (self._filtered if filtered else self._plain)(rows_of(logits, rows), spans).tolist()
        kinds = (filtered, [i for i, span in enumerate(spans) if not span.state.draws.filtered])
        drawn: dict[int, int] = {}
        for kind in kinds:
            drawn |= zip(kind, self.pick(logits, [rows[i] for i in kind], [spans[i] for i in kind]), strict=True)
        return [drawn[i] for i in range(len(spans))]

    def _plain(self, logits: Tensor, spans: Sequence[Span]) -> Tensor:
        """Any token can come."""
        return noisiest(self._noise, scaled(logits, spans), torch.from_numpy(noise_keys(spans)).to(logits.device))

    def _filtered(self, logits: Tensor, spans: Sequence[Span]) -> Tensor:
        """Noise only for the tokens that the filters leave; where they leave many, for those of them that can win."""
        scores, keys = scaled(logits, spans), torch.from_numpy(noise_keys(spans)).to(logits.device)
        left = scores >= thresholds(scores, [span.state.params for span in spans])
        if scores.device.type != "cpu" or int(left.sum()) > left.numel() * _MANY:
            return noisiest(self._noise, scores.masked_fill_(~left, -torch.inf), keys)
        return _winners(self._noise, scores, keys, left)


def noisiest(noise: GumbelNoise, scores: Tensor, keys: Tensor) -> Tensor:
    """[rows] int64: the arg-max of scores [rows, vocab] fp32, which may be overwritten, plus the noise of keys [rows, 2] int32: a
    draw from their softmax. The last token where no score is a number."""
    if scores.device.type != "cpu":
        return argmax(scores.add_(noise.whole(keys)))
    return _winners(noise, scores, keys, noise.contenders(scores, keys))


def _winners(noise: GumbelNoise, scores: Tensor, keys: Tensor, left: Tensor) -> Tensor:
    """[rows]: the arg-max of scores plus noise where `left` [rows, vocab]."""
    rows, ids = where(left)
    noisy = scores[rows, ids] + noise.at(keys[rows], ids)
    best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce_(0, rows, noisy, "amax")
    won = (noisy == best[rows]) & (noisy > -torch.inf)
    tokens = torch.full_like(best, scores.shape[1] - 1, dtype=torch.int64)  # stays where no logit is a number
    return tokens.scatter_reduce_(0, rows[won], ids[won], "amin")


def scaled(logits: Tensor, spans: Sequence[Span]) -> Tensor:
    """Logits over temperature, shifted so that the largest is 0; a new tensor or `logits` overwritten."""
    temperature = torch.tensor([[span.state.params.temperature] for span in spans], dtype=torch.float32, device=logits.device)
    return logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)


def noise_keys(spans: Sequence[Span]) -> NDArray[np.int32]:
    """[len(spans), 2]: those of the positions after the spans."""
    return position_keys([span.state.draws.noise_key for span in spans], [span.end for span in spans])
