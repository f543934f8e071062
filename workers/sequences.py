"""What a worker remembers of the sequences it was told of: StepPlans are differences, this is what they add up to."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.protocol import Admission, Chunk, NewSequence, SamplingParams, StepPlan, Transfer
from workers.draws import DrawSetup


class PlanError(RuntimeError):
    """A plan that does not follow from the ones before it: a bug in the engine, or a lost message."""


@dataclass
class SequenceState:
    """One sequence in a worker."""

    seq: int
    choice: int
    draws: DrawSetup
    num_prompt: int
    tokens: NDArray[np.int32]
    """[capacity]: prompt, then emitted and sampled tokens; valid up to num_tokens."""
    num_tokens: int
    blocks: NDArray[np.int32]
    """[capacity]: block table; valid up to num_blocks."""
    num_blocks: int = 0
    num_computed: int = 0

    def put_tokens(self, start: int, ids: list[int]) -> None:
        """Write ids at positions [start, start + len(ids)); they become the last known ones."""
        end = start + len(ids)
        self.tokens = _grown(self.tokens, end)
        self.tokens[start:end] = ids
        self.num_tokens = end

    def suggest(self, position: int, token: int) -> None:
        """Write a token that may or may not come; it is not known."""
        self.tokens = _grown(self.tokens, position + 1)
        self.tokens[position] = token

    def add_blocks(self, ids: list[int]) -> None:
        """Append to the block table."""
        end = self.num_blocks + len(ids)
        self.blocks = _grown(self.blocks, end)
        self.blocks[self.num_blocks : end] = ids
        self.num_blocks = end

    @property
    def params(self) -> SamplingParams:
        """How its tokens are drawn, as the client said it."""
        return self.draws.params

    @property
    def block_table(self) -> NDArray[np.int32]:
        """[num_blocks]"""
        return self.blocks[: self.num_blocks]


@dataclass(frozen=True)
class Span:
    """A chunk with its sequence: positions [start, end) are run, and their KV written."""

    state: SequenceState
    start: int
    end: int
    sample: bool
    scores: tuple[int, int] | None = None
    """[first, end): prompt positions whose log-probabilities are wanted."""
    verify: int = 0
    """The last so many tokens were proposed."""
    propose: int = 0
    """At most so many tokens to propose afterwards."""

    @property
    def num_tokens(self) -> int:
        """Queries of this span."""
        return self.end - self.start

    @property
    def parts(self) -> "list[Span]":
        """What a token is drawn after: all of it, and where tokens are verified each part that ends before one of them."""
        if not self.verify:
            return [self]
        return [Span(self.state, self.start, end, self.sample) for end in range(self.end - self.verify, self.end + 1)]

    @property
    def proposed(self) -> list[int]:
        """The tokens to verify."""
        found: list[int] = self.state.tokens[self.end - self.verify : self.end].tolist()
        return found

    @property
    def ids(self) -> NDArray[np.int32]:
        """[num_tokens]: input tokens."""
        return self.state.tokens[self.start : self.end]


@dataclass
class SequenceTable:
    """All sequences of one worker in one epoch."""

    block_size: int
    states: dict[int, SequenceState] = field(default_factory=dict)

    def apply(self, plan: StepPlan) -> list[Span]:
        """Take in a plan's differences; returns its chunks in batch order. Raises PlanError where the plan can't be right."""
        for seq in plan.finished:
            self.states.pop(seq, None)
        for admission in plan.admitted:
            self._admit(admission)
        return [self._advance(chunk) for chunk in plan.chunks]

    def commit(self, span: Span, tokens: list[int]) -> None:
        """Tokens drawn here after what `span` has before those to verify: known from now on, so that a next plan need not carry
        them; those of the span that differ are not."""
        span.state.put_tokens(span.end - span.verify, tokens)
        span.state.num_computed = span.state.num_tokens - 1

    def _admit(self, admission: Admission) -> None:
        if admission.new is not None:
            self.states[admission.seq] = _new_state(admission.seq, admission.new)
        elif admission.parent is not None:
            self.states[admission.seq] = self._forked(admission.seq, admission.parent, admission.num_computed)
        state = self.states.get(admission.seq)
        if state is None:
            raise PlanError(f"sequence {admission.seq} is admitted, but was never sent")
        state.num_blocks = 0
        state.num_computed = admission.num_computed
        state.add_blocks(admission.blocks)

    def _forked(self, seq: int, parent: int, num_tokens: int) -> SequenceState:
        known = self.states.get(parent)
        if known is None or known.num_tokens < num_tokens:
            raise PlanError(f"sequence {seq} is a fork of {parent} after {num_tokens} tokens, which are not known here")
        blocks = np.zeros(len(known.blocks), dtype=np.int32)
        return SequenceState(seq, known.choice, known.draws, known.num_prompt, known.tokens.copy(), num_tokens, blocks)

    def _advance(self, chunk: Chunk) -> Span:
        state = self.states.get(chunk.seq)
        if state is None:
            raise PlanError(f"sequence {chunk.seq} is not known here")
        end = chunk.start + chunk.num_tokens
        state.add_blocks(chunk.new_blocks)
        if chunk.tokens:
            state.put_tokens(end - len(chunk.tokens), chunk.tokens)
        if chunk.num_tokens < 1 or chunk.start > state.num_computed or end > state.num_tokens:
            known = f"{state.num_computed} computed of {state.num_tokens}"
            raise PlanError(f"sequence {chunk.seq}: positions [{chunk.start}, {end}) don't follow {known}")
        if end > state.num_blocks * self.block_size:
            raise PlanError(f"sequence {chunk.seq}: {end} positions don't fit {state.num_blocks} blocks")
        if chunk.scores is not None and not chunk.start < chunk.scores[0] < chunk.scores[1] <= min(end + 1, state.num_prompt):
            raise PlanError(f"sequence {chunk.seq}: positions [{chunk.start}, {end}) can't tell scores {chunk.scores}")
        if not 0 <= chunk.verify < min(chunk.num_tokens, len(chunk.tokens) + 1):
            raise PlanError(f"sequence {chunk.seq}: {chunk.verify} of {chunk.num_tokens} tokens are to be verified")
        state.num_computed = end
        return Span(state, chunk.start, end, chunk.sample, chunk.scores, chunk.verify, chunk.propose)


def moves(plan: StepPlan) -> Iterator[list[tuple[int, int]] | Transfer]:
    """A plan's copies and transfers, in the order in which they are to be run before its chunks."""
    done = 0
    for transfer in plan.transfers:
        if transfer.copies > done:
            yield plan.copies[done : transfer.copies]
            done = transfer.copies
        yield transfer
    if len(plan.copies) > done:
        yield plan.copies[done:]


def _new_state(seq: int, new: NewSequence) -> SequenceState:
    num_tokens = len(new.prompt) + len(new.emitted)
    room = num_tokens + min(new.params.max_tokens, 512)
    tokens = np.zeros(room, dtype=np.int32)
    tokens[:num_tokens] = new.prompt + new.emitted
    return SequenceState(seq, new.choice, DrawSetup.of(new), len(new.prompt), tokens, num_tokens, np.zeros(16, dtype=np.int32))


def _grown(array: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    if size <= len(array):
        return array
    grown = np.zeros(max(size, 2 * len(array)), dtype=np.int32)
    grown[: len(array)] = array
    return grown
