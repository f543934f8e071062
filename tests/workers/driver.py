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


LENGTHS = [1, 3, 8, 9, 17, 30, 41]
"""Of prompts whose batch is mixed: around the borders of blocks of 8."""
MIXED = [
    greedy(logprobs=2),
    SamplingParams(seed=5, max_tokens=99, temperature=0.8, logprobs=0),
    SamplingParams(seed=6, max_tokens=99, temperature=1.1, top_k=20, top_p=0.9),
    SamplingParams(seed=7, max_tokens=99, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1),
    SamplingParams(seed=8, max_tokens=99, temperature=0.7, top_p=0.6),
    SamplingParams(seed=9, max_tokens=99, min_p=0.1, logit_bias={3: 2.0, 9: -5.0}),
    greedy(logit_bias={3: 2.0, 9: -5.0}),
]
"""Ways to draw, one for each of LENGTHS."""
