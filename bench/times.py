"""Times of operations that take microseconds."""

import functools
import itertools
import time
from statistics import median, quantiles

from bench.report import Cell


class Times:
    """Of one operation, done several times: `with times: do it`."""

    def __init__(self) -> None:
        self.us: list[float] = []
        self.blocks = 0
        """That all of these were about, for the caller to count."""
        self._began = 0

    def __enter__(self) -> None:
        self._began = time.thread_time_ns()

    def __exit__(self, *error: object) -> None:
        self.us.append(max(0, time.thread_time_ns() - self._began - _looking_ns()) / 1e3)

    @property
    def median(self) -> float:
        """Microseconds."""
        return median(self.us)

    @property
    def p99(self) -> float:
        """Microseconds."""
        return quantiles(self.us, n=100, method="inclusive")[98] if len(self.us) > 1 else self.us[0]

    def row(self) -> list[Cell]:
        """The cells of COLUMNS."""
        return [self.median, self.p99, self.blocks / len(self.us), sum(self.us) / self.blocks if self.blocks else None]


@functools.cache
def _looking_ns() -> int:
    """What looking at the clock takes."""
    times = [time.thread_time_ns() for _ in range(1001)]
    return int(median(after - before for before, after in itertools.pairwise(times)))


COLUMNS = ["median, us", "p99, us", "blocks", "us / block"]
"""Blocks: of a request, on average."""
