"""StepPlans written by hand: a runner driven without an engine, to see what single steps give (bench.exactness, tests)."""

from dataclasses import dataclass, field

from cluster.protocol import Admission, Chunk, NewSequence, SamplingParams, StepPlan, StepResult, TokenLogprobs


@dataclass
class Tracked:
    """What is known of one sequence."""

    prompt: list[int]
    params: SamplingParams
    choice: int
    emitted: list[int]
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt, emitted, drawn."""
        return len(self.prompt) + len(self.emitted) + len(self.output)

    @property
    def missing(self) -> int:
        """Known tokens that are not computed yet."""
        return self.num_tokens - self.computed


class PlanWriter:
    """Plans for one worker in one epoch. Blocks are given out from the top of the pool downwards, so that tables run backwards."""

    def __init__(self, num_blocks: int, block_size: int, *, carry: bool = False) -> None:
        """num_blocks: the null block included. carry: chunks bring the ids of output tokens, as the worker draws none itself."""
        self.sequences: dict[int, Tracked] = {}
        self.free = list(range(1, num_blocks))
        self.steps = 0
        self.copies: list[tuple[int, int]] = []
        self._block_size = block_size
        self._carry = carry
        self._admitted: list[Admission] = []
        self._finished: list[int] = []

    def add(
        self, seq: int, prompt: list[int], params: SamplingParams, *, choice: int = 0, emitted: list[int] | None = None
    ) -> None:
        """A new sequence comes with the next plan."""
        self.sequences[seq] = Tracked(prompt, params, choice, emitted or [])
        new = NewSequence(choice=choice, prompt=prompt, emitted=emitted or [], params=params)
        self._admitted.append(Admission(seq, 0, [], new))

    def preempt(self, seq: int) -> None:
        """Take its blocks; it comes back with the next plan and computes everything again."""
        sequence = self.sequences[seq]
        self.free.extend(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        self._admitted.append(Admission(seq, 0, []))

    def finish(self, seq: int) -> None:
        """Forget it with the next plan."""
        self.free.extend(self.sequences.pop(seq).blocks)
        self._finished.append(seq)

    def move_block(self, seq: int, index: int) -> None:
        """Copy one of its blocks elsewhere and use the copy from the next plan on (its table is sent anew)."""
        sequence = self.sequences[seq]
        old, new = sequence.blocks[index], self.free.pop()
        self.copies.append((old, new))
        sequence.blocks[index] = new
        self._admitted.append(Admission(seq, sequence.computed, list(sequence.blocks)))

    def plan(self, counts: dict[int, int]) -> StepPlan:
        """So many tokens of each sequence, in this order; a draw wherever that reaches the last known token."""
        chunks = []
        for seq, count in counts.items():
            sequence = self.sequences[seq]
            start, end = sequence.computed, sequence.computed + count
            needed = -(-end // self._block_size) - len(sequence.blocks)
            new_blocks = [self.free.pop() for _ in range(max(0, needed))]
            sequence.blocks.extend(new_blocks)
            sent = len(sequence.prompt) + len(sequence.emitted)
            tokens = sequence.output[max(0, start - sent) : max(0, end - sent)] if self._carry else []
            chunks.append(Chunk(seq, start, count, new_blocks, tokens, end == sequence.num_tokens))
            sequence.computed = end
        plan = StepPlan(
            epoch=0, step=self.steps, admitted=self._admitted, chunks=chunks, copies=self.copies, finished=self._finished
        )
        self._admitted, self._finished, self.copies = [], [], []
        self.steps += 1
        return plan

    def take(self, result: StepResult) -> None:
        """Append what was drawn."""
        for drawn in result.results:
            self.sequences[drawn.seq].output.extend(drawn.tokens)
            self.sequences[drawn.seq].logprobs.extend(drawn.logprobs)
