"""What the prefix cache gains where prompts begin alike, and what it costs where they don't.

    python -m bench.prefix [MODEL] [--repetitions 8] [--parts shared nothing host choices]

Four measurements on the real model, cache on against off in turn, repetition by repetition, prompts new each time:

- 64 requests at once that share their first 512 tokens, 32 output tokens each: output tokens per second;
- 64 requests that share nothing, a quarter of them at a time in a pool for half of them, so that old prefixes are evicted all the
  time and nobody is preempted: CPU seconds, all at once; and the 99th percentile of the time to first token when they arrive at
  random at 70 % of that throughput. The sides take turns with every iteration, so that slow moments of the machine hit both;
- 16 prompts of 512 tokens, each asked with four endings in turn, 16 output tokens each, in a pool for a quarter of them: output
  tokens per second, with host memory for what is evicted and without;
- one prompt of 512 tokens with n = 8 against n = 1: the KV slots at the first token.

In the third the cache is on on both sides, and host memory on against off. The clock is this process's CPU time, so that others on
the machine count for little. The tokens of both sides must be equal.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from bench import options
from bench.driver import Drive, Served
from bench.report import Report, command_line, interval
from bench.workload import Job, Shape, jobs, poisson
from cluster.config import BatchConfig, batch_settings
from cluster.model import DEMO_MODEL
from cluster.offline import LLM
from cluster.protocol import EngineStats, SamplingParams
from kv.pool import KVPool
from workers.runner import ModelRunner

Cache = Literal["on", "off"]
MEMORY: dict[str, Any] = {"kv_memory": "64MiB", "host_kv_memory": "64MiB"}
PREFIX, OWN, OUTPUT = 512, 16, 32
PARTS = ("shared", "nothing", "host", "choices")
LOAD = 0.7
ROUNDS, STEM_OUTPUT = 4, 16


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if a token differs."""
    parser = options.parser(__doc__)
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
    parser.add_argument("--requests", type=options.positive, default=64)
    parser.add_argument("--repetitions", type=options.positive, default=8)
    parser.add_argument("--threads", type=options.positive, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which of the four (default: all)")
    arguments = parser.parse_args(argv)
    report = Report("prefix", command_line(argv))
    torch.set_num_threads(arguments.threads)
    llm = LLM(arguments.model, dtype=arguments.dtype, threads=arguments.threads, max_model_len=1024, **MEMORY)
    bench = Sides(llm, arguments.requests, arguments.repetitions)
    measured = {"shared": bench.shared, "nothing": bench.nothing_shared, "host": bench.host}
    results = [measure(report) for part, measure in measured.items() if part in arguments.parts]
    same = all(results)
    if "choices" in arguments.parts:
        choices(arguments.model, report)
    report.save(arguments.out)
    if not same:
        print("the tokens with the cache are not those without it", file=sys.stderr)
    return 0 if same else 1


class Sides:
    """The cache on and off over one loaded model."""

    def __init__(self, llm: LLM, requests: int, repetitions: int) -> None:
        self._llm = llm
        self._runners = (llm.runner, _twin(llm))
        self._requests = requests
        self._repetitions = repetitions
        self.run(jobs([Shape(64, 8)] * 8, llm.vocab_size, 10**6), "off")  # warm

    def run(self, asked: Sequence[Job], cache: Cache, **limits: Any) -> tuple[float, list[Served]]:
        """CPU seconds of all, and what became of each. The cache is empty at first. `limits`: of the BatchConfig."""
        drive = Drive(asked, self._config(cache, **limits), self._llm.runner, time.process_time)
        began = time.process_time()
        served = drive.run()
        return time.process_time() - began, served

    def run_together(self, asked: Sequence[Job], repetition: int, **limits: Any) -> dict[Cache, Drive]:
        """Both sides, an iteration of one and then one of the other, so that whatever slows the machine for longer than that slows
        both alike. Each has a pool of its own; which, and who goes first, changes with the repetition."""
        drives = {
            cache: Drive(asked, self._config(cache, **limits), runner, time.process_time)
            for cache, runner in zip(_turn(repetition), self._runners, strict=True)
        }
        for _ in itertools.zip_longest(*(drive.iterations() for drive in drives.values())):
            pass
        return drives

    def _config(self, cache: Cache, **limits: Any) -> BatchConfig:
        base = batch_settings(self._llm.config, self._llm.runner.num_blocks, self._llm.runner.max_model_len)
        return dataclasses.replace(base, prefix_cache=cache, **limits)

    def shared(self, report: Report) -> bool:
        """One long prefix for all; whether all tokens are equal."""
        shape = Shape(PREFIX + OWN, OUTPUT, blocks=(1,), block_tokens=PREFIX)
        seconds: dict[Cache, list[float]] = {"on": [], "off": []}
        same = True
        for repetition in range(self._repetitions):
            asked = jobs([shape] * self._requests, self._llm.vocab_size, repetition)
            found = {}
            for cache in _turn(repetition):
                spent, found[cache] = self.run(asked, cache)
                seconds[cache].append(spent)
            same &= _tokens(found["on"]) == _tokens(found["off"])
        tokens = self._requests * OUTPUT
        ratios = [off / on for on, off in zip(seconds["on"], seconds["off"], strict=True)]
        report.table(
            f"{self._requests} requests, {PREFIX} tokens shared + {OWN} of their own, {OUTPUT} output tokens",
            ["cache", "output tok/s (CPU time)", "times"],
            [
                ["off", tokens / statistics.median(seconds["off"]), 1.0],
                ["on", tokens / statistics.median(seconds["on"]), statistics.median(ratios)],
            ],
        )
        report.record("shared", seconds)
        return same

    def host(self, report: Report) -> bool:
        """Prompts that come again when the pool has lost them; whether all tokens are equal."""
        stems = max(4, self._requests // 4)
        shapes = [Shape(PREFIX + OWN, STEM_OUTPUT, blocks=(stem,), block_tokens=PREFIX) for stem in range(stems)] * ROUNDS
        each = shapes[0].total // BatchConfig.block_size + 1
        limits = {"num_blocks": 1 + stems // 4 * each, "max_num_seqs": max(1, stems // 8)}
        slots = min(stems * each, self._llm.runner.host_blocks)
        seconds: dict[Cache, list[float]] = {"on": [], "off": []}
        same = True
        for repetition in range(self._repetitions):
            asked = jobs(shapes, self._llm.vocab_size, 2000 + repetition)
            found = {}
            for side in _turn(repetition):
                spent, found[side] = self.run(asked, "on", host_blocks=slots if side == "on" else 0, **limits)
                seconds[side].append(spent)
            same &= _tokens(found["on"]) == _tokens(found["off"])
        tokens = len(shapes) * STEM_OUTPUT
        ratios = [off / on for on, off in zip(seconds["on"], seconds["off"], strict=True)]
        report.table(
            f"{stems} prompts of {PREFIX} tokens in turn, {ROUNDS} times, {limits['num_blocks'] - 1} blocks, {slots} on the host",
            ["host memory", "output tok/s (CPU time)", "times"],
            [
                ["off", tokens / statistics.median(seconds["off"]), 1.0],
                ["on", tokens / statistics.median(seconds["on"]), statistics.median(ratios)],
            ],
        )
        report.record("host", seconds)
        return same

    def nothing_shared(self, report: Report) -> bool:
        """Prompts of 32 to 256 tokens that have nothing in common, outputs of 16 to 128; whether all tokens are equal."""
        draw = np.random.default_rng(1)
        shapes = [Shape(int(draw.integers(32, 257)), int(draw.integers(16, 129))) for _ in range(self._requests)]
        block = BatchConfig.block_size
        sizes = [-(-shape.total // block) for shape in shapes]
        num_blocks = 1 + max(sum(sizes) // 2, 2 * max(sizes))
        limits = {"num_blocks": num_blocks, "max_num_seqs": max(1, self._requests // 4)}
        seconds: dict[Cache, list[float]] = {"on": [], "off": []}
        ttft: dict[Cache, list[float]] = {"on": [], "off": []}
        same = True
        for repetition in range(self._repetitions):
            asked = jobs(shapes, self._llm.vocab_size, 1000 + repetition)
            drives = self.run_together(asked, repetition, **limits)
            for cache, drive in drives.items():
                seconds[cache].append(drive.now)
            same &= _tokens(drives["on"].served) == _tokens(drives["off"].served)
            rate = LOAD * self._requests / statistics.median(seconds["off"])
            for cache, drive in self.run_together(poisson(asked, rate, repetition), repetition, **limits).items():
                ttft[cache] += [one.ttft_s for one in drive.served]
        changes = [on / off - 1 for on, off in zip(seconds["on"], seconds["off"], strict=True)]
        low, high = interval(changes)
        p99 = {cache: float(np.percentile(times, 99)) for cache, times in ttft.items()}
        least, most = tail_interval(ttft["on"], ttft["off"], self._repetitions)
        report.table(
            f"{self._requests} requests that share nothing, a pool of {num_blocks - 1} blocks",
            ["cache", "CPU s median", "p99 TTFT ms"],
            [[cache, statistics.median(seconds[cache]), 1000 * p99[cache]] for cache in ("off", "on")],
        )
        report.say(
            f"the cache costs {statistics.fmean(changes):+.2%} of CPU time (95 % confidence {low:+.2%} to {high:+.2%}), "
            f"p99 TTFT {p99['on'] / p99['off'] - 1:+.1%} ({least:+.1%} to {most:+.1%})"
        )
        report.record("nothing_shared", {"seconds": seconds, "ttft_s": ttft})
        return same


def _twin(llm: LLM) -> ModelRunner:
    """Another runner of the same weights, with a pool of its own."""
    runner, own = llm.runner, llm.runner.pool
    pool = KVPool(own.num_layers, own.num_blocks, own.block_size, own.num_kv_heads, own.head_dim, own.dtype, own.device)
    return ModelRunner(runner.decoder, pool, runner.max_model_len)


def choices(model: str, report: Report) -> None:
    """KV slots at the first token of n = 8 and of n = 1."""
    rows: list[list[str | float | int | None]] = []
    allocated: list[int] = []
    for n in (1, 8):
        stats = first_token(model, n)
        allocated.append(stats.slots_allocated)
        waste = 1 - stats.slots_used / stats.slots_allocated
        rows.append([n, stats.slots_allocated, stats.slots_shared, 100 * waste, allocated[-1] / allocated[0]])
    report.table(
        f"one prompt of {PREFIX} tokens at its first token", ["n", "slots", "saved by sharing", "waste %", "times n = 1"], rows
    )


def first_token(model: str, n: int) -> EngineStats:
    """The gauges when all choices have their first token."""
    with LLM(model, dtype="float32", threads=1, max_model_len=1024, kv_memory="64MiB") as llm:
        params = SamplingParams(seed=5, max_tokens=4, n=n)
        stats = llm.stats()
        for _ in llm.stream(list(range(300, 300 + PREFIX)), params):
            stats = llm.stats()
            if stats.running == n:
                break
        return stats


def tail_interval(ones: Sequence[float], others: Sequence[float], repetitions: int) -> tuple[float, float]:
    """The 95 % interval of how much the 99th percentile of `ones` is above that of `others`, repetitions drawn again 2,000 times
    (the bootstrap, Efron 1979): the samples of one repetition go together, and those of both sides."""
    one, other = np.array(ones).reshape(repetitions, -1), np.array(others).reshape(repetitions, -1)
    draw = np.random.default_rng(0)
    drawn = [draw.integers(0, repetitions, repetitions) for _ in range(2000)]
    changes = [np.percentile(one[some], 99) / np.percentile(other[some], 99) - 1 for some in drawn]
    return float(np.percentile(changes, 2.5)), float(np.percentile(changes, 97.5))


def _turn(repetition: int) -> tuple[Cache, Cache]:
    return ("on", "off") if repetition % 2 else ("off", "on")


def _tokens(served: Sequence[Served]) -> list[list[int]]:
    return [one.tokens for one in served]


if __name__ == "__main__":
    sys.exit(main())
