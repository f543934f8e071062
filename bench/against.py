"""Our engine against others on this machine's CPU, each in an environment and a process of its own.

    python -m bench.peers.install --model MODEL_DIR
    python -m bench.against MODEL_DIR [MODEL_DIR ...] [--workloads offline,single,prefix] [--repetitions 5] [--threads 2]
    python -m bench.against --online MODEL_DIR [MODEL_DIR ...]

    offline   64 requests at once, prompts of 32 to 256 tokens, outputs of 16 to 128: output tokens per second
    single    one request, 128 tokens and 128 more: milliseconds for each output token, the prefill included
    prefix    64 requests at once, 512 tokens that all share and 32 of their own, 32 output tokens, prefix caches on

Greedy, end-of-sequence ignored, token ids in and out. All sides run in turn, repetition by repetition, another one first each time,
with other tokens each time; whoever is not asked is stopped. Sides compute in the dtype that is fastest for them here, and say
which. A ratio is the median of the pairwise ones: a peer's time to ours in the same repetition. Runs in which other processes took
more than 8 % of the machine are left out of medians where half are quiet. Where the memory does not hold all sides, the peers
run a few at a time, ours beside them each time (--at-a-time).

--online: 16 streams over HTTP that share 64 requests of the offline shape; `rayline serve` and vLLM's OpenAI server are started and
ended in turn.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from bench import options
from bench.peers import Peer, PeerError
from bench.peers.known import FOLDER, KNOWN, Setting, start
from bench.peers.measured import QUIET, Pair, Run, counted, measuring, median_ratio, median_seconds
from bench.peers.online import SERVERS, compare_servers
from bench.report import Cell, Report, command_line
from bench.workload import Shape, jobs, uniform_shapes
from cluster.model import open_model
from cluster.shape import ModelShape

OURS = "rayline"
SLOTS = 64
SHARED, OWN, OUTPUT = 512, 32, 32
WARM_UP_TOKENS = 8
_MEMORY_SHARE, _PROCESS_BYTES = 0.85, 2**30


@dataclass(frozen=True)
class Workload:
    """What is asked at once, and how it is told."""

    name: str
    shapes: Sequence[Shape]
    unit: str = "output tok/s"
    prefix_cache: bool = False

    @property
    def output_tokens(self) -> int:
        """Of one run."""
        return sum(shape.output_tokens for shape in self.shapes)

    def figure(self, seconds: float) -> float:
        """A run's time in the workload's unit."""
        return self.output_tokens / seconds if self.unit == "output tok/s" else 1000 * seconds / self.output_tokens


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("offline", uniform_shapes(64)),
        Workload("single", [Shape(128, 128)], unit="ms/output token"),
        Workload("prefix", [Shape(SHARED + OWN, OUTPUT, blocks=(0,), block_tokens=SHARED)] * 64, prefix_cache=True),
    )
}


@dataclass
class Side:
    """A running engine."""

    name: str
    peer: Peer

    @property
    def title(self) -> str:
        """What it says that it is."""
        said = self.peer.said
        return f"{said.get('name', self.name)} ({said.get('computes', 'its own dtype')})"

    def run(self, workload: Workload, vocab_size: int, salt: int) -> Run:
        """One run, stopped before and after. Raises PeerError."""
        asked = jobs(workload.shapes, vocab_size, salt)
        self.peer.resume()
        with measuring() as run:
            run.outputs = self.peer.generate(asked)
        self.peer.pause()
        if [len(tokens) for tokens in run.outputs] != [job.output_tokens for job in asked]:
            raise PeerError("it did not give the number of tokens it was asked for")
        return run


@dataclass
class Results:
    """Of one model and workload."""

    workload: Workload
    ours: list[Run] = field(default_factory=list)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    """By peer."""
    titles: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The peer that takes the least time of ours."""
        return min(self.pairs, key=lambda name: median_ratio(self.pairs[name]), default=None)

    def rows(self) -> list[list[Cell]]:
        """For COLUMNS."""
        rows = [self._row(OURS, self.ours, None, None)]
        for name, pairs in self.pairs.items():
            last = pairs[-1]
            same = sum(a == b for a, b in zip(last.ours.outputs, last.theirs.outputs, strict=True))
            said = f"{same}/{len(last.ours.outputs)}"
            rows.append(self._row(name, [pair.theirs for pair in pairs], median_ratio(pairs), said))
        return rows

    def _row(self, name: str, runs: Sequence[Run], ratio: float | None, same: str | None) -> list[Cell]:
        count = counted(runs)
        others = max(run.others for run in count)
        figures = [self.workload.figure(median_seconds(runs)), self.workload.figure(min(run.seconds for run in count))]
        quiet = f"{sum(run.quiet for run in runs)}/{len(runs)}"
        times: Cell = None if ratio is None else f"{ratio:.2f}x"
        return [self.titles.get(name, name), *figures, median_seconds(runs), times, quiet, f"{others:.0%}", same]

    def verdict(self) -> str:
        """Ours against the best peer, in a line."""
        if self.best is None:
            return f"{self.workload.name}: no peer ran"
        pairs = self.pairs[self.best]
        ratio, quiet = median_ratio(pairs), sum(pair.quiet for pair in pairs)
        return (
            f"{self.workload.name}: {ratio:.2f}x the speed of the best peer, {self.titles.get(self.best, self.best)} "
            f"(median of pairwise ratios; {quiet} of {len(pairs)} pairs are quiet)"
        )

    def columns(self) -> list[str]:
        """Of its table."""
        return ["", self.workload.unit, "best", "seconds", "its time / ours", "quiet runs", "others took at most", "same outputs"]


def setting(workloads: Sequence[Workload], threads: int) -> Setting:
    """What sides are started with for workloads of one kind: room for all requests of any of them at once."""
    longest = max(shape.total for workload in workloads for shape in workload.shapes) + 1
    tokens = max(sum(shape.total for shape in workload.shapes) for workload in workloads)
    return Setting(SLOTS, longest, tokens, threads, workloads[0].prefix_cache)


def at_a_time(model: Path, shape: ModelShape, chosen: Setting, available: int) -> int:
    """Peers whose processes fit the memory beside ours, at least one: fp32 weights and KV each. A shared prefix is kept once by
    those that share it: half is reckoned."""
    weights = 2 * sum(path.stat().st_size for path in model.glob("*.safetensors"))
    kv = chosen.kv_tokens * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * 4
    side = weights + (kv // 2 if chosen.prefix_cache else kv) + _PROCESS_BYTES
    return max(1, int(_MEMORY_SHARE * available) // side - 1)


def available_bytes() -> int:
    """Memory that is free or can be freed."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


class Comparison:
    """All workloads on one model."""

    def __init__(self, model: Path, arguments: Namespace, say: Callable[[str], None]) -> None:
        self._model, self._arguments, self._say = model, arguments, say
        self._shape = open_model(str(model)).shape

    def run(self) -> list[Results]:
        """By workload, in their order. Raises PeerError where ours does not run."""
        results = [Results(WORKLOADS[name]) for name in self._arguments.workloads]
        for cached in (False, True):
            if some := [each for each in results if each.workload.prefix_cache == cached]:
                chosen = setting([each.workload for each in some], self._arguments.threads)
                names: list[str] = list(self._arguments.only)
                most = self._arguments.at_a_time or at_a_time(self._model, self._shape, chosen, available_bytes())
                for first in range(0, max(1, len(names)), most):
                    self._together(names[first : first + most], chosen, some)
        return results

    def _together(self, names: Sequence[str], chosen: Setting, results: Sequence[Results]) -> None:
        with contextlib.ExitStack() as stack:
            sides = [side for name in (OURS, *names) if (side := self._started(name, chosen, stack)) is not None]
            for each in results:
                each.titles |= {side.name: side.title for side in sides}
                self._interleaved(sides, each)

    def _started(self, name: str, chosen: Setting, stack: contextlib.ExitStack) -> Side | None:
        """None, for a reason that is said, where a peer does not start. Raises PeerError for ours."""
        with self._left_out(name):
            side = Side(name, start(name, self._arguments.peers, self._model, chosen))
            stack.callback(side.peer.close)
            self._say(f"started: {side.title}, prefix cache {'on' if chosen.prefix_cache else 'off'}")
            side.peer.pause()
            return side
        return None

    def _interleaved(self, sides: list[Side], results: Results) -> None:
        workload = results.workload
        short = [dataclasses.replace(s, output_tokens=min(WARM_UP_TOKENS, s.output_tokens)) for s in workload.shapes]
        for repetition in range(self._arguments.repetitions + 1):
            asked = workload if repetition else dataclasses.replace(workload, shapes=short)
            runs: dict[str, Run] = {}
            turn = repetition % len(sides)
            for side in [*sides[turn:], *sides[:turn]]:
                with self._left_out(side.name):
                    runs[side.name] = side.run(asked, self._shape.vocab_size, repetition)
            sides[:] = [side for side in sides if side.name in runs]
            if repetition:
                results.ours.append(runs[OURS])
                for side in sides[1:]:
                    results.pairs.setdefault(side.name, []).append(Pair(runs[OURS], runs[side.name]))
                told = ", ".join(f"{name} {run.seconds:.2f}{'' if run.quiet else ' (not quiet)'}" for name, run in runs.items())
                self._say(f"  {workload.name} {repetition}, seconds: {told}")

    @contextlib.contextmanager
    def _left_out(self, name: str) -> Iterator[None]:
        """The comparison goes on without a peer that fails; not without ours."""
        try:
            yield
        except PeerError as error:
            if name == OURS:
                raise
            self._say(f"left out: {name}: {error}")


def compare(arguments: Namespace, report: Report) -> None:
    """All models, with a table for each workload."""
    for model in arguments.models:
        report.say(f"\n{model}")
        for results in Comparison(model, arguments, report.say).run():
            title = f"{model.name}, {results.workload.name}: {options.summary(results.workload.shapes)}"
            report.table(title, results.columns(), results.rows())
            report.say(results.verdict())
            runs = {OURS: results.ours, **{name: [p.theirs for p in pairs] for name, pairs in results.pairs.items()}}
            told = {name: [{"seconds": run.seconds, "others": run.others} for run in some] for name, some in runs.items()}
            ratios = {name: [pair.ratio for pair in pairs] for name, pairs in results.pairs.items()}
            report.record(f"{model.name} {results.workload.name}", {"titles": results.titles, "runs": told, "ratios": ratios})


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument's type: a,b of `known`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return parse


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave by the way that ends all sides."""
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 where our side does not run."""
    parser = options.parser(__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--workloads", type=names_of(list(WORKLOADS)), default=list(WORKLOADS), help="(default: all)")
    parser.add_argument("--only", type=names_of(list(KNOWN)), default=list(KNOWN), metavar="PEERS", help="a,b (default: all)")
    parser.add_argument("--repetitions", type=options.positive, default=5, help="(default: %(default)s)")
    parser.add_argument("--peers", type=Path, default=FOLDER, metavar="DIR", help="where they are (default: %(default)s)")
    parser.add_argument("--threads", type=options.positive, default=os.cpu_count() or 1, help="(default: the cores there are)")
    parser.add_argument("--at-a-time", type=options.positive, help="peers that run beside ours (default: what the memory holds)")
    parser.add_argument("--online", action="store_true", help=f"over HTTP instead: {' against '.join(SERVERS)}")
    parser.add_argument("--streams", type=options.positive, default=16, help="with --online (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for model in arguments.models:
        if not (model / "config.json").is_file():
            parser.error(f"{model} is no Hugging Face directory: it has no config.json")
    signal.signal(signal.SIGTERM, _stop)
    report = Report("against", command_line(argv))
    report.say(f"{arguments.threads} threads; a quiet run is one in which others took less than {QUIET:.0%} of the machine")
    failed = False
    try:
        if arguments.online:
            report.name = "against-online"
            compare_servers(arguments, report)
        else:
            compare(arguments, report)
    except PeerError as error:
        report.say(f"FAILED: {error}")
        failed = True
    report.save(arguments.out)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
