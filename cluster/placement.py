"""Which engine a request goes to: where it delays first tokens the least, its own and others', counted in tokens to be computed.

    cost(engine) = tokens of the prompt that it has no KV of, times (WORK + its turnover)
                 + tokens of other prompts that it has to compute first (its backlog)
                 + what its other sequences take meanwhile

The first term sends requests to the KV they can share, the others away from where many are already. To wait delays this request
alone. To compute again what another engine has delays whoever comes while the engine is busy too: that is what WORK is for. And new
KV pushes the oldest out, which is the fresher the more an engine has computed lately: its turnover. Without it, all requests that
have a few first tokens in common would go to one engine as long as it keeps up, and the caches of the others would lie idle.

A prefix that many ask for spreads all the same: each request that goes to its holder raises the holder's cost, and an engine that
computes it instead becomes a holder too.
"""

from dataclasses import dataclass

WORK = 4.0
"""By how much a token computed delays first tokens in all: 1 / (1 - load) in a queue, here for engines that are busy for three
quarters of the time."""
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
    turnover: float = 1.0
    """Tokens bound to it lately that it had to compute, for the size of its pool; the mean of all engines is 1."""


def cost(option: Option, num_tokens: int) -> float:
    """Tokens by which first tokens are delayed."""
    missing = max(1, num_tokens - option.overlap)
    return (WORK + option.turnover) * missing + option.backlog + SEQUENCE_TOKENS * option.sequences
