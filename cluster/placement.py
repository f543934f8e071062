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

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

WORK = 4.0
"""By how much a token computed delays first tokens in all: 1 / (1 - load) in a queue, here for engines that are busy for three
quarters of the time."""
SEQUENCE_TOKENS = 64.0
"""What another sequence of the engine adds, in tokens: about as much as the iterations it is part of delay a prompt."""
_HEAVY = 1e9


def delay(backlog: int, sequences: int) -> float:
    """What an engine adds to a request's cost, whichever it is. `backlog`: tokens of prompts that it has to compute already.
    `sequences`: that it runs, that wait there, and those bound to it."""
    return backlog + SEQUENCE_TOKENS * sequences


def cost(num_tokens: int, overlap: int, delay: float, turnover: float = 1.0) -> float:
    """Tokens by which first tokens are delayed, where the engine has the KV of `overlap` of the prompt's `num_tokens`."""
    return (WORK + turnover) * (num_tokens - overlap if overlap < num_tokens else 1) + delay


class Turnover:
    """What engines were given to compute lately, for the size of their pools: the mean of all is 1.

    Older work counts the less, by the factor e for each filling of all pools since. Only ratios are asked for: so newer work is
    given more weight, in place of less to all that was before.
    """

    def __init__(self) -> None:
        self.work: dict[str, float] = {}
        """Weighted tokens of each engine."""
        self._weight = 1.0

    def bound(self, engine: str, work: int, pools: float) -> None:
        """`work` tokens, to be computed by `engine`; all engines' pools hold `pools` tokens."""
        self._weight *= math.exp(min(1.0, work / max(1, pools)))
        self.work[engine] = self.work.get(engine, 0.0) + work * self._weight
        if self._weight > _HEAVY:
            self.work = {name: worked / self._weight for name, worked in self.work.items()}
            self._weight = 1.0

    def forget(self, engine: str) -> None:
        """Its pool is empty."""
        self.work.pop(engine, None)

    def per_token(self, pools: float) -> float:
        """What its work is to be multiplied by, over the tokens of that engine's pool, for its turnover; 0 if there was none."""
        total = sum(self.work.values())
        return pools / total if total else 0.0


class Loaded(Protocol):
    """What is to be known of an engine."""

    name: str
    delay: float
    pool_tokens: float


E = TypeVar("E", bound=Loaded)


def cheapest(
    engines: Sequence[E], num_tokens: int, overlap: Mapping[str, int], block_size: int, turnover: Turnover, pools: float
) -> E:
    """The engine with the least cost(); of equals the one that has more of the prompt, then the first by name. `overlap`: blocks
    of the prompt that engines have, by name. `pools`: as in Turnover."""
    # All costs are made at once, and of floats only, which is much faster than to call cost() for each of a thousand engines.
    per_token, work = turnover.per_token(pools), turnover.work.get
    missing = {blocks: float(max(1, num_tokens - blocks * block_size)) for blocks in {0, *overlap.values()}}
    if per_token:
        weights = [WORK + per_token * work(engine.name, 0.0) / engine.pool_tokens for engine in engines]
    else:
        weights = [WORK + 1.0] * len(engines)
    if overlap:
        known = overlap.get
        costs = [weight * missing[known(engine.name, 0)] + engine.delay for weight, engine in zip(weights, engines, strict=True)]
    else:
        all_of_it = missing[0]
        costs = [weight * all_of_it + engine.delay for weight, engine in zip(weights, engines, strict=True)]
    least = min(costs)
    if costs.count(least) == 1:
        return engines[costs.index(least)]
    equals = [engine for engine, cost in zip(engines, costs, strict=True) if cost == least]
    return min(equals, key=lambda engine: (-overlap.get(engine.name, 0), engine.name))
