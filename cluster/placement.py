"""Which engine a request goes to: where its first token will come soonest, counted in tokens to be computed.

    cost(engine) = tokens of the prompt that it has no KV of
                 + tokens of other prompts that it has to compute first (its backlog)
                 + what its other sequences take meanwhile

The first term sends requests to the KV they can share, the others away from where many are already. So a prefix that many ask for
spreads: each request that goes to its holder raises the holder's cost, and an engine that computes it instead becomes a holder too.
"""

from dataclasses import dataclass

SEQUENCE_TOKENS = 64.0
"""What another sequence of the engine adds, in tokens: about as much as the iterations it is part of delay a prompt."""


@dataclass(frozen=True)
class Option:
    """An engine that could take the request."""

    overlap: int
    """Tokens of the prompt whose KV it has."""
    backlog: int
    """Tokens of prompts that it has to compute already."""
    sequences: int
    """That it runs, that wait there, and those bound to it."""


def cost(option: Option, num_tokens: int) -> float:
    """Tokens of computing until the request's first token."""
    return max(1, num_tokens - option.overlap) + option.backlog + SEQUENCE_TOKENS * option.sequences
