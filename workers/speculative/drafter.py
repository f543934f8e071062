"""What proposes tokens, and which of them stand."""

from collections.abc import Sequence
from typing import Protocol

from cluster.protocol import StepPlan
from workers.sampler import Draw
from workers.sequences import Span


class Drafter(Protocol):
    """Proposes what may come next. Proposals change nothing but how many iterations it takes."""

    token_s: float
    """Seconds that one token more for all sequences took the last time, where that is worth mentioning."""

    def move(self, plan: StepPlan) -> None:
        """Blocks are copied and moved as in the target's pool, before anything of the plan is run."""

    def forget(self, blocks: Sequence[int]) -> None:
        """Something that it has not read comes into these blocks from elsewhere."""

    def propose(self, spans: Sequence[Span]) -> list[list[int]]:
        """For each of a plan's spans, which have been run, at most span.propose tokens that may follow what is known now."""


def standing(span: Span, draws: Sequence[Draw]) -> list[Draw]:
    """Of draws after each of `span.parts`, those that count: up to the first that is not the token proposed in its place.

    Each is drawn from the logits that the target has after the tokens before it, with that position's noise: so those that count
    are the draws that there would have been one by one (draft and target coupled by their noise).
    """
    proposed = span.state.tokens[span.end - span.verify : span.end].tolist()
    stood = 0
    while stood < span.verify and draws[stood].token == proposed[stood]:
        stood += 1
    return list(draws[: stood + 1])
