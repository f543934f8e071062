"""The highest rate that holds a limit: searches over measured points, without I/O and without a clock."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Candidate = TypeVar("Candidate")

MOST_STEPS = 16
"""A climb or descent that goes on for longer has no end."""


@dataclass
class Curve:
    """Latencies measured at rates: for each rate one value per seed. math.inf: given up, above all limits."""

    points: dict[float, list[float]] = field(default_factory=dict)

    def sustained(self, limit: float, statistic: Callable[[list[float]], float] = max) -> float | None:
        """The highest measured rate at which, and at all lower measured ones, `statistic` over the seeds is at most `limit`.

        None if not even the lowest does. With max (the default) every seed has to hold it.
        """
        best = None
        for rate in sorted(self.points):
            if statistic(self.points[rate]) > limit:
                break
            best = rate
        return best

    def first_failing(self, limit: float) -> float | None:
        """The lowest measured rate at which some seed exceeds `limit`."""
        return min((rate for rate, values in self.points.items() if max(values) > limit), default=None)


def explore(measure: Callable[[float], list[float]], limits: Sequence[float], start: float, tolerance: float) -> Curve:
    """Measure until for each limit the highest rate that holds and the lowest that fails are within a factor 1 + `tolerance`.

    From `start` it goes down by halves until the tightest limit holds and up by doubling until the loosest fails, MOST_STEPS at
    most (a limit that then has no bracket is left so), then bisects on a logarithmic scale.
    """
    curve = Curve()

    def add(rate: float) -> None:
        if rate not in curve.points:
            curve.points[rate] = measure(rate)

    add(start)
    for step in range(1, MOST_STEPS):
        if curve.sustained(min(limits)) is not None:
            break
        add(start * 0.5**step)
    for step in range(1, MOST_STEPS):
        if curve.first_failing(max(limits)) is not None:
            break
        add(start * 2.0**step)
    for limit in sorted(limits, reverse=True):
        while True:
            low, high = curve.sustained(limit), curve.first_failing(limit)
            if low is None or high is None or high <= low * (1 + tolerance):
                break
            add(math.sqrt(low * high))
    return curve


def champion(
    candidates: Iterable[Candidate], holds: Callable[[Candidate, float], bool], start: float, step: float
) -> tuple[Candidate, float] | None:
    """The candidate that holds at the highest rate, and that rate within a factor `step`; None if none holds at `start`.

    One after the other has to hold one step above the best so far: most are out after one try. One that does climbs, by doubling
    first, then by single steps.
    """
    best: tuple[Candidate, float] | None = None
    for candidate in candidates:
        rate = start if best is None else best[1] * step
        for growth in (2.0, step):
            for _ in range(MOST_STEPS):
                if not holds(candidate, rate):
                    break
                best = (candidate, rate)
                rate *= growth
            if best is None or best[0] is not candidate:
                break
            rate = best[1] * step
    return best
