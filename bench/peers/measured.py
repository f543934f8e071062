"""What was measured of sides that take turns: runs, how much of the machine others took meanwhile, medians and ratios."""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

QUIET = 0.08
"""Others took less of the machine than this share in a quiet run."""


@dataclass
class Run:
    """One run of one side."""

    seconds: float = 0.0
    others: float = 0.0
    """Share of the machine's CPU time that processes other than ours and the sides' took, 0 to 1."""
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def quiet(self) -> bool:
        """Whether it counts where enough others do."""
        return self.others < QUIET


@dataclass(frozen=True)
class Pair:
    """A run of ours and one of a peer in the same repetition."""

    ours: Run
    theirs: Run

    @property
    def quiet(self) -> bool:
        """Both are."""
        return self.ours.quiet and self.theirs.quiet

    @property
    def ratio(self) -> float:
        """Their time to ours: above 1 where ours is faster."""
        return self.theirs.seconds / self.ours.seconds


def enough(quiet: int, runs: int) -> bool:
    """Whether so many quiet ones stand for all: half of them, and two unless there is but one."""
    return quiet >= min(runs, max(2, (runs + 1) // 2))


def counted(runs: Sequence[Run]) -> list[Run]:
    """The quiet ones, or all where too few are."""
    quiet = [run for run in runs if run.quiet]
    return quiet if enough(len(quiet), len(runs)) else list(runs)


def median_ratio(pairs: Sequence[Pair]) -> float:
    """Of the pairs that are quiet, or of all where too few are."""
    quiet = [pair for pair in pairs if pair.quiet]
    return statistics.median(pair.ratio for pair in (quiet if enough(len(quiet), len(pairs)) else pairs))


def median_seconds(runs: Sequence[Run]) -> float:
    """Of the runs that count."""
    return statistics.median(run.seconds for run in counted(runs))


@contextmanager
def measuring() -> Iterator[Run]:
    """Yields a Run whose seconds and others are known when the context ends."""
    run = Run()
    own, busy, began = family_cpu_s(), busy_cpu_s(), time.perf_counter()
    yield run
    run.seconds = time.perf_counter() - began
    run.others = others_share(family_cpu_s() - own, busy_cpu_s() - busy, run.seconds, os.cpu_count() or 1)


def others_share(own_s: float, busy_s: float, seconds: float, cores: int) -> float:
    """Of the machine, of CPU seconds that this process with its descendants and all processes used in a time."""
    return max(0.0, busy_s - own_s) / (seconds * cores)


def family_cpu_s() -> float:
    """CPU seconds of this process and its descendants, those that have ended and were waited for included."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:  # gone meanwhile
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    family = [os.getpid()]
    for pid in family:
        family += children.get(pid, ())
    return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def busy_cpu_s() -> float:
    """CPU seconds that all cores were busy, what the host's other guests stole included."""
    user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
