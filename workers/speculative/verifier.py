"""Which of the tokens proposed stand, and what is drawn after them."""

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from torch import Tensor

from workers.sampler import Draw, Sampler
from workers.sequences import Span


class Verifier(Protocol):
    """Draws after spans, some of which end with proposed tokens."""

    def draw(self, logits: Tensor, spans: Sequence[Span]) -> list[list[Draw]]:
        """For each span the proposed tokens that stand, and the one drawn after them.

        logits [n, vocab] fp32, overwritten: a row for each of the spans' parts, in order.
        """


class Coupled:
    """A proposal stands if the target draws the same token there: the output is the one that there would have been without."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def draw(self, logits: Tensor, spans: Sequence[Span]) -> list[list[Draw]]:
        """See Verifier."""
        draws = iter(self._sampler.draw(logits, [part for span in spans for part in span.parts]))
        return [standing(span, list(islice(draws, 1 + span.verify))) for span in spans]


def standing(span: Span, draws: Sequence[Draw]) -> list[Draw]:
    """Of draws after each of `span.parts`, those that count: up to the first that is not the token proposed in its place.

    Each is drawn from the logits that the target has after the tokens before it, with that position's noise: so those that count
    are the draws that there would have been one by one (draft and target coupled by their noise).
    """
    proposed = span.proposed
    stood = 0
    while stood < span.verify and draws[stood].token == proposed[stood]:
        stood += 1
    return list(draws[: stood + 1])
