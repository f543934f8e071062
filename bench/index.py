"""What the prefix index and placement by prefixes cost as they grow. No model, no processes, no network.

    python -m bench.index [--engines 1000] [--blocks 10000000] [--room 20000000] [--out DIR]

The index: --engines engines with --blocks blocks in all. Each has one system prompt of 100 blocks that all have, stems that about
one engine of eight has, and blocks of its own; the index has room for --room blocks, and while more
than half of it is taken it marks what it finds. It is asked for prompts of 12,000 and 128,000 tokens (750 and 8,000 blocks):

    one has all         one engine has the prompt, no other one has any of it
    all have 100        the same behind the system prompt
    none has any        nobody knows it

Placement: the time from a router's Place to the Placement in the outbox of a real GlobalScheduler whose engines are all in the
middle of their work.

Times are CPU times of the one thread, so that other load on the machine hardly enters; looking at the clock is taken off. Bytes per
block are what the process's memory grew by.
"""

import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from bench import options
from bench.report import Cell, Report, command_line
from bench.times import COLUMNS, Times
from cluster.protocol import CacheChanges, Credit, EngineReport, EngineStats, Place, Placement, Withdraw
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from kv.index import PrefixIndex, unpack
from kv.names import NAME_BYTES

BLOCK_SIZE = 16
SEED = 7
SAMPLES = 300
"""Of each operation."""

# --- the prefix index -----------------------------------------------------------------------------------------------

LENGTHS = (750, 8000)
"""Of the prompts that are looked for, in blocks."""
CASES = ("one has all", "all have 100", "none has any")
_COMMON = 100
"""Blocks that all engines have."""
_STEM = 50
_NUM_STEMS = 64
_STEMS_OF_ONE = 8
LEAST = _COMMON + _STEM * _STEMS_OF_ONE + LENGTHS[0]
"""Blocks that an engine has at least, so that it can have a prompt of 750 of its own."""


def drawn(kind: int, number: int, count: int) -> bytes:
    """Names such as hashes are: always the same for the same two numbers."""
    return numpy.random.default_rng([SEED, kind, number]).bytes(count * NAME_BYTES)


@dataclass(frozen=True)
class Contents:
    """What the engines have."""

    num_engines: int
    each: int
    """Blocks of an engine."""
    most: int
    """Names that the index has room for: none of these are to be dropped."""

    @property
    def engines(self) -> list[str]:
        """Their names."""
        return [f"engine-{number}" for number in range(self.num_engines)]

    def own(self, engine: int) -> bytes:
        """The blocks that only this engine has, as one prompt."""
        return drawn(0, engine, self.each - _COMMON - _STEM * _STEMS_OF_ONE)

    def of(self, engine: int) -> Iterator[bytes]:
        """All blocks of an engine, as it would tell of them."""
        yield drawn(1, 0, _COMMON)
        for stem in numpy.random.default_rng([SEED, engine]).permutation(_NUM_STEMS)[:_STEMS_OF_ONE]:
            yield drawn(2, int(stem), _STEM)
        own, step = self.own(engine), 200 * NAME_BYTES
        for at in range(0, len(own), step):
            yield own[at : at + step]

    def prompt(self, case: str, engine: int, length: int, number: int) -> bytes:
        """The names of a prompt of so many blocks, or as many as there are; `engine` has it, unless nobody does."""
        match case:
            case "one has all":
                names = self.own(engine)
            case "all have 100":
                names = drawn(1, 0, _COMMON) + self.own(engine)
            case _:
                names = drawn(3, number, length)
        return names[: length * NAME_BYTES]

    def has(self, case: str, engine: int, length: int) -> dict[str, int]:
        """How many blocks each engine has of such a prompt."""
        if case == "none has any":
            return {}
        others = dict.fromkeys(self.engines, _COMMON) if case == "all have 100" else {}
        return {**others, f"engine-{engine}": length}


@dataclass
class IndexTimes:
    """What the prefix index costs."""

    filling: Times = field(default_factory=Times)
    """added() while it grows, all blocks of an engine at a time."""
    overlap: dict[tuple[int, str], Times] = field(default_factory=dict)
    """By length of the prompt and case."""
    changes: dict[str, Times] = field(default_factory=dict)
    num_names: int = 0
    grown_bytes: int | None = None
    """By which the process grew."""


def measure_index(contents: Contents) -> IndexTimes:
    """Fill an index, ask it, change it, and let some engines die."""
    found = IndexTimes()
    gc.collect()
    before = _resident()
    index = PrefixIndex(contents.most)
    for number, engine in enumerate(contents.engines):
        told = list(contents.of(number))
        with found.filling:
            for names in told:
                index.added(engine, names)
        found.filling.blocks += contents.each
    after = _resident()
    found.grown_bytes = None if before is None or after is None else after - before
    found.num_names = len(index)
    for length, case in itertools.product(LENGTHS, CASES):
        times = found.overlap[length, case] = Times()
        for number in range(SAMPLES):
            engine_number = _some(number, contents)
            prompt = unpack(contents.prompt(case, engine_number, length, number))
            with times:
                answer = index.overlap(prompt)
            times.blocks += len(prompt)
            if answer != contents.has(case, engine_number, len(prompt)):
                raise RuntimeError(f"the index does not know who has what: {case}")
    found.changes = _change(index, contents)
    return found


def _change(index: PrefixIndex, contents: Contents) -> dict[str, Times]:
    kinds = ("added", "removed", "expect", "tick that drops the expectations", "forget", "tick that sweeps")
    times = {kind: Times() for kind in kinds}
    now = 0.0
    for number in range(SAMPLES):
        engine, names = contents.engines[_some(number, contents)], drawn(4, number, LENGTHS[0])
        with times["added"]:
            index.added(engine, names)
        with times["removed"]:
            index.removed(engine, names)
        prompt = unpack(names)
        with times["expect"]:
            index.expect(engine, prompt, now)
        for kind in ("added", "removed", "expect"):
            times[kind].blocks += len(prompt)
    with times["tick that drops the expectations"]:
        index.tick(now + 100)
    times["tick that drops the expectations"].blocks += times["expect"].blocks
    for engine in contents.engines[:: max(1, contents.num_engines // 10)]:
        with times["forget"]:
            index.forget(engine)
        times["forget"].blocks += contents.each
    for _ in range(SAMPLES):  # of more that are needed, where there is much
        with times["tick that sweeps"]:
            index.tick(now + 100)
    return times


def _resident() -> int | None:
    """Bytes of memory that this process has, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _some(number: int, contents: Contents) -> int:
    """An engine, another one each time, as far as there are."""
    return number * 7 % contents.num_engines


# --- placement ------------------------------------------------------------------------------------------------------

_TOKENS = 1 << 20
_PERIOD_S = 0.01
"""Between two requests, on the scheduler's clock."""


@dataclass
class Placed:
    """Requests of one kind."""

    times: Times = field(default_factory=Times)
    at_holder: int = 0
    """Of these, placed at the engine that has the whole prompt."""


class Cluster:
    """A scheduler whose engines all have something to do, and room for more."""

    def __init__(self, contents: Contents) -> None:
        config = SchedulerConfig(placement="prefix", kv_pull=True, max_index_blocks=contents.most, silence_s=1e9)
        self._scheduler = GlobalScheduler(config, now=0.0)
        self._contents = contents
        self._random = numpy.random.default_rng(SEED)
        self._requests = 0
        self._reports = 0
        for number, engine in enumerate(contents.engines):
            self._scheduler.receive(self._report(engine), self._now)
            changes = [(True, names) for names in contents.of(number)]
            self._scheduler.receive(CacheChanges(engine=engine, epoch=1, number=0, changes=changes, whole=True), self._now)
        self._scheduler.take_messages()

    @property
    def _now(self) -> float:
        return self._requests * _PERIOD_S

    def _report(self, engine: str, accepted: Sequence[tuple[str, int]] = ()) -> EngineReport:
        self._reports += 1
        running, backlog = self._random.integers(0, (32, 4000)).tolist()
        return EngineReport(
            engine=engine,
            epoch=1,
            number=self._reports,
            address=f"{engine}!",
            ready=True,
            reason="",
            credit=Credit(_TOKENS // 4, 64),
            capacity=Credit(_TOKENS, 256),
            max_sequence_tokens=_TOKENS,
            accepted=list(accepted),
            stats=EngineStats(running=running, backlog=backlog),
            metrics=[],
            cache_changes=1,
        )

    def _ask(self, names: bytes, num_tokens: int) -> Place:
        self._requests += 1
        return Place(
            request=f"request-{self._requests}",
            attempt=0,
            reply_to="router",
            num_tokens=num_tokens,
            longest=num_tokens,
            sequences=1,
            arrival=self._now,
            names=names,
        )

    def place(self, case: str, length: int) -> Placed:
        """Place some requests of one kind, one at a time; each is accepted."""
        found = Placed()
        for number in range(SAMPLES):
            holder = _some(number, self._contents)
            names = self._contents.prompt(case, holder, length, self._requests)
            place = self._ask(names, len(names) // NAME_BYTES * BLOCK_SIZE + 1)
            with found.times:
                self._scheduler.receive(place, self._now)
                messages = self._scheduler.take_messages()
            found.times.blocks += len(names) // NAME_BYTES
            (answer,) = [sent.message for sent in messages]
            if not isinstance(answer, Placement):
                raise RuntimeError(f"a request was not placed: {answer}")
            found.at_holder += answer.engine == f"engine-{holder}"
            self._scheduler.receive(self._report(answer.engine, [(place.request, 0)]), self._now)
            self._scheduler.tick(self._now)
            self._scheduler.take_messages()
        return found

    def reports(self, length: int) -> Times:
        """The engines' reports while the first request of the queue is too large for what is free anywhere."""
        times = Times()
        waits = self._ask(self._contents.prompt("all have 100", 0, length, 0), _TOKENS // 2)
        self._scheduler.receive(waits, self._now)
        for number in range(SAMPLES):
            report = self._report(f"engine-{_some(number, self._contents)}")
            with times:
                self._scheduler.receive(report, self._now)
        self._scheduler.receive(Withdraw(waits.request, 0), self._now)
        if self._scheduler.take_messages():
            raise RuntimeError("a request was placed where there is no room")
        return times


# --- command line ---------------------------------------------------------------------------------------------------


def tell_index(report: Report, contents: Contents) -> None:
    """Measure the index, and say what was found."""
    found = measure_index(contents)
    blocks = contents.num_engines * contents.each
    report.say(f"{contents.num_engines} engines with {contents.each} blocks each, {found.num_names} names in all")
    if found.grown_bytes is not None:
        report.say(f"{found.grown_bytes / 2**20:.0f} MiB, {found.grown_bytes / blocks:.1f} bytes per block of an engine")
    report.record("index", {"blocks": blocks, "names": found.num_names, "bytes": found.grown_bytes})
    rows = [[f"overlap, {length}: {case}", max(times.us), *times.row()] for (length, case), times in found.overlap.items()]
    rows += [[name, max(times.us), *times.row()] for name, times in {"filling, by engines": found.filling, **found.changes}.items()]
    report.table(f"prefix index of {blocks} blocks", ["", "longest, us", *COLUMNS], rows)


def tell_placement(report: Report, contents: Contents) -> None:
    """Measure placement, and say what was found."""
    cluster = Cluster(contents)
    rows: list[list[Cell]] = []
    for length, case in itertools.product(LENGTHS, CASES):
        placed = cluster.place(case, length)
        share = None if case == "none has any" else f"{placed.at_holder / SAMPLES:.0%}"
        rows.append([f"{length}: {case}", placed.times.median / 1e3, placed.times.p99 / 1e3, share])
    for length in LENGTHS:
        times = cluster.reports(length)
        rows.append([f"a report while a request of {length} waits", times.median / 1e3, times.p99 / 1e3, None])
    report.table(
        f"placement among {contents.num_engines} engines, by blocks of the prompt",
        ["", "median, ms", "p99, ms", "at the holder"],
        rows,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--engines", type=options.positive, default=1000, help="(default: %(default)s)")
    parser.add_argument("--blocks", type=options.positive, default=10_000_000, help="of all engines (default: %(default)s)")
    parser.add_argument("--room", type=options.positive, help="of the index, in blocks (default: more than twice --blocks)")
    arguments = parser.parse_args(argv)
    room = arguments.room or max(SchedulerConfig.max_index_blocks, 21 * arguments.blocks // 10)
    contents = Contents(arguments.engines, arguments.blocks // arguments.engines, room)
    if contents.each < LEAST:
        parser.error(f"--blocks {arguments.blocks}: that is less than {LEAST} for each of {arguments.engines} engines")
    report = Report("index", command_line(argv))
    tell_index(report, contents)
    tell_placement(report, contents)
    report.save(arguments.out)


if __name__ == "__main__":
    main()
