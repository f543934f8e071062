"""Serving load over tp x pp x engines on a Ray cluster, after a check that its ranks exchange and compute what they should.

    python -m bench.cluster [MODEL] [--grids 1x1x1,2x1x1,1x2x1,2x2x1,1x1x2] [--concurrency 1,16,64] [--device auto] [--out DIR]

It is meant for `ray job submit` (docs/deployment.md) and uses the cluster that RAY_ADDRESS names, as Ray sets it in a job; without
it, each part starts a Ray of its own on this machine. Three parts, one after the other:

1. Every exchange between ranks on each tp x pp there is (bench.collectives). A wrong value or a time-out ends it all: exit code 1.
2. Each grid is deployed and asked the same requests, greedy and with seeds, some longer than an iteration. In fp32 other tokens
   than the first grid's end it all with exit code 1; in half precision they are counted.
3. Each grid is deployed as `rayline serve` does and loaded over HTTP by closed loops of several numbers of streams.

Rates are those of a whole run, from the first request to the last token. TTFT and ITL are what a client sees: from asking to the
first token, and between deliveries, each of one or more tokens. bubble is 1 - stages' computing time / (stages x time) by the
engines' own account: what a pipeline wastes and, with few streams, what the load leaves idle. On CUDA with pp > 1 it is not shown,
since only the last stage waits for its device. client CPU is what this program itself took of one core: near 1 it is what was
measured.
"""

import argparse
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click

from bench import options
from bench.clients import Run, body, run
from bench.collectives import COLUMNS, ExchangeError
from bench.counters import PREEMPTED, STAGES, Counters, settled
from bench.deployed import DeployError, config_of, deployed, used_error
from bench.grids import Grid, parse_grids, parse_range, random_shapes
from bench.report import Cell, Report, command_line
from bench.same_tokens import compare, requests
from bench.workload import Job, Shape, dropped, jobs, read_trace
from cluster.cli import protect_ray
from cluster.config import Config, ConfigError
from cluster.model import DEMO_MODEL, ModelFiles, open_model
from cluster.ports import free_ports

GRIDS = "1x1x1,2x1x1,1x2x1,2x2x1,1x1x2"
LOAD_COLUMNS = [
    "tp x pp x engines", "streams", "requests", "failed", "output tok/s", "a rank", "requests/s", "TTFT ms p50", "TTFT p99",
    "ITL ms p50", "ITL p99", "bubble", "tokens/iteration", "preempted", "client CPU",
]  # fmt: skip


class CheckError(RuntimeError):
    """What was checked does not hold."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0, 1 where a check or a request failed, 2 for what the user can mend."""
    arguments, parser = _arguments(argv)
    signal.signal(signal.SIGTERM, _stop)
    protect_ray(os.environ)
    try:
        bench = Bench(arguments, Report("cluster", [shlex.quote(word) for word in command_line(argv)]))
    except (ConfigError, click.UsageError, ValueError) as error:
        parser.error(used_error(error))
    try:
        return bench.run()
    except (ExchangeError, CheckError, DeployError, ConfigError) as error:
        bench.report.say(f"FAILED: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        bench.report.save(arguments.out)


class Bench:
    """One run of the command."""

    def __init__(self, arguments: Namespace, report: Report) -> None:
        """Raises ValueError (ConfigError among them) or click.UsageError where arguments make no sense."""
        self._arguments, self.report = arguments, report
        self._device = arguments.device
        self._configs: dict[Grid, Config] = {grid: config_of(self._words(grid)) for grid in arguments.grids}
        self._config = next(iter(self._configs.values()))
        self._files: ModelFiles = open_model(self._config.model, self._config.revision)
        self._max_model_len = self._config.max_model_len or self._files.shape.max_position_embeddings
        self._shapes = self._workload()
        half = self._config.dtype in ("bfloat16", "float16") or (
            self._config.dtype == "auto" and self._files.shape.dtype != "float32"
        )
        self._must_agree = not half

    def run(self) -> int:
        """All parts; 1 where some request failed."""
        self._prepare()
        signal.signal(signal.SIGTERM, _stop)  # Ray put its own in its place, and took that away when it ended
        if not self._arguments.skip_check:
            self._same_tokens()
        return self._load()

    # --- what is asked for ------------------------------------------------------------------------------------------

    def _words(self, grid: Grid) -> list[str]:
        """The command line of `rayline serve` for a grid."""
        words = [self._arguments.model, *shlex.split(self._arguments.serve)]
        words += ["--tp", str(grid.tp), "--pp", str(grid.pp), "--engines", str(grid.engines), "--device", self._device]
        if "RAY_ADDRESS" not in os.environ:
            words += ["--host", "127.0.0.1"]
        return [*words, "--port", str(self._arguments.port or free_ports(1)[0]), "--grpc-port", "0"]

    def _workload(self) -> list[Shape]:
        """As many as the longest run takes; shorter runs take the first of them."""
        most = max(self._count(streams) for streams in self._arguments.concurrency)
        if self._arguments.trace is None:
            shapes = random_shapes(most, self._arguments.prompt_tokens, self._arguments.output_tokens)
            source = (
                f"prompts of {_range(self._arguments.prompt_tokens)}, outputs of {_range(self._arguments.output_tokens)} tokens"
            )
        else:
            shapes, source = read_trace(self._arguments.trace), self._arguments.trace.name
        fitting = dropped(shapes, self._max_model_len)[:most]
        if not fitting:
            raise ValueError(f"none of {len(shapes)} requests fits the model's {self._max_model_len} tokens")
        self.report.say(f"{source}; {options.summary(fitting)}")
        return fitting

    def _count(self, streams: int) -> int:
        return min(int(self._arguments.requests), streams * int(self._arguments.per_stream))

    # --- parts ------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Look at the cluster, and check the exchanges. Raises ConfigError, ExchangeError."""
        from bench.ranks import attached, check_mesh

        grids = list(self._configs)
        with attached(max(grid.mesh.size for grid in grids)) as resources:
            if self._device == "auto":
                self._device = "cuda" if resources.get("GPU", 0) else "cpu"
            self.report.say(f"device {self._device}; Ray counts {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")
            self.report.record("device", self._device)
            self._look_at_resources(resources)
            meshes = list(dict.fromkeys(grid.mesh for grid in grids if grid.mesh.size > 1))
            if self._arguments.skip_check or not meshes:
                return
            rows: list[list[Cell]] = []
            try:
                for mesh in meshes:
                    self.report.say(f"checking exchanges over {mesh.tp}x{mesh.pp} ranks")
                    rows += [measured.row for measured in check_mesh(mesh, self._device)]
            finally:
                name = "NCCL" if self._device == "cuda" else "gloo"
                if rows:
                    self.report.table(f"exchanges between ranks over {name}: values right, and", COLUMNS, rows)

    def _look_at_resources(self, resources: dict[str, float]) -> None:
        """Say what will have to wait. It is no error: an autoscaler may bring more."""
        kind = "GPU" if self._device == "cuda" else "CPU"
        if kind == "CPU" and "RAY_ADDRESS" not in os.environ:
            return  # a Ray of our own gives out as many as are asked for
        each = 1 if kind == "GPU" else self._config.threads or 1
        for grid in self._configs:
            if (wanted := grid.ranks * each) > resources.get(kind, 0):
                self.report.say(
                    f"{grid} takes {wanted} {kind}s, the cluster has {resources.get(kind, 0):g} so far: it will wait for more"
                )

    def _same_tokens(self) -> None:
        """Raises CheckError where tokens must agree and don't."""
        asked = requests(self._max_model_len, self._config.max_num_batched_tokens, self._files.shape.vocab_size)
        expected: list[list[int]] = []
        rows: list[list[Cell]] = []
        for grid in self._configs:
            self.report.say(f"{grid}: asking for tokens to compare")
            with deployed(self._words(grid)) as url:
                answered = run(url, asked, len(asked))
            if answered.failed:
                raise CheckError(f"tokens on {grid}: {answered.failed[0].error}")
            tokens = [answer.tokens for answer in answered.answers]
            expected = expected or tokens
            found = compare(tokens, expected)
            rows.append(
                [str(grid), found.requests, found.positions, found.requests_differing, found.differing, found.first or None]
            )
            if found.differing and self._must_agree:
                break
        columns = ["tp x pp x engines", "requests", "tokens", "requests that differ", "tokens that differ", "first"]
        self.report.table(f"tokens against those of {next(iter(self._configs))}", columns, rows)
        if self._must_agree and found.differing:
            raise CheckError(f"{grid} gives other tokens than {next(iter(self._configs))} in fp32: {found.first}")

    def _load(self) -> int:
        rows: list[list[Cell]] = []
        runs: list[dict[str, Any]] = []
        errors: list[str] = []
        try:
            for grid in self._configs:
                try:
                    for streams, done, counted in self._loaded(grid):
                        rows.append(row(grid, streams, done, counted, self._shows_bubble(grid)))
                        runs.append(dict(zip(LOAD_COLUMNS, rows[-1], strict=True)) | _raw(done, counted))
                        self.report.say(f"{grid}, {streams} streams: {done.output_tokens / done.seconds:.1f} output tokens/s")
                        errors += [f"{grid}: {answer.error}" for answer in done.failed]
                except (DeployError, OSError, RuntimeError) as error:  # the other grids may do
                    self.report.say(f"{grid} is left out: {error}")
                    errors.append(f"{grid} is left out")
        finally:
            self.report.record("runs", runs)
            if rows:
                self.report.table(f"{self._config.model_name} under load", LOAD_COLUMNS, rows)
        if errors:
            self.report.say(f"FAILED: {errors[0]}" + (f", and {len(errors) - 1} more" if len(errors) > 1 else ""))
        return 1 if errors else 0

    def _loaded(self, grid: Grid) -> Iterator[tuple[int, Run, Counters]]:
        """Deploys it and yields each number of streams, what their clients saw and what the cluster counted meanwhile."""
        with deployed(self._words(grid)) as url:
            self._warm_up(url)
            before = settled(url)
            for streams in self._arguments.concurrency:
                done = run(url, [body(job) for job in self._jobs(streams)], streams)
                after = settled(url)
                yield streams, done, after.since(before)
                before = after

    def _jobs(self, streams: int) -> list[Job]:
        """The same for all grids; other tokens for another number of streams, so that no run finds its prompts cached."""
        return jobs(self._shapes[: self._count(streams)], self._files.shape.vocab_size, salt=streams)

    def _warm_up(self, url: str) -> None:
        streams = max(self._arguments.concurrency)
        made = jobs([Shape(min(16, self._max_model_len - 8), 8)] * streams, self._files.shape.vocab_size, salt=0)
        run(url, [body(job) for job in made], streams)

    def _shows_bubble(self, grid: Grid) -> bool:
        return self._device == "cpu" or grid.pp == 1


def row(grid: Grid, streams: int, done: Run, counted: Counters, shows_bubble: bool) -> list[Cell]:
    """For a table with LOAD_COLUMNS."""
    rate = done.output_tokens / done.seconds
    return [
        str(grid),
        streams,
        len(done.answers),
        len(done.failed),
        rate,
        rate / grid.ranks,
        (len(done.answers) - len(done.failed)) / done.seconds,
        done.first_token_ms(50),
        done.first_token_ms(99),
        done.inter_token_ms(50),
        done.inter_token_ms(99),
        counted.idle_share(grid.pp * grid.engines, done.seconds) if shows_bubble else None,
        counted.tokens_per_iteration,
        int(counted.totals[PREEMPTED]),
        done.cpu_s / done.seconds,
    ]


def _raw(done: Run, counted: Counters) -> dict[str, Any]:
    return {"seconds": done.seconds, "output_tokens": done.output_tokens, "stage_seconds": counted.totals[STAGES]}


def _range(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]}" if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


def _stop(number: int, frame: FrameType | None) -> None:
    """`ray job stop`: leave by the way that takes down what was deployed."""
    sys.exit(128 + number)


def _arguments(argv: Sequence[str] | None) -> tuple[Namespace, argparse.ArgumentParser]:
    parser = options.parser(__doc__)
    parser.add_argument(
        "model", nargs="?", default=str(DEMO_MODEL), metavar="MODEL", help="directory or hub id (default: the demo)"
    )
    parser.add_argument("--grids", type=parse_grids, default=parse_grids(GRIDS), help=f"tp x pp x engines (default: {GRIDS})")
    parser.add_argument("--concurrency", type=options.numbers, default=[1, 16, 64], help="streams of a run (default: 1,16,64)")
    parser.add_argument("--requests", type=options.positive, default=256, help="of a run, at most (default: %(default)s)")
    parser.add_argument("--per-stream", type=options.positive, default=8, help="of a run, at most (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=parse_range, default=(32, 256), help="N, or drawn from LOW:HIGH (default: 32:256)")
    parser.add_argument("--output-tokens", type=parse_range, default=(16, 128), help="N, or drawn from LOW:HIGH (default: 16:128)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="lengths from an Azure CSV or Mooncake JSONL instead")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs if the cluster has some")
    parser.add_argument("--skip-check", action="store_true", help="neither exchanges nor tokens are checked")
    parser.add_argument("--serve", default="", metavar="WORDS", help='more options of `rayline serve`: --serve="--kv-memory 4GiB"')
    parser.add_argument("--port", type=options.positive, help="of HTTP (default: a free one)")
    return parser.parse_args(argv), parser


if __name__ == "__main__":
    sys.exit(main())
