"""A small model proposes: it has read all that the target has, and goes on from the token drawn last (Leviathan et al. 2023).

Its keys and values lie in a pool of its own under the target's block ids, so they are shared, copied, kept and evicted with the
target's. It reads what is new of a sequence when it is asked to propose something, up to the token just drawn, and then runs a
token at a time. It draws with the target's noise, filters and penalties: where both models agree on the likeliest token after the
noise, the proposal stands.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cluster.protocol import StepPlan, Transfer
from workers.paged import PagedModel
from workers.sampler import Sampler
from workers.selection import rows_of
from workers.sequences import SequenceState, Span, moves
from workers.speculative.rejection import RejectionSampling

_PIECE = 512
"""Tokens that are read at once."""


@dataclass
class _Drawn:
    """What tokens proposed for a sequence were drawn from."""

    start: int
    """Position of the first."""
    tokens: list[int] = field(default_factory=list)
    odds: list[Tensor] = field(default_factory=list)
    """[vocab] fp32 each."""


class DraftModel:
    """See workers.speculative.drafter.Drafter."""

    def __init__(self, model: PagedModel, sampling: RejectionSampling | None = None) -> None:
        """model: whole, on this rank, of the target's vocabulary. sampling: where its tokens are to be verified by rejection. Then
        what each was drawn from is kept, 4 bytes for each id of the vocabulary, until its sequence runs again, enters anew or goes.
        """
        self._model = model
        self._size = model.pool.block_size
        self._sampler = Sampler(model.decoder.kernels.picker(model.decoder.shape.vocab_size, model.device))
        self._sampling = sampling
        self._drawn: dict[int, _Drawn] = {}
        self.passes: list[tuple[int, float]] = []
        self._read = np.zeros(model.pool.num_blocks, dtype=np.int64)
        """[num_blocks]: of how many of its slots, from the first on, keys and values are those of what the target has there."""
        self._read_on_host = np.zeros(0 if model.host is None else len(model.host.slots), dtype=np.int64)

    def move(self, plan: StepPlan) -> None:
        """See Drafter."""
        self._model.move(plan)
        for seq in (*plan.finished, *(admission.seq for admission in plan.admitted)):
            self._drawn.pop(seq, None)
        for move in moves(plan):
            if not isinstance(move, Transfer):
                for source, target in move:
                    self._read[target] = self._read[source]
            elif move.kind == "store":
                self._read_on_host[move.slots] = self._read[move.blocks]
            else:
                self._read[move.blocks] = self._read_on_host[move.slots]

    def forget(self, blocks: Sequence[int]) -> None:
        """See Drafter."""
        self._read[list(blocks)] = 0

    def propose(self, spans: Sequence[Span]) -> list[list[int]]:
        """See Drafter. As many as the sequence's blocks have room for."""
        self._forget(spans)
        if self._drawn:
            for span in spans:
                self._drawn.pop(span.state.seq, None)
        proposed: list[list[int]] = [[] for _ in spans]
        self.passes = []
        if not any(span.propose for span in spans):
            return proposed
        going = [(proposed[i], span.state, count) for i, span in enumerate(spans) if (count := self._room(span)) > 0]
        if not going:
            return proposed
        began = time.perf_counter()
        unread = [self._unread(state) for _, state, _ in going]
        num_tokens, reading = sum(span.num_tokens for span in unread), self._last_pieces(unread)
        while going:
            hidden = self._model.forward(reading)
            if len(hidden) > len(reading):
                hidden = hidden.index_select(0, self._model.to_device(np.cumsum([span.num_tokens for span in reading]) - 1))
            draws = self._draw(self._model.decoder.logits(hidden), reading)
            coming: list[tuple[list[int], SequenceState, int]] = []
            for (found, state, count), token in zip(going, draws, strict=True):
                found.append(token)
                if len(found) < count:
                    state.suggest(state.num_tokens + len(found) - 1, token)
                    coming.append((found, state, count))
            now = time.perf_counter()
            self.passes.append((num_tokens, now - began))
            going, began, num_tokens = coming, now, len(coming)
            ends = [state.num_tokens + len(found) for found, state, _ in going]
            reading = [Span(state, end - 1, end, True) for (_, state, _), end in zip(going, ends, strict=True)]
        return proposed

    def odds(self, spans: Sequence[Span], like: Tensor) -> tuple[Tensor, list[bool]]:
        """See Drafter."""
        rows: list[Tensor] = []
        known: list[bool] = []
        for span in spans:
            drawn = self._drawn.get(span.state.seq)
            if drawn is not None and drawn.start == span.end - span.verify and drawn.tokens[: span.verify] == span.proposed:
                rows += drawn.odds[: span.verify]
                known.append(True)
            else:
                rows += like[:1].expand(span.verify, -1)
                known.append(False)
        return torch.stack(rows), known

    def _draw(self, logits: Tensor, spans: Sequence[Span]) -> list[int]:
        """A token after each of `spans`, from logits [len(spans), vocab] fp32, which are overwritten."""
        sampled = [] if self._sampling is None else [i for i, span in enumerate(spans) if not span.state.draws.greedy]
        if self._sampling is None or not sampled:
            return [draw.token for draw in self._sampler.draw(logits, spans)]
        tokens, odds = self._sampling.propose(rows_of(logits, sampled), [spans[i] for i in sampled])
        for i, token, row in zip(sampled, tokens, odds, strict=True):
            drawn = self._drawn.setdefault(spans[i].state.seq, _Drawn(spans[i].end))
            drawn.tokens.append(token)
            drawn.odds.append(row)
        by_span = dict(zip(sampled, tokens, strict=True))
        others = [i for i in range(len(spans)) if i not in by_span]
        if others:
            draws = self._sampler.draw(logits[others], [spans[i] for i in others])
            by_span |= {i: draw.token for i, draw in zip(others, draws, strict=True)}
        return [by_span[i] for i in range(len(spans))]

    def _room(self, span: Span) -> int:
        """How many of the tokens that are asked for can be proposed: all but the last are read, and need a slot each."""
        return min(span.propose, span.state.num_blocks * self._size - span.state.num_tokens + 1)

    def _forget(self, spans: Sequence[Span]) -> None:
        """The target has something new there."""
        size, read = self._size, self._read
        for span in spans:
            first, last = span.start // size, (span.end - 1) // size
            block = span.state.blocks[first]
            if read[block] > span.start % size:
                read[block] = span.start % size
            if last > first:
                read[span.state.blocks[first + 1 : last + 1]] = 0

    def _unread(self, state: SequenceState) -> Span:
        """What is known of a sequence and not read, the last token in any case; taken for read from now on."""
        blocks = state.blocks[: -(-state.num_tokens // self._size)]
        counts = self._read[blocks]
        number = int((counts < self._size).argmax()) if (counts < self._size).any() else len(blocks) - 1
        start = min(number * self._size + int(counts[number]), state.num_tokens - 1)
        self._read[blocks[number:-1]] = self._size
        self._read[blocks[-1]] = state.num_tokens - (len(blocks) - 1) * self._size
        return Span(state, start, state.num_tokens, True)

    def _last_pieces(self, spans: list[Span]) -> list[Span]:
        """Their ends, when the rest has been read. Where one is long, all but the last tokens are, one span after the other: what a
        later one shares with an earlier one counts as read already."""
        if all(span.num_tokens <= _PIECE for span in spans):
            return spans
        for span in spans:
            for start in range(span.start, span.end - 1, _PIECE):
                self._model.forward([Span(span.state, start, min(start + _PIECE, span.end - 1), False)])
        return [Span(span.state, span.end - 1, span.end, True) for span in spans]
