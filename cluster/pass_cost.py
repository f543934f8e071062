"""How long a model takes for so many tokens at once, learnt size by size.

A straight line (cluster/cost.py) says what a large chunk costs. Whether two tokens cost more than one, or 128 more than 64, it does
not: products of few rows wait for memory, kernels have favourite sizes. So each size has a mean of its own.
"""

import bisect
import math
from dataclasses import dataclass

from cluster.cost import StepCost

_EXACT = 16
"""Up to so many tokens each number is a size of its own; above, sizes grow by _STEP."""
_STEP = 1.25
_FADE = 0.98
"""Weight of a pass after each later one of its size."""
_DRIFT = 0.3
"""Of what a pass took longer than its size usually does, so much is taken for the machine's pace, which is that of all sizes."""
_OUTLIER = 4.0
_STALE = 2000
"""Passes of other sizes after which what one took counts no more: caches fill, contexts grow."""


@dataclass
class _Size:
    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    """At a pace of 1."""
    last: int = 0


class PassCost:
    """Seconds by number of tokens: a size's share times the machine's pace. Others use the machine too, and contexts grow: so sizes
    that were seen long ago can still be compared with those that are seen now. More tokens never take less: sizes that say so are
    taken together (pool adjacent violators, Ayer et al. 1955). Between the sizes that were seen it goes straight, beyond them in
    proportion to `line`."""

    def __init__(self, line: StepCost) -> None:
        self._line = line
        self._sizes: dict[int, _Size] = {}
        self._count = 0
        self._pace = 1.0
        self._knots: tuple[list[float], list[float]] | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long. If that is far too long, the process stood still: it is cut."""
        if tokens <= 0 or seconds <= 0.0:
            return
        number = _size_of(tokens)
        size = self._sizes.get(number)
        usual = self.seconds(tokens) if size is None else self._pace * size.seconds
        seconds = min(seconds, _OUTLIER * usual)
        if size is None:
            size = self._sizes[number] = _Size()
        else:
            self._pace *= (seconds / usual) ** _DRIFT
        self._count += 1
        size.weight = size.weight * _FADE + 1.0
        size.tokens += (tokens - size.tokens) / size.weight
        size.seconds += (seconds / self._pace - size.seconds) / size.weight
        size.last = self._count
        self._knots = None

    @property
    def known(self) -> bool:
        """Whether there is a pass or a line to go by."""
        return self.seconds(1) < math.inf

    def seconds(self, tokens: float) -> float:
        """Of a pass of so many tokens; as long as none was seen what `line` says, which is infinite at first."""
        if self._knots is None:
            self._knots = self._learn()
        sizes, seconds = self._knots
        if not sizes:
            return self._line.seconds(tokens)
        above = bisect.bisect_left(sizes, tokens)
        if above == len(sizes) or (above == 0 and tokens < sizes[0]):
            nearest, fixed = min(above, len(sizes) - 1), self._line.fixed_tokens
            return self._pace * seconds[nearest] * (tokens + fixed) / (sizes[nearest] + fixed)
        if sizes[above] == tokens:
            return self._pace * seconds[above]
        share = (tokens - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
        return self._pace * (seconds[above - 1] + share * (seconds[above] - seconds[above - 1]))

    def _learn(self) -> tuple[list[float], list[float]]:
        """(tokens, seconds) of the sizes seen lately, both ascending."""
        for number in [n for n, size in self._sizes.items() if self._count - size.last > _STALE]:
            del self._sizes[number]
        pools: list[tuple[float, float, list[float]]] = []  # weight, mean seconds, the sizes
        for _, size in sorted(self._sizes.items()):
            weight, mean, members = size.weight, size.seconds, [size.tokens]
            while pools and pools[-1][1] >= mean:
                other, their_mean, theirs = pools.pop()
                mean = (weight * mean + other * their_mean) / (weight + other)
                weight, members = weight + other, theirs + members
            pools.append((weight, mean, members))
        return [tokens for pool in pools for tokens in pool[2]], [mean for _, mean, members in pools for _ in members]


def _size_of(tokens: int) -> int:
    return tokens if tokens <= _EXACT else _EXACT + 1 + int(math.log(tokens / _EXACT, _STEP))
