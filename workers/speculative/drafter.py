"""What proposes tokens."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cluster.protocol import StepPlan
from workers.sequences import Span


class Drafter(Protocol):
    """Proposes what may come next. Proposals change nothing but how many iterations it takes."""

    passes: list[tuple[int, float]]
    """Of a model that proposes: tokens and seconds of its passes for the last proposals, what it had to read first."""

    def move(self, plan: StepPlan) -> None:
        """Blocks are copied and moved as in the target's pool, before anything of the plan is run."""

    def forget(self, blocks: Sequence[int]) -> None:
        """Something that it has not read comes into these blocks from elsewhere."""

    def propose(self, spans: Sequence[Span]) -> list[list[int]]:
        """For each of a plan's spans, which have been run, at most span.propose tokens that may follow what is known now."""

    def odds(self, spans: Sequence[Span], like: Tensor) -> tuple[Tensor, list[bool]]:
        """For rejection sampling: the distribution that each of the tokens was drawn from which `spans` verify, of the shape [n,
        vocab], dtype and device of `like`; and for each span whether it is still known. Where not its rows mean nothing."""
