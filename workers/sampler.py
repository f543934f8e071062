"""From logits to tokens, with the semantics that SamplingParams states; the same token for the same logits in whatever batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.protocol import TokenLogprobs
from workers.logprobs import describe, likeliest
from workers.penalties import adjust
from workers.picker import Picker
from workers.selection import argmax, rows_of
from workers.sequences import Span


@dataclass(frozen=True)
class Draw:
    """One drawn token; of a beam the likeliest one."""

    token: int
    logprobs: TokenLogprobs | None


class Sampler:
    """Draws the next token of each span from a row of logits."""

    def __init__(self, picker: Picker) -> None:
        self._picker = picker

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
        drawn = [i for i, setup in enumerate(setups) if not setup.greedy]
        tokens = [0] * len(spans)
        if greedy:
            _put(tokens, greedy, argmax(rows_of(logits, greedy)).tolist())
        if drawn:
            _put(tokens, drawn, self._picker.pick(logits, drawn, [spans[i] for i in drawn]))
        counts = [setups[i].params.logprobs or 0 for i in reporting]
        logprobs = describe(raw, torch.tensor([tokens[i] for i in reporting], device=raw.device), counts) if reporting else []
        by_row = dict(zip(reporting, logprobs, strict=True))
        return [Draw(token, by_row.get(i)) for i, token in enumerate(tokens)]

    def _draw_mixed(self, logits: Tensor, spans: Sequence[Span], beams: Sequence[int]) -> list[Draw]:
        """As draw(), where rows `beams` are those of beams, of which nothing is drawn."""
        told = likeliest(rows_of(logits, beams), [spans[i].state.draws.candidates for i in beams])
        drawn = {i: Draw(next(iter(entry.top_ids), 0), entry) for i, entry in zip(beams, told, strict=True)}
        others = [i for i in range(len(spans)) if i not in drawn]
        if others:
            drawn |= zip(others, self.draw(logits[others], [spans[i] for i in others]), strict=True)
        return [drawn[i] for i in range(len(spans))]


def _put(tokens: list[int], rows: list[int], drawn: list[int]) -> None:
    for row, token in zip(rows, drawn, strict=True):
        tokens[row] = token
