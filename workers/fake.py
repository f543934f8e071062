"""A pipeline stage that computes hashes where a model computes activations: for property tests and simulations. No torch.

Where a layer keeps K and V of a position, a fake stage keeps a hash of the whole prefix up to it, chained through the paged pool:
it reads the previous position's hash from the slot that the block table names and writes the next into its own. A block given away
too early, shared wrongly, copied in the wrong order, or a token that did not reach the first stage: each changes every token drawn
from then on, and fake_output() says what they should have been.
"""

from collections.abc import Sequence
from itertools import pairwise

from cluster.protocol import ChunkResult, PromptScores, SamplingParams, StepPlan, StepResult, TokenLogprobs, Transfer
from workers.sequences import SequenceTable, Span, moves

_MASK = (1 << 64) - 1


def mix(a: int, b: int) -> int:
    """A 64-bit hash of two numbers (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def draw(state: int, params: SamplingParams, choice: int, vocab_size: int, num_emitted: int) -> int:
    """The token after a prefix whose hash at the last stage is `state`."""
    token = mix(mix(state, params.seed), choice) % vocab_size
    while num_emitted < params.min_tokens and token in params.stop_token_ids:
        token = (token + 1) % vocab_size
    return token


def score(state: int, token: int) -> float:
    """The log-probability of `token` after a prefix whose hash at the last stage is `state`."""
    return -(mix(state, token) % 997) / 64


class FakeStage:
    """Stage `stage` of a pipeline of `num_stages`."""

    def __init__(
        self, stage: int, num_stages: int, num_blocks: int, block_size: int, vocab_size: int = 997, host_blocks: int = 0
    ) -> None:
        self.last = stage == num_stages - 1
        self.first = stage == 0
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.table = SequenceTable(block_size)
        self._slots = [0] * (num_blocks * block_size)
        self._host: list[list[int]] = [[] for _ in range(host_blocks)]

    def execute(self, plan: StepPlan, hidden: list[int]) -> tuple[list[int], StepResult | None]:
        """Run a plan on `hidden` ([num_tokens], from the stage before; ignored by the first).

        Returns the activations for the next stage, and from the last stage the result.
        """
        spans = self.table.apply(plan)
        for move in moves(plan):
            self._transfer(move) if isinstance(move, Transfer) else self._copy(move)
        out: list[int] = []
        results: list[ChunkResult] = []
        scores: list[PromptScores] = []
        for span in spans:
            inputs = [int(token) for token in span.ids] if self.first else hidden[len(out) : len(out) + span.num_tokens]
            states = self._run(span, inputs)
            out += states
            if self.last and span.scores is not None:
                scores.append(_scores(span, states, *span.scores))
            if self.last and span.sample:
                results.append(self._draw(span, out[-1]))
        return out, StepResult(epoch=plan.epoch, step=plan.step, results=results, scores=scores) if self.last else None

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        size = self.block_size
        for source, target in copies:
            self._slots[target * size : (target + 1) * size] = self._slots[source * size : (source + 1) * size]

    def _transfer(self, transfer: Transfer) -> None:
        size = self.block_size
        for block, slot in zip(transfer.blocks, transfer.slots, strict=True):
            if transfer.kind == "store":
                self._host[slot] = self._slots[block * size : (block + 1) * size]
            else:
                self._slots[block * size : (block + 1) * size] = self._host[slot]

    def _run(self, span: Span, inputs: list[int]) -> list[int]:
        state = self._slots[self._slot(span, span.start - 1)] if span.start else 0
        states: list[int] = []
        for position, value in enumerate(inputs, span.start):
            state = mix(state, value)
            self._slots[self._slot(span, position)] = state
            states.append(state)
        return states

    def _slot(self, span: Span, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return int(span.state.block_table[block]) * self.block_size + offset

    def _draw(self, span: Span, state: int) -> ChunkResult:
        params = span.state.params
        token = draw(state, params, span.state.choice, self.vocab_size, span.end - span.state.num_prompt)
        self.table.commit(span, [token])
        logprobs = [] if params.logprobs is None else [TokenLogprobs(-(token / self.vocab_size), [], [])]
        return ChunkResult(span.state.seq, [token], logprobs)


def _scores(span: Span, states: list[int], first: int, end: int) -> PromptScores:
    tokens = span.state.tokens
    told = [score(states[position - 1 - span.start], int(tokens[position])) for position in range(first, end)]
    return PromptScores(span.state.seq, first, [TokenLogprobs(logprob, [], []) for logprob in told])


def fake_scores(prompt: Sequence[int], num_stages: int) -> list[float]:
    """The log-probabilities of prompt positions [1, len(prompt)), computed likewise."""
    states = [0] * num_stages
    return [score(_forward(states, before), token) for before, token in pairwise(prompt)]


def fake_output(prompt: Sequence[int], params: SamplingParams, choice: int, num_stages: int, vocab_size: int = 997) -> list[int]:
    """The tokens that a request must give, computed with no batch, no pool and no plan."""
    states = [0] * num_stages
    value = 0
    output: list[int] = []
    for token in prompt:
        value = _forward(states, token)
    while len(output) < params.max_tokens:
        output.append(draw(value, params, choice, vocab_size, len(output)))
        if output[-1] in params.stop_token_ids:
            break
        value = _forward(states, output[-1])
    return output


def _forward(states: list[int], value: int) -> int:
    for stage, state in enumerate(states):
        states[stage] = value = mix(state, value)
    return value
