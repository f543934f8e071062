"""Prompt lookup: what followed the last tokens where they stood before (Saxena 2023). No model; for repetitive texts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.protocol import StepPlan
from workers.sequences import SequenceState, Span

_SHORTEST, _LONGEST = 2, 6
"""Tokens that have to be the same, and those that are compared."""


class PromptLookup:
    """See workers.speculative.drafter.Drafter."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, float]] = []

    def forget(self, blocks: Sequence[int]) -> None:
        """See Drafter."""

    def move(self, plan: StepPlan) -> None:
        """See Drafter."""

    def propose(self, spans: Sequence[Span]) -> list[list[int]]:
        """See Drafter."""
        return [_following(span.state, span.propose) if span.propose else [] for span in spans]

    def odds(self, spans: Sequence[Span], like: Tensor) -> tuple[Tensor, list[bool]]:
        """See Drafter: no other tokens could have been proposed."""
        proposed = torch.tensor([token for span in spans for token in span.proposed], device=like.device)
        return torch.zeros_like(like).scatter_(1, proposed[:, None], 1.0), [True] * len(spans)


def _following(state: SequenceState, count: int) -> list[int]:
    """Up to `count` tokens after the latest of the places where the most of the last tokens stood before."""
    tokens = state.tokens[: state.num_tokens]
    last = len(tokens) - 1
    places = np.flatnonzero(tokens[:last] == tokens[last])
    length = 1
    while length < _LONGEST and len(places):
        longer = places[(places >= length) & (tokens[places - length] == tokens[last - length])] if last >= length else places[:0]
        if not len(longer):
            break
        places, length = longer, length + 1
    if length < _SHORTEST or not len(places):
        return []
    after = int(places[-1]) + 1
    found: list[int] = tokens[after : after + count].tolist()
    return found
