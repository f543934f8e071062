"""A cluster on a virtual clock: real scheduler, engines, batchers and radix trees, and workers that only pretend."""

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.replay_workload import Workload
from cluster.actions import StartWorkers
from cluster.config import BatchConfig, PlacementPolicy
from cluster.engine import Engine
from cluster.epoch import EngineConfig
from cluster.protocol import (
    ChunkResult,
    Deltas,
    Give,
    Moved,
    Place,
    Placement,
    Pull,
    Pulled,
    Refusal,
    Rejected,
    Released,
    Request,
    RouterHello,
    SamplingParams,
    StepPlan,
    StepResult,
    Submit,
    Take,
    WorkerReady,
)
from cluster.pulls import PullCounts
from cluster.scheduler import GlobalScheduler, SchedulerConfig

LATENCY_S = 0.0005
"""Of every message."""
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


@dataclass(frozen=True)
class PullTime:
    """How long KV is on its way from one engine to another. About 128 KiB a token, as of a model of 8 billion parameters with
    grouped-query attention in bfloat16, over a network of 100 Gbit/s."""

    a: float = 5e-3
    """Seconds of each transfer ..."""
    b: float = 10.5e-6
    """... and for each token."""


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
    pulls: dict[str, int] = field(default_factory=dict)
    """How they ended."""
    pulled_tokens: int = 0
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
        self,
        workload: Workload,
        policy: PlacementPolicy,
        config: BatchConfig,
        engines: int,
        stretch: float,
        step_time: StepTime,
        pull_time: PullTime | None = None,
    ) -> None:
        """`stretch`: times of arrival are multiplied by it. `pull_time`: None where engines don't pull."""
        self.now = 0.0
        self._workload = workload
        self._policy = policy
        self._config = config
        self._stretch = stretch
        self._step_time = step_time
        self._pull_time = pull_time
        self._moving: dict[str, list[tuple[str, Give | Take]]] = {}
        """By transfer: the workers that are at it."""
        self._events: list[tuple[float, int, str, Any]] = []
        self._counter = itertools.count()
        self._minutes: list[list[float]] = []
        self._clients: dict[str, _Client] = {}
        self._left = len(workload.shapes)
        self._scheduler = GlobalScheduler(
            SchedulerConfig(
                max_queue=len(workload.shapes), placement=policy, block_size=config.block_size, kv_pull=pull_time is not None
            ),
            0.0,
        )
        names = workload.key if policy == "prefix" else None
        self._engines: dict[str, _Process] = {}
        for number in range(engines):
            name = f"engine{number}"
            settings = EngineConfig(
                name,
                name,
                "scheduler",
                config,
                step_timeout_s=1e9,
                worker_timeout_s=1e9,
                names=names,
                pull_timeout_s=None if pull_time is None else 5.0,
            )
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
            pulls=dict(sum((counts.ended for counts in self._pulls()), Counter())),
            pulled_tokens=sum(counts.tokens for counts in self._pulls()),
            seconds=time.perf_counter() - began,
        )

    def _pulls(self) -> list[PullCounts]:
        return [process.engine.metrics.pulls for process in self._engines.values()]

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
        elif isinstance(message, StepPlan):
            self._work(target.removesuffix("/0"), message)
        else:
            self._move(target.removesuffix("/0"), message)

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
        self._after(LATENCY_S, placement.address, Submit(placement.epoch, request, placement.source))

    # --- the workers ------------------------------------------------------------------------------------------------

    def _carry_out(self, name: str) -> None:
        for action in self._engines[name].engine.take_actions():
            match action:
                case StartWorkers():
                    blocks, longest = self._config.num_blocks, self._config.max_model_len
                    address = f"{name}/0"
                    ready = WorkerReady(
                        epoch=action.epoch, rank=0, address=address, num_blocks=blocks, max_model_len=longest, store=address
                    )
                    self._after(LATENCY_S, name, ready)
                case _:
                    self._send(action)

    def _send(self, action: Any) -> None:
        # What nobody here reads is not worth an event.
        if isinstance(action.message, StepPlan | Give | Take | Pull | Pulled) or action.address in ("scheduler", "router"):
            self._after(LATENCY_S, action.address, action.message)

    def _move(self, name: str, message: Give | Take) -> None:
        both = self._moving.setdefault(message.pull, [])
        both.append((name, message))
        if len(both) == 2 and self._pull_time is not None:
            took = self._pull_time.a + self._pull_time.b * len(message.blocks) * self._config.block_size
            for engine, order in self._moving.pop(message.pull):
                moved = Moved(epoch=order.epoch, rank=0, pull=order.pull, seconds=took)
                self._after(took + LATENCY_S, engine, moved)

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
