"""From logits to tokens, with the semantics that SamplingParams states; the same token for the same logits in whatever batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.protocol import TokenLogprobs
from workers.filters import thresholds
from workers.keys import position_keys
from workers.logprobs import describe, likeliest
from workers.noise import GumbelNoise
from workers.penalties import adjust
from workers.selection import argmax, where
from workers.sequences import Span

_MANY = 0.05
"""Share of the vocabulary above which hashing all of it is cheaper than picking out the tokens that are left."""


@dataclass(frozen=True)
class Draw:
    """One drawn token; of a beam the likeliest one."""

    token: int
    logprobs: TokenLogprobs | None


class Sampler:
    """Draws the next token of each span from a row of logits."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._noise = GumbelNoise(vocab_size, device)

    def draw(self, logits: Tensor, spans: Sequence[Span]) -> list[Draw]:
        """One draw for each row of logits [len(spans), vocab] fp32, which is overwritten.

        The token drawn after a span has the position span.end in its sequence: the noise depends on it.
        """
        setups = [span.state.draws for span in spans]
        if all(setup.simple for setup in setups):
            return [Draw(token, None) for token in argmax(logits).tolist()]
        if any(setup.candidates for setup in setups):
            return self._draw_mixed(logits, spans, [i for i, setup in enumerate(setups) if setup.candidates])
        reporting = [i for i, setup in enumerate(setups) if setup.params.logprobs is not None]
        raw = logits[reporting] if reporting else logits[:0]
        adjusted = [i for i, setup in enumerate(setups) if setup.adjusted]
        if adjusted:
            adjust(logits, adjusted, [spans[i] for i in adjusted])
        greedy = [i for i, setup in enumerate(setups) if setup.greedy]
        plain = [i for i, setup in enumerate(setups) if not setup.greedy and not setup.filtered]
        filtered = [i for i, setup in enumerate(setups) if not setup.greedy and setup.filtered]
        tokens = torch.empty(len(spans), dtype=torch.int64, device=logits.device)
        if greedy:
            _put(tokens, greedy, argmax(_rows(logits, greedy)))
        if plain:
            _put(tokens, plain, self._draw_plain(_rows(logits, plain), [spans[i] for i in plain]))
        if filtered:
            _put(tokens, filtered, self._draw_filtered(_rows(logits, filtered), [spans[i] for i in filtered]))
        counts = [setups[i].params.logprobs or 0 for i in reporting]
        logprobs = describe(raw, tokens[reporting], counts) if reporting else []
        by_row = dict(zip(reporting, logprobs, strict=True))
        return [Draw(token, by_row.get(i)) for i, token in enumerate(tokens.tolist())]

    def _draw_mixed(self, logits: Tensor, spans: Sequence[Span], beams: Sequence[int]) -> list[Draw]:
        """As draw(), where rows `beams` are those of beams, of which nothing is drawn."""
        told = likeliest(_rows(logits, list(beams)), [spans[i].state.draws.candidates for i in beams])
        drawn = {i: Draw(next(iter(entry.top_ids), 0), entry) for i, entry in zip(beams, told, strict=True)}
        others = [i for i in range(len(spans)) if i not in drawn]
        if others:
            drawn |= zip(others, self.draw(logits[others], [spans[i] for i in others]), strict=True)
        return [drawn[i] for i in range(len(spans))]

    def _draw_plain(self, logits: Tensor, spans: Sequence[Span]) -> Tensor:
        """Any token can come."""
        scores, keys = _scores(logits, spans), _keys(spans, logits.device)
        if scores.device.type != "cpu":
            return argmax(scores.add_(self._noise.whole(keys)))
        return self._winners(scores, keys, self._noise.contenders(scores, keys))

    def _draw_filtered(self, logits: Tensor, spans: Sequence[Span]) -> Tensor:
        """Noise only for the tokens that the filters leave; where they leave many, for those of them that can win."""
        scores, keys = _scores(logits, spans), _keys(spans, logits.device)
        left = scores >= thresholds(scores, [span.state.params for span in spans])
        if scores.device.type != "cpu":
            return argmax(scores.masked_fill_(~left, -torch.inf).add_(self._noise.whole(keys)))
        if int(left.sum()) > left.numel() * _MANY:
            scores.masked_fill_(~left, -torch.inf)
            left = self._noise.contenders(scores, keys)
        return self._winners(scores, keys, left)

    def _winners(self, scores: Tensor, keys: Tensor, left: Tensor) -> Tensor:
        """[rows]: the arg-max of scores plus noise where `left` [rows, vocab]."""
        rows, ids = where(left)
        noisy = scores[rows, ids] + self._noise.at(keys[rows], ids)
        best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce_(0, rows, noisy, "amax")
        won = noisy == best[rows]
        tokens = torch.full_like(best, scores.shape[1] - 1, dtype=torch.int64)  # stays where no logit is a number
        return tokens.scatter_reduce_(0, rows[won], ids[won], "amin")


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _put(tokens: Tensor, rows: list[int], drawn: Tensor) -> None:
    """tokens[rows] = drawn; on a GPU a list as an index is a copy to it, which all rows don't need."""
    if len(rows) == len(tokens):
        tokens.copy_(drawn)
    else:
        tokens[rows] = drawn


def _scores(logits: Tensor, spans: Sequence[Span]) -> Tensor:
    """Logits over temperature, shifted so that the largest is 0; a new tensor or `logits` overwritten."""
    temperature = torch.tensor([[span.state.params.temperature] for span in spans], dtype=torch.float32, device=logits.device)
    return logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)


def _keys(spans: Sequence[Span], device: torch.device) -> Tensor:
    """[len(spans), 2] int32: the noise keys of the positions after the spans."""
    keys = position_keys([span.state.draws.noise_key for span in spans], [span.end for span in spans])
    return torch.from_numpy(keys).to(device)
