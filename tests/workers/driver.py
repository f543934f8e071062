"""A hand-driven engine for the runner's tests: lays out blocks, writes StepPlans, keeps what comes back."""

from dataclasses import dataclass, field

from cluster.protocol import Admission, Chunk, NewSequence, SamplingParams, StepPlan, TokenLogprobs
from workers.runner import ModelRunner


@dataclass
class Tracked:
    """What the driver knows of one sequence."""

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


class Driver:
    """Plans for one runner. Blocks are given out from the top of the pool downwards, so that tables run backwards."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.sequences: dict[int, Tracked] = {}
        self.free = list(range(1, runner.num_blocks))
        self.steps = 0
        self._admitted: list[Admission] = []
        self._finished: list[int] = []
        self.copies: list[tuple[int, int]] = []

    def add(
        self, seq: int, prompt: list[int], params: SamplingParams, *, choice: int = 0, emitted: list[int] | None = None
    ) -> None:
        """A new sequence comes with the next step."""
        self.sequences[seq] = Tracked(prompt, params, choice, emitted or [])
        new = NewSequence(choice=choice, prompt=prompt, emitted=emitted or [], params=params)
        self._admitted.append(Admission(seq, 0, [], new))

    def preempt(self, seq: int) -> None:
        """Take its blocks; it comes back with the next step and computes everything again."""
        sequence = self.sequences[seq]
        self.free.extend(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        self._admitted.append(Admission(seq, 0, []))

    def finish(self, seq: int) -> None:
        """Forget it with the next step."""
        self.free.extend(self.sequences.pop(seq).blocks)
        self._finished.append(seq)

    def move_block(self, seq: int, index: int) -> None:
        """Copy one of its blocks elsewhere and use the copy from the next step on (its table is sent anew)."""
        sequence = self.sequences[seq]
        old, new = sequence.blocks[index], self.free.pop()
        self.copies.append((old, new))
        sequence.blocks[index] = new
        self._admitted.append(Admission(seq, sequence.computed, list(sequence.blocks)))

    def step(self, counts: dict[int, int]) -> None:
        """Run so many tokens of each sequence, in this order; draw wherever that reaches the last known token."""
        chunks = []
        for seq, count in counts.items():
            sequence = self.sequences[seq]
            end = sequence.computed + count
            needed = -(-end // self.runner.pool.block_size) - len(sequence.blocks)
            new_blocks = [self.free.pop() for _ in range(max(0, needed))]
            sequence.blocks.extend(new_blocks)
            chunks.append(Chunk(seq, sequence.computed, count, new_blocks, [], end == sequence.num_tokens))
            sequence.computed = end
        plan = StepPlan(
            epoch=0, step=self.steps, admitted=self._admitted, chunks=chunks, copies=self.copies, finished=self._finished
        )
        self._admitted, self._finished, self.copies = [], [], []
        self.steps += 1
        result = self.runner.execute(plan)
        assert [r.seq for r in result.results] == [chunk.seq for chunk in chunks if chunk.sample]
        for drawn in result.results:
            self.sequences[drawn.seq].output.extend(drawn.tokens)
            self.sequences[drawn.seq].logprobs.extend(drawn.logprobs)

    def run(self, seqs: list[int], num_tokens: int, chunk: int = 1 << 30) -> None:
        """Steps with all of `seqs` in every one, until each has num_tokens of output; prompts in pieces of `chunk`."""
        while True:
            left = [seq for seq in seqs if len(self.sequences[seq].output) < num_tokens]
            if not left:
                return
            tracked = {seq: self.sequences[seq] for seq in left}
            self.step({seq: min(chunk, t.num_tokens - t.computed) for seq, t in tracked.items()})


def greedy(**changes: object) -> SamplingParams:
    """Greedy parameters."""
    return SamplingParams(**{"seed": 0, "max_tokens": 64, "temperature": 0.0, **changes})  # type: ignore[arg-type]


def generate(runner: ModelRunner, prompt: list[int], num_tokens: int, params: SamplingParams, chunk: int = 1 << 30) -> list[int]:
    """The output of one sequence run alone on a fresh epoch."""
    runner.reset()
    driver = Driver(runner)
    driver.add(0, prompt, params)
    driver.run([0], num_tokens, chunk)
    return driver.sequences[0].output
