"""A trace's requests, with the prefixes they share, placed on several engines by each policy; hit rates against one shared cache.

    python -m bench.replay --trace FILE [--engines 4] [--shares 8 20] [--load 0.7] [--requests N] [--output-scale F] [--out DIR]

The scheduler, engines, batchers and radix trees are the real ones, on a virtual clock; only workers are pretended: one answers a
plan after

    step time = a + b x tokens of prompts + c x sequences that decode

with tokens that nobody else draws. A Mooncake trace tells which blocks of 512 tokens are equal in which prompts; its requests come
in its own rhythm, but faster or slower, so that b and c alone would keep the engines `load` busy if they had the hit rate of the
shared cache. Each engine's pool holds one part in so many (`--shares`) of all different blocks of 16 tokens in the prompts.

With prefix+pull, engines take KV from each other, in

    pull time = a + b x tokens

after which it is there like any other.

Token hit rate: tokens of prompts whose KV was there at the first admission, of all tokens of prompts. Limits:

    shared      one tree with all engines' blocks; requests one after the other, in order of arrival
    affinity    as many trees as engines, likewise; each request goes to the tree that has most of it, whatever there is to do at
                that time; only what a tree has computed more than others since the start counts against it, with a small weight

Work is the time that an engine's steps take; its maximum over the mean of all engines is 1 where they have equally much to do.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import options
from bench.replay_cluster import LATENCY_S, PullTime, Replay, StepTime
from bench.replay_workload import Workload
from bench.report import Cell, Report, command_line
from bench.workload import TraceError, read_trace, scaled
from cluster.config import BatchConfig, PlacementPolicy
from kv.manager import KVManager
from kv.names import TOKEN_BYTES, pack

POLICIES: tuple[PlacementPolicy, ...] = ("round_robin", "least_loaded", "prefix")
PULLING = "prefix+pull"
"""Besides, an engine that lacks KV pulls it from one that has it."""
EXCESS = 0.01
"""The weight of a token computed in the past, where there is no time and so no backlog."""


# --- without time ---------------------------------------------------------------------------------------------------


@dataclass
class _Cache:
    """One tree, through which requests go one after the other, each with its output."""

    kv: KVManager
    computed: int = 0

    def overlap(self, key: bytes) -> int:
        return self.kv.match(key, "").num_tokens

    def pass_through(self, seq: int, key: bytes, prompt_tokens: int) -> int:
        """Returns how many tokens of the prompt were known."""
        kv = self.kv
        kv.begin_plan()
        prompt = key[: prompt_tokens * TOKEN_BYTES]
        beginning = kv.admit(seq, kv.match(prompt, ""), "", len(key) // TOKEN_BYTES)
        # The last token drawn is never computed.
        if beginning is None or kv.allocate(seq, prompt_tokens) is None or kv.allocate(seq, len(key) // TOKEN_BYTES - 1) is None:
            raise ValueError(f"request {seq} does not fit the pool")
        kv.record(seq, prompt, prompt_tokens)
        kv.release(seq, key, len(key) // TOKEN_BYTES - 1)
        self.computed += prompt_tokens - beginning.num_tokens
        return beginning.num_tokens


def one_by_one(workload: Workload, config: BatchConfig, caches: int, excess: float = 0.0) -> tuple[float, float]:
    """Token hit rate of so many caches, and the largest number of computed tokens over the mean. A request goes to the cache that
    has most of it, tokens that a cache has computed more than the others counting against it with weight `excess`."""
    each = [_Cache(KVManager(config)) for _ in range(caches)]
    known = 0
    for index, shape in enumerate(workload.shapes):
        key = pack(itertools.chain(workload.prompt(index), workload.output(index)))
        prompt = key[: shape.prompt_tokens * TOKEN_BYTES]
        best = each[0] if caches == 1 else min(each, key=lambda cache: excess * cache.computed - cache.overlap(prompt))
        known += best.pass_through(index, key, shape.prompt_tokens)
    computed = [cache.computed for cache in each]
    return known / workload.prompt_tokens, max(computed) * caches / max(1, sum(computed))


# --- command line ---------------------------------------------------------------------------------------------------


def stretch_for(workload: Workload, hit_rate: float, engines: int, load: float, step_time: StepTime) -> float:
    """What times of arrival are to be multiplied by, so that tokens (b and c) keep the engines busy for a share `load`."""
    outputs = sum(shape.output_tokens for shape in workload.shapes)
    work = step_time.b * workload.prompt_tokens * (1 - hit_rate) + step_time.c * outputs
    return work / (engines * load) / max(1e-9, workload.shapes[-1].arrival_s)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="Mooncake JSONL")
    parser.add_argument("--engines", type=options.positive, default=4)
    parser.add_argument("--shares", type=options.positive, nargs="+", default=[8, 20], help="(default: 8 20)")
    parser.add_argument("--load", type=options.factor, default=0.7, help="(default: %(default)s)")
    parser.add_argument("--requests", type=options.number, default=0, help="the first so many; 0: all (default: %(default)s)")
    parser.add_argument("--output-scale", type=options.factor, default=0.1, help="output lengths times this (default: %(default)s)")
    parser.add_argument("--policies", choices=(*POLICIES, PULLING), nargs="+", default=[*POLICIES, PULLING], help="(default: all)")
    parser.add_argument("--max-num-seqs", type=options.positive, default=64)
    parser.add_argument("--max-num-batched-tokens", type=options.positive, default=8192)
    arguments = parser.parse_args(argv)
    report = Report("replay", command_line(argv))
    try:
        shapes = scaled(read_trace(arguments.trace, arguments.requests or None), 1.0, arguments.output_scale)
    except TraceError as error:
        parser.error(str(error))
    workload, step_time = Workload(shapes), StepTime()
    report.say(f"workload: {options.summary(shapes)}; {workload.different_blocks} different blocks of {workload.block_size} tokens")
    report.say(f"step time: {step_time}; {PullTime()}; messages take {LATENCY_S * 1e3:g} ms")
    for share in arguments.shares:
        blocks = workload.different_blocks // share + 1
        config = BatchConfig(
            num_blocks=blocks,
            max_model_len=max(shape.total for shape in shapes),
            block_size=workload.block_size,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
        )
        if max(shape.total for shape in shapes) > config.pool_tokens:
            parser.error(f"the longest request does not fit a pool of {config.pool_tokens} tokens (1/{share})")
        whole = dataclasses.replace(config, num_blocks=(blocks - 1) * arguments.engines + 1)
        shared, _ = one_by_one(workload, whole, 1)
        apart, uneven = one_by_one(workload, config, arguments.engines, EXCESS)
        stretch = stretch_for(workload, shared, arguments.engines, arguments.load, step_time)
        lasting = f"times of arrival x {stretch:.3f}: {shapes[-1].arrival_s * stretch:.0f} s"
        report.say(f"pools of 1/{share}: {config.pool_tokens} tokens; {lasting}")
        columns = ["", "hit rate", "% of shared", "work max/mean", "p95 by minute", "TTFT mean, s", "p99", "busy", "s here"]
        rows: list[list[Cell]] = [
            ["shared (limit)", f"{shared:.4f}", "100.0", *[None] * 6],
            ["affinity (no load)", f"{apart:.4f}", f"{100 * apart / max(1e-9, shared):.1f}", f"{uneven:.3f}", *[None] * 5],
        ]
        found: dict[str, Any] = {"shared": shared, "affinity": apart, "stretch": stretch, "pool_tokens": config.pool_tokens}
        for label in arguments.policies:
            policy: PlacementPolicy = "prefix" if label == PULLING else label
            pull_time = PullTime() if label == PULLING else None
            outcome = Replay(workload, policy, config, arguments.engines, stretch, step_time, pull_time).run()
            numbers = [outcome.imbalance, outcome.imbalance_p95, outcome.mean_ttft, outcome.p99_ttft, outcome.busy]
            percent = 100 * outcome.hit_rate / max(1e-9, shared)
            cells = [f"{number:.3f}" for number in numbers]
            rows.append([label, f"{outcome.hit_rate:.4f}", f"{percent:.1f}", *cells, f"{outcome.seconds:.0f}"])
            report.say(
                f"{label}: {rows[-1][1:]}, {outcome.preemptions} preemptions, pulls {outcome.pulls}, {outcome.pulled_tokens} tokens"
            )
            found[label] = {name: value for name, value in dataclasses.asdict(outcome).items() if name != "ttft"}
        report.record(f"1/{share}", found)
        report.table(f"{arguments.engines} engines, each with a pool of 1/{share} of all different blocks", columns, rows)
    report.save(arguments.out)


if __name__ == "__main__":
    main()
