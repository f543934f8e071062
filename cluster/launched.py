"""A plan on its way through the workers, and what its result must look like."""

from dataclasses import dataclass

from cluster.protocol import StepPlan, StepResult
from cluster.request import Sequence


@dataclass(frozen=True)
class Launched:
    """A plan whose result is awaited, and the sequences its chunks are of."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        """That it runs."""
        return sum(chunk.num_tokens for chunk in self.plan.chunks)

    def answered_by(self, result: StepResult) -> bool:
        """Whether `result` is of this plan: tokens for just the chunks that draw, scores for just those that are to tell some."""
        chunks = self.plan.chunks
        drawn = sorted(r.seq for r in result.results)
        if self.plan.step != result.step or drawn != sorted(chunk.seq for chunk in chunks if chunk.sample):
            return False
        asked = sorted((chunk.seq, *chunk.scores) for chunk in chunks if chunk.scores is not None)
        told = sorted((s.seq, s.first, s.first + len(s.logprobs)) for s in result.scores)
        sampled = {chunk.seq: chunk for chunk in chunks if chunk.sample}
        return asked == told and all(
            1 <= len(r.tokens) <= 1 + sampled[r.seq].verify and len(r.proposed) <= sampled[r.seq].propose for r in result.results
        )
