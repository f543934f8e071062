"""The fake model with a price: time that tests decide."""

from bench.driver import FakeRunner
from cluster.config import BatchConfig
from cluster.protocol import StepPlan, StepResult


def config(**changes: object) -> BatchConfig:
    """A pool in which memory limits nothing."""
    values: dict[str, object] = {"num_blocks": 400, "max_model_len": 128, "block_size": 4, "max_num_seqs": 8, **changes}
    return BatchConfig(**values)  # type: ignore[arg-type]


class PricedRunner(FakeRunner):
    """An iteration costs `step_s` and `token_s` for each of its tokens; `time` is what all have cost."""

    def __init__(self, config: BatchConfig, step_s: float = 1.0, token_s: float = 0.0) -> None:
        super().__init__(config.num_blocks, config.block_size)
        self.time = 0.0
        self._prices = (step_s, token_s)

    def execute(self, plan: StepPlan) -> StepResult:
        step_s, token_s = self._prices
        self.time += step_s + token_s * sum(chunk.num_tokens for chunk in plan.chunks)
        return super().execute(plan)

    def timer(self) -> float:
        """What iterations are timed with."""
        return self.time
