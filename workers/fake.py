"""A pipeline stage that computes hashes where a model computes activations: for property tests and simulations. No torch.

Where a layer keeps K and V of a position, a fake stage keeps a hash of the whole prefix up to it, chained through the paged pool:
it reads the previous position's hash from the slot that the block table names and writes the next into its own. A block given away
too early, shared wrongly, copied in the wrong order, or a token that did not reach the first stage: each changes every token drawn
from then on, and fake_output() says what they should have been.
"""

from collections.abc import Sequence
from itertools import pairwise

from cluster.protocol import ChunkResult, PromptScores, SamplingParams, StepPlan, StepResult, TokenLogprobs, Transfer
from workers.sequences import SequenceState, SequenceTable, Span, moves

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


def likeliest(state: int, count: int, vocab_size: int) -> TokenLogprobs:
    """The likeliest tokens after a prefix whose hash at the last stage is `state`: of each state other ones, and often equally
    likely."""
    logprobs: dict[int, float] = {}
    logprob = 0.0
    for number in range(2 * vocab_size):
        if len(logprobs) == count:
            break
        token = mix(state, number) % vocab_size
        logprob -= (token % 8) / 16
        logprobs.setdefault(token, logprob)
    return TokenLogprobs(0.0, list(logprobs), list(logprobs.values()))


class FakeStage:
    """Stage `stage` of a pipeline of `num_stages`."""

    def __init__(
        self, stage: int, num_stages: int, num_blocks: int, block_size: int, vocab_size: int = 997, host_blocks: int = 0
    ) -> None:
        self.num_stages = num_stages
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
                results.append(self._draw(span, out[-1 - span.verify :]))
        return out, StepResult(epoch=plan.epoch, step=plan.step, results=results, scores=scores) if self.last else None

    def read(self, blocks: Sequence[int]) -> list[list[int]]:
        """What is in these blocks."""
        size = self.block_size
        return [self._slots[block * size : (block + 1) * size] for block in blocks]

    def write(self, blocks: Sequence[int], contents: Sequence[Sequence[int]]) -> None:
        """Put KV that comes from elsewhere into these blocks."""
        size = self.block_size
        for block, content in zip(blocks, contents, strict=True):
            self._slots[block * size : (block + 1) * size] = content

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

    def _draw(self, span: Span, states: list[int]) -> ChunkResult:
        """`states`: after each of span.parts."""
        params, known = span.state.params, span.state
        if count := known.draws.candidates:
            told = likeliest(states[0], count, self.vocab_size)
            return ChunkResult(known.seq, told.top_ids[:1], [told])
        tokens: list[int] = []
        for part, state in zip(span.parts, states, strict=True):
            tokens.append(draw(state, params, known.choice, self.vocab_size, part.end - known.num_prompt))
            if part.end < span.end and tokens[-1] != known.tokens[part.end]:
                break
        self.table.commit(span, tokens)
        logprobs = [] if params.logprobs is None else [TokenLogprobs(-(token / self.vocab_size), [], []) for token in tokens]
        return ChunkResult(known.seq, tokens, logprobs, self._propose(known, span.propose))

    def _propose(self, known: SequenceState, count: int) -> list[int]:
        """What will come next, but for one token in six."""
        if not count:
            return []
        states, value = [0] * self.num_stages, 0
        for token in known.tokens[: known.num_tokens].tolist():
            value = _forward(states, token)
        proposed: list[int] = []
        while len(proposed) < count - value % 2:
            emitted = known.num_tokens + len(proposed) - known.num_prompt
            right = draw(value, known.params, known.choice, self.vocab_size, emitted)
            proposed.append((right + (value % 6 == 0)) % self.vocab_size)
            value = _forward(states, proposed[-1])
        return proposed


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


def fake_beams(prompt: Sequence[int], params: SamplingParams, num_stages: int, vocab_size: int = 997) -> list[list[int]]:
    """The n outputs that a beam search must give, best first, computed likewise."""
    width, stops = params.beam_width, params.stop_token_ids
    states = [0] * num_stages
    for token in prompt:
        _forward(states, token)
    beams: list[tuple[float, list[int], list[int]]] = [(0.0, [], states)]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, params.max_tokens + 1):
        found: list[tuple[float, int, int]] = []
        for number, (total, output, states) in enumerate(beams):
            told = likeliest(states[-1], width + len(stops), vocab_size)
            allowed = [i for i, token in enumerate(told.top_ids) if token not in stops or len(output) >= params.min_tokens]
            found += [(-total - told.top_logprobs[i], number, told.top_ids[i]) for i in allowed]
        found.sort()
        outputs = [(-minus, [*beams[number][1], token], list(beams[number][2])) for minus, number, token in found]
        ends = [output[-1] in stops or length == params.max_tokens for _, output, _ in outputs]
        ended = [output for output, end in zip(outputs[:width], ends, strict=False) if end]
        done += [(total / length**params.length_penalty, output) for total, output, _ in ended]
        done = sorted(done, key=lambda hypothesis: -hypothesis[0])[:width]
        beams = [output for output, end in zip(outputs, ends, strict=True) if not end][:width]
        full = len(done) == width and bool(beams)
        if not beams or (full and (params.early_stopping or beams[0][0] / length**params.length_penalty <= done[-1][0])):
            break
        for _, output, states in beams:
            _forward(states, output[-1])
    return ([output for _, output in done] + [[]] * params.n)[: params.n]


def _forward(states: list[int], value: int) -> int:
    for stage, state in enumerate(states):
        states[stage] = value = mix(state, value)
    return value
