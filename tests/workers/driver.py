"""A hand-driven engine for the runner's tests: lays out blocks, writes StepPlans, keeps what comes back."""

from bench.plans import PlanWriter
from cluster.protocol import SamplingParams
from workers.runner import ModelRunner


class Driver(PlanWriter):
    """Plans for one runner, executed at once."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner.num_blocks, runner.pool.block_size)
        self.runner = runner

    def step(self, counts: dict[int, int]) -> None:
        """Run so many tokens of each sequence, in this order; draw wherever that reaches the last known token."""
        plan = self.plan(counts)
        result = self.runner.execute(plan)
        assert [r.seq for r in result.results] == [chunk.seq for chunk in plan.chunks if chunk.sample]
        self.take(result)

    def run(self, seqs: list[int], num_tokens: int, chunk: int = 1 << 30) -> None:
        """Steps with all of `seqs` in every one, until each has num_tokens of output; prompts in pieces of `chunk`."""
        while left := [seq for seq in seqs if len(self.sequences[seq].output) < num_tokens]:
            self.step({seq: min(chunk, self.sequences[seq].missing) for seq in left})


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
