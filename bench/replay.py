"""A trace's requests, with the prefixes they share, placed on several engines by each policy; hit rates against one shared cache.

    python -m bench.replay --trace FILE [--engines 4] [--shares 8 20] [--load 0.7] [--requests N] [--output-scale F] [--out DIR]

The scheduler, engines, batchers and radix trees are the real ones, on a virtual clock; only workers are pretended: one answers a
plan after

    step time = a + b x tokens of prompts + c x sequences that decode

with tokens that nobody else draws. A Mooncake trace tells which blocks of 512 tokens are equal in which prompts; its requests come
in its own rhythm, but faster or slower, so that b and c alone would keep the engines `load` busy if they had the hit rate of the
shared cache. Each engine's pool holds one part in so many (`--shares`) of all different blocks of 16 tokens in the prompts.

Token hit rate: tokens of prompts whose KV was there at the first admission, of all tokens of prompts. Limits:

    shared      one tree with all engines' blocks; requests one after the other, in order of arrival
    affinity    as many trees as engines, likewise; each request goes to the tree that has most of it, whatever there is to do at
                that time; only what a tree has computed more than others since the start counts against it, with a small weight

Work is the time that an engine's steps take; its maximum over the mean of all engines is 1 where they have equally much to do.
"""

import dataclasses
import heapq
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.report import Cell, Report, command_line
from bench.workload import Shape, TraceError, read_trace, scaled
from cluster.actions import StartWorkers
from cluster.config import BatchConfig, PlacementPolicy
from cluster.engine import Engine, EngineConfig
from cluster.protocol import (
    ChunkResult,
    Deltas,
    EngineReport,
    Place,
    Placement,
    Refusal,
    Rejected,
    Released,
    Request,
    RouterHello,
    SamplingParams,
    StepPlan,
    StepResult,
    Submit,
    WorkerReady,
)
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from kv.manager import KVManager
from kv.names import TOKEN_BYTES, BlockNames, pack

POLICIES: tuple[PlacementPolicy, ...] = ("round_robin", "least_loaded", "prefix")
LATENCY_S = 0.0005
"""Of every message."""
EXCESS = 0.01
"""The weight of a token computed in the past, where there is no time and so no backlog."""
_TICK_S = 0.25
_MINUTE_S = 60.0


@dataclass(frozen=True)
class StepTime:
    """How long a worker takes. About a model of 8 billion parameters on one large GPU."""

    a: float = 3e-3
    """Seconds of every step ..."""
    b: float = 50e-6
    """... for each token of a prompt ..."""
    c: float = 100e-6
    """... and for each sequence that decodes."""

    def of(self, plan: StepPlan) -> float:
        """Seconds of this plan."""
        decodes = sum(1 for chunk in plan.chunks if chunk.num_tokens == 1)
        return self.a + self.b * (sum(chunk.num_tokens for chunk in plan.chunks) - decodes) + self.c * decodes


class Workload:
    """A trace's requests, whose tokens are made when they are asked for: all at once they would not fit."""

    def __init__(self, shapes: Sequence[Shape], block_size: int = 16) -> None:
        self.shapes = list(shapes)
        self.block_size = block_size
        self._own = 1 + max((id for shape in shapes for id in shape.blocks), default=0)
        self._starts = list(itertools.accumulate((shape.total for shape in shapes), initial=0))

    def prompt(self, index: int) -> list[int]:
        """Token ids: consecutive ones, which begin where the block's number says, so that no two blocks have any in common."""
        shape = self.shapes[index]
        size, tokens = shape.block_tokens, list[int]()
        for id in shape.blocks:
            tokens.extend(range(id * size, (id + 1) * size))
        missing = shape.prompt_tokens - len(tokens)
        first = self._first_own(index)
        return tokens + list(range(first, first + missing)) if missing > 0 else tokens[: shape.prompt_tokens]

    def output(self, index: int) -> range:
        """Token ids that no other request has."""
        shape = self.shapes[index]
        first = self._first_own(index) + shape.prompt_tokens
        return range(first, first + shape.output_tokens)

    def _first_own(self, index: int) -> int:
        return self._own * self.shapes[index].block_tokens + self._starts[index]

    @cached_property
    def different_blocks(self) -> int:
        """Whole blocks in the prompts, equal ones counted once."""
        longest: dict[int, int] = {}
        own = 0
        for shape in self.shapes:
            left = shape.prompt_tokens
            for id in shape.blocks:
                longest[id] = max(longest.get(id, 0), min(left, shape.block_tokens))
                left = max(0, left - shape.block_tokens)
            own += left // self.block_size
        return own + sum(tokens // self.block_size for tokens in longest.values())

    @cached_property
    def key(self) -> BlockNames:
        """What blocks are named by."""
        return BlockNames("replay", self.block_size)

    @cached_property
    def names(self) -> list[bytes]:
        """Of each prompt's blocks: the router's part, made once for all runs."""
        return [self.key.of_prompt(self.prompt(index)) for index in range(len(self.shapes))]

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(shape.prompt_tokens for shape in self.shapes)


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


# --- on the virtual clock -------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one policy gave."""

    hit_rate: float
    ttft: list[float]
    """Seconds, in order of arrival."""
    work: list[float]
    """By engine: seconds of its steps."""
    by_minute: list[list[float]]
    """The same by minute, in which the step began."""
    busy: float
    """Share of the engines' time that they computed."""
    preemptions: int
    seconds: float = 0.0
    """That the run took here."""

    @property
    def imbalance(self) -> float:
        """Work of the engine with most, over the mean."""
        return _imbalance(self.work)

    @property
    def imbalance_p95(self) -> float:
        """The same, by minutes that are over: what all but one in twenty stay below."""
        return float(np.percentile([_imbalance(work) for work in self.by_minute[:-1] or self.by_minute], 95))

    @property
    def mean_ttft(self) -> float:
        """Seconds."""
        return float(np.mean(self.ttft))

    @property
    def p99_ttft(self) -> float:
        """Seconds."""
        return float(np.percentile(self.ttft, 99))


def _imbalance(work: Sequence[float]) -> float:
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


@dataclass
class _Client:
    index: int
    begun_at: float
    first_at: float | None = None


@dataclass
class _Process:
    """An engine with its pretended worker."""

    engine: Engine
    number: int
    work: float = 0.0
    sequences: dict[int, Iterator[int]] = field(default_factory=dict)
    """By sequence: the tokens it will draw."""


class Replay:
    """One router, the scheduler, engines and their workers; call run()."""

    def __init__(
        self, workload: Workload, policy: PlacementPolicy, config: BatchConfig, engines: int, stretch: float, step_time: StepTime
    ) -> None:
        """`stretch`: times of arrival are multiplied by it."""
        self.now = 0.0
        self._workload = workload
        self._policy = policy
        self._config = config
        self._stretch = stretch
        self._step_time = step_time
        self._events: list[tuple[float, int, str, Any]] = []
        self._counter = itertools.count()
        self._minutes: list[list[float]] = []
        self._clients: dict[str, _Client] = {}
        self._left = len(workload.shapes)
        self._scheduler = GlobalScheduler(
            SchedulerConfig(max_queue=len(workload.shapes), placement=policy, block_size=config.block_size), 0.0
        )
        names = workload.key if policy == "prefix" else None
        self._engines: dict[str, _Process] = {}
        for number in range(engines):
            name = f"engine{number}"
            settings = EngineConfig(name, name, "scheduler", config, step_timeout_s=1e9, worker_timeout_s=1e9, names=names)
            self._engines[name] = _Process(Engine(settings, 1, 0.0), number)
            self._carry_out(name)

    def run(self) -> Outcome:
        """Until all requests have ended. Raises RuntimeError where one does not end as it should."""
        began = time.perf_counter()
        self._after(0.0, "tick", None)
        for index, shape in enumerate(self._workload.shapes):
            # The engines are ready when the first one comes.
            self._after(1.0 + shape.arrival_s * self._stretch, "arrival", index)
        while self._left:
            self.now, _, target, message = heapq.heappop(self._events)
            self._deliver(target, message)
        batchers = [process.engine.batcher for process in self._engines.values()]
        counters = [batcher.counters for batcher in batchers if batcher is not None]
        for batcher in batchers:
            assert batcher is not None
            batcher.check_integrity()
        work = [process.work for process in self._engines.values()]
        clients = sorted(self._clients.values(), key=lambda client: client.index)
        return Outcome(
            hit_rate=sum(counter.cached for counter in counters) / max(1, sum(counter.looked_up for counter in counters)),
            ttft=[client.first_at - client.begun_at for client in clients if client.first_at is not None],
            work=work,
            by_minute=self._minutes,
            busy=sum(work) / len(work) / max(1e-9, self.now - 1.0),
            preemptions=sum(counter.preemptions for counter in counters),
            seconds=time.perf_counter() - began,
        )

    def _after(self, delay: float, target: str, message: Any) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._counter), target, message))

    def _deliver(self, target: str, message: Any) -> None:
        process = self._engines.get(target)
        if process is not None:
            process.engine.receive(message, self.now)
            self._carry_out(target)
        elif target == "scheduler":
            self._scheduler.receive(message, self.now)
            self._forward()
        elif target == "router":
            self._route(message)
        elif target == "arrival":
            self._arrive(message)
        elif target == "tick":
            self._tick()
        else:
            self._work(target.removesuffix("/0"), message)

    def _tick(self) -> None:
        self._after(LATENCY_S, "scheduler", RouterHello("router", []))
        for name, process in self._engines.items():
            process.engine.tick(self.now)
            self._carry_out(name)
        self._scheduler.tick(self.now)
        self._forward()
        self._after(_TICK_S, "tick", None)

    def _forward(self) -> None:
        for send in self._scheduler.take_messages():
            self._after(LATENCY_S, send.address, send.message)

    # --- the router -------------------------------------------------------------------------------------------------

    def _arrive(self, index: int) -> None:
        shape, request = self._workload.shapes[index], f"r{index}"
        self._clients[request] = _Client(index, self.now)
        place = Place(
            request=request,
            attempt=0,
            reply_to="router",
            num_tokens=shape.prompt_tokens,
            longest=shape.total,
            sequences=1,
            arrival=self.now,
            names=self._workload.names[index] if self._policy == "prefix" else b"",
        )
        self._after(LATENCY_S, "scheduler", place)

    def _route(self, message: Any) -> None:
        match message:
            case Placement():
                self._submit(message)
            case Deltas():
                for delta in message.deltas:
                    client = self._clients[delta.request]
                    if client.first_at is None and delta.tokens:
                        client.first_at = self.now
                    if delta.finish is not None:
                        self._left -= 1
            case Released() | Rejected() | Refusal():
                raise RuntimeError(f"not served: {message}")
            case _:
                pass

    def _submit(self, placement: Placement) -> None:
        index = self._clients[placement.request].index
        request = Request(
            id=placement.request,
            attempt=0,
            reply_to="router",
            prompt=self._workload.prompt(index),
            emitted=[[]],
            finished=[False],
            params=SamplingParams(max_tokens=self._workload.shapes[index].output_tokens, seed=index),
        )
        self._after(LATENCY_S, placement.address, Submit(placement.epoch, request))

    # --- the workers ------------------------------------------------------------------------------------------------

    def _carry_out(self, name: str) -> None:
        for action in self._engines[name].engine.take_actions():
            match action:
                case StartWorkers():
                    blocks, longest = self._config.num_blocks, self._config.max_model_len
                    ready = WorkerReady(epoch=action.epoch, rank=0, address=f"{name}/0", num_blocks=blocks, max_model_len=longest)
                    self._after(LATENCY_S, name, ready)
                case _:
                    self._send(action)

    def _send(self, action: Any) -> None:
        # What nobody here reads is not worth an event.
        if isinstance(action.message, StepPlan | EngineReport | Deltas) or action.address in ("scheduler", "router"):
            self._after(LATENCY_S, action.address, action.message)

    def _work(self, name: str, plan: StepPlan) -> None:
        process = self._engines[name]
        for seq in plan.finished:
            process.sequences.pop(seq, None)
        for admission in plan.admitted:
            if admission.new is not None:
                # The seed says which request it is.
                process.sequences[admission.seq] = iter(self._workload.output(admission.new.params.seed))
        took = self._step_time.of(plan)
        minute = int((self.now - 1.0) / _MINUTE_S)
        while len(self._minutes) <= minute:
            self._minutes.append([0.0] * len(self._engines))
        self._minutes[minute][process.number] += took
        process.work += took
        drawn = [ChunkResult(chunk.seq, [next(process.sequences[chunk.seq])], []) for chunk in plan.chunks if chunk.sample]
        result = StepResult(epoch=plan.epoch, step=plan.step, results=drawn, compute_s=took)
        self._after(took + LATENCY_S, name, result)


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
    parser.add_argument("--policies", choices=POLICIES, nargs="+", default=list(POLICIES), help="(default: all)")
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
    report.say(f"step time: {step_time}; messages take {LATENCY_S * 1e3:g} ms")
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
        for policy in arguments.policies:
            outcome = Replay(workload, policy, config, arguments.engines, stretch, step_time).run()
            numbers = [outcome.imbalance, outcome.imbalance_p95, outcome.mean_ttft, outcome.p99_ttft, outcome.busy]
            percent = 100 * outcome.hit_rate / max(1e-9, shared)
            cells = [f"{number:.3f}" for number in numbers]
            rows.append([policy, f"{outcome.hit_rate:.4f}", f"{percent:.1f}", *cells, f"{outcome.seconds:.0f}"])
            report.say(f"{policy}: {rows[-1][1:]}, {outcome.preemptions} preemptions")
            found[policy] = {name: value for name, value in dataclasses.asdict(outcome).items() if name != "ttft"}
        report.record(f"1/{share}", found)
        report.table(f"{arguments.engines} engines, each with a pool of 1/{share} of all different blocks", columns, rows)
    report.save(arguments.out)


if __name__ == "__main__":
    main()
