"""Which engine a request goes to: where its first token will come soonest, counted in tokens to be computed.

    cost(engine) = tokens of the prompt that it has no KV of
                 + tokens of other prompts that it has to compute first (its backlog)
                 + what its other sequences take meanwhile

The first term sends requests to the KV they can share, the others away from where many are already. So a prefix that many ask for
spreads: each request that goes to its holder raises the holder's cost, and an engine that computes it instead becomes a holder too.
"""

SEQUENCE_TOKENS = 64.0
"""What another sequence of the engine adds, in tokens: about as much as the iterations it is part of delay a prompt."""


def delay(backlog: int, sequences: int) -> float:
    """What an engine adds to a request's cost, whichever it is. `backlog`: tokens of prompts that it has to compute already.
    `sequences`: that it runs, that wait there, and those bound to it."""
    return backlog + SEQUENCE_TOKENS * sequences


def cost(num_tokens: int, overlap: int, delay: float) -> float:
    """Tokens of computing until the request's first token, where the engine has the KV of `overlap` of its `num_tokens`."""
    return (num_tokens - overlap if overlap < num_tokens else 1) + delay
