"""A whole cluster in one process on a virtual clock: routers, scheduler, engines and fake workers, with faults from a seed.

Messages of one sender to one receiver arrive in order (as over one TCP connection), each after a random delay; what is under way to
or from a process that dies is lost.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster import engine as engines
from cluster.actions import KillWorkers, Send, StartWorkers
from cluster.config import BatchConfig
from cluster.epoch import EngineConfig
from cluster.protocol import Give, Moved, Ping, Pong, RouterHello, SamplingParams, StepPlan, Take, WorkerReady
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from kv.index import unpack
from kv.names import BlockNames
from router.generation import Generation
from router.journal import Journal, JournalConfig
from workers.fake import FakeStage, fake_beams, fake_output, fake_scores

STEP_TIMEOUT_S = 5.0
PULL_TIMEOUT_S = 2.0


@dataclass
class Client:
    """What one client asked for and what it was given."""

    prompt: list[int]
    params: SamplingParams
    at: float
    cancel_at: float | None = None
    timeout_s: float = 1e6
    tokens: list[list[int]] = field(default_factory=list)
    finish: list[str | None] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    """Log-probabilities of prompt positions 1, 2, ..."""
    error: Exception | None = None
    cancelled: bool = False
    salt: str = ""

    @property
    def over(self) -> bool:
        """Nothing more is to come."""
        return self.cancelled or self.error is not None or all(self.finish)


class Process:
    """Something with an address that can die; `generation` tells its lives apart."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.life = 0
        self.alive = True
        self.free_at = 0.0
        """Of a worker: when it has run all plans that it has."""
        self.step = -1
        """Of a worker: the last that it has run."""


class Simulation:
    """Call run(); then look at clients and check_empty()."""

    plan_times: tuple[float, ...] = (0.0,)
    """Seconds that workers take for a plan: one of these."""

    def __init__(self, seed: int, clients: list[Client], batch: BatchConfig, num_engines: int = 1, num_routers: int = 1) -> None:
        self.story = f"seed={seed}, clients={clients}, batch={batch}, num_engines={num_engines}, num_routers={num_routers}"
        self.faults: list[tuple[str, float, str]] = []
        self.random = random.Random(seed)
        self.now = 0.0
        self.batch = batch
        self.names = BlockNames("secret", batch.block_size)
        self.clients = {f"r{i}": client for i, client in enumerate(clients)}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = itertools.count()
        self._arrival: dict[tuple[str, str], float] = {}
        self.processes: dict[str, Process] = {}
        self.frozen: set[str] = set()
        self.epochs = itertools.count(1000, 1000)
        self.engines: dict[str, engines.Engine] = {}
        self.hanging: set[str] = set()
        """Engines whose processes are there and do nothing."""
        self._start_scheduler()
        self.routers = {f"router{i}": self._start_router(f"router{i}") for i in range(num_routers)}
        self.stages: dict[str, list[FakeStage]] = {}
        self._moving: dict[tuple[str, str], list[tuple[str, Give | Take]]] = {}
        """By group and pull: the ranks that wait for each other."""
        for i in range(num_engines):
            self._start_engine(f"engine{i}")
        for id, client in self.clients.items():
            self._client(id, client)
        self.at(0.0, self._tick)

    def __repr__(self) -> str:
        return f"Simulation({self.story}), faults={self.faults}"

    def fault(self, kind: str, time: float, name: str) -> None:
        """Let something happen to the process `name` (the scheduler, where `kind` says so), if it lives then."""
        self.faults.append((kind, time, name))
        event = getattr(self, kind)
        if kind == "restart_scheduler":
            self.at(time, event)
        else:
            self.at(time, lambda: event(name) if self.processes[name].alive else None)

    # --- processes --------------------------------------------------------------------------------------------------

    def _start_scheduler(self) -> None:
        process = self.processes.setdefault("scheduler", Process("scheduler"))
        process.alive = True
        config = SchedulerConfig(
            placement="prefix", block_size=self.batch.block_size, kv_pull=True, binding_timeout_s=3.0, silence_s=4.0, replace_s=12.0
        )
        self.scheduler = GlobalScheduler(config, self.now)
        for name in self.engines:
            self.scheduler.expect(name, self.now)

    def _start_router(self, name: str) -> Journal:
        self.processes[name] = Process(name)
        return Journal(JournalConfig(name, "scheduler", max_strikes=100))

    def _start_engine(self, name: str) -> None:
        process = self.processes.setdefault(name, Process(name))
        process.alive = True
        config = EngineConfig(
            name,
            name,
            "scheduler",
            self.batch,
            num_ranks=self.batch.pp,
            step_timeout_s=STEP_TIMEOUT_S,
            load_timeout_s=10.0,
            names=self.names,
            pull_timeout_s=PULL_TIMEOUT_S,
        )
        self.engines[name] = engines.Engine(config, next(self.epochs), self.now)
        self.flush()

    def kill_workers(self, name: str) -> None:
        """A worker process of the engine dies; its shell notices a little later."""
        engine = self.engines[name]
        epoch = engine.epoch
        self._worker_lives(name)
        self.at(
            self.now + self.random.random(),
            lambda: self._on_engine(name, engine, lambda: engine.workers_died(epoch, "killed", self.now)),
        )

    def freeze_workers(self, name: str) -> None:
        """Its workers stop answering, but nobody sees them die."""
        self._worker_lives(name)

    def _worker_lives(self, name: str) -> None:
        for stage in range(self.batch.pp):
            process = self.processes.get(f"{name}/{stage}")
            if process is not None:
                process.life += 1

    def kill_engine(self, name: str) -> None:
        """The engine's process dies with its workers; another is started later under the same name."""
        process = self.processes[name]
        process.alive = False
        process.life += 1
        self._worker_lives(name)
        if self.random.random() < 0.5:  # else the scheduler has to notice by the silence
            epoch = self.engines[name].epoch
            self.at(self.now + self.random.random(), lambda: self.scheduler.engine_died(name, epoch, self.now))
        self.at(self.now + 1 + 5 * self.random.random(), lambda: self._start_engine(name))

    def freeze_engine(self, name: str) -> None:
        """The engine's process hangs. Nobody sees it die; it must be killed."""
        process = self.processes[name]
        process.alive = False
        process.life += 1
        self.hanging.add(name)

    def _kill_hanging(self, name: str) -> None:
        if name in self.hanging:
            self.hanging.discard(name)
            self._worker_lives(name)
            self.at(self.now + 1 + 5 * self.random.random(), lambda: self._start_engine(name))
        elif self.processes[name].alive:
            self.kill_engine(name)

    def restart_scheduler(self) -> None:
        """The scheduler dies with all it knew, and is started anew."""
        process = self.processes["scheduler"]
        process.alive = False
        process.life += 1
        self.at(self.now + self.random.random(), self._start_scheduler)

    def cut_off(self, name: str) -> None:
        """The scheduler hears nothing of an engine for a while, though it lives and goes on talking to routers."""
        self.frozen.add(name)
        self.at(self.now + 6.0, lambda: self.frozen.discard(name))

    # --- clock and network ------------------------------------------------------------------------------------------

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Run `event` at virtual time `time`."""
        heapq.heappush(self._events, (time, next(self._counter), event))

    def _send(self, source: str, target: str, message: Any) -> None:
        receiver = self.processes.get(target)
        if receiver is None or (target == "scheduler" and source in self.frozen):
            return
        arrival = max(self.now + self.random.expovariate(1 / 0.005), self._arrival.get((source, target), 0.0))
        self._arrival[source, target] = arrival
        sender, lives = self.processes[source], (self.processes[source].life, receiver.life)

        def deliver() -> None:
            if (sender.life, receiver.life) == lives and receiver.alive:
                self._receive(target, message)

        self.at(arrival, deliver)

    def _receive(self, target: str, message: Any) -> None:
        if target == "scheduler":
            self.scheduler.receive(message, self.now)
        elif target in self.routers:
            self.routers[target].receive(message, self.now)
        elif "/" in target:
            self._worker(target, message)
        else:
            self._on_engine(target, self.engines[target], lambda: self.engines[target].receive(message, self.now))
        self.flush()

    def _on_engine(self, name: str, engine: engines.Engine, action: Callable[[], None]) -> None:
        if self.processes[name].alive and self.engines[name] is engine:
            action()
            if engine.batcher is not None:
                engine.batcher.check_integrity()

    def flush(self) -> None:
        """Carry out what the state machines want done."""
        for send in self.scheduler.take_messages():
            self._send("scheduler", send.address, send.message)
        for kill in self.scheduler.take_kills():
            self._kill_hanging(kill.engine)
        for name, journal in self.routers.items():
            for message in journal.take_messages():
                self._send(name, message.address, message.message)
            for news in journal.take_news():
                self._news(news.id, news)
        for name, engine in self.engines.items():
            if not self.processes[name].alive:
                continue
            for action in engine.take_actions():
                match action:
                    case Send():
                        self._send(name, action.address, action.message)
                    case StartWorkers():
                        self._start_workers(name, action.epoch)
                    case KillWorkers():
                        self._worker_lives(name)

    def _tick(self) -> None:
        if self.processes["scheduler"].alive:
            self.scheduler.tick(self.now)
        for name, journal in self.routers.items():
            journal.tick(self.now)
            self._send(name, "scheduler", RouterHello(name, []))
        for name, engine in self.engines.items():
            self._on_engine(name, engine, lambda engine=engine: engine.tick(self.now))  # type: ignore[misc]
        self.flush()
        self.at(self.now + 0.5, self._tick)

    # --- workers ----------------------------------------------------------------------------------------------------

    def _start_workers(self, name: str, epoch: int) -> None:
        batch = self.batch
        self.stages[name] = [
            FakeStage(i, batch.pp, batch.num_blocks, batch.block_size, host_blocks=batch.host_blocks + i) for i in range(batch.pp)
        ]
        for rank in range(batch.pp):
            address = f"{name}/{rank}"
            process = self.processes.setdefault(address, Process(address))
            process.life += 1
            process.free_at, process.step = self.now, -1
            ready = WorkerReady(
                epoch=epoch,
                rank=rank,
                address=address,
                num_blocks=batch.num_blocks,
                max_model_len=batch.max_model_len,
                layout=f"stage {rank}",
                store=address,
                host_blocks=batch.host_blocks + rank,
            )
            life = process.life
            self.at(
                self.now + self.random.random(),
                lambda process=process, life=life, ready=ready: (  # type: ignore[misc]
                    self._send(process.address, name, ready) if process.life == life else None
                ),
            )

    def _worker(self, address: str, message: Any) -> None:
        name, rank = address.split("/")[0], int(address.split("/")[1])
        match message:
            case StepPlan():
                self._run_later(address, message, [])
            case Ping():
                self._send(address, name, Pong(message.epoch, rank))
            case Give() | Take():
                self._move(address, message)

    def _run_later(self, address: str, plan: StepPlan, hidden: list[int]) -> None:
        """After the plans before it, each of which takes its time."""
        process = self.processes[address]
        free_at = max(self.now, process.free_at) + self.random.choice(self.plan_times)
        process.free_at = free_at
        self._at_worker(address, free_at - self.now, lambda: self._run(address, plan, hidden))

    def _run(self, address: str, plan: StepPlan, hidden: list[int]) -> None:
        name, rank = address.split("/")[0], int(address.split("/")[1])
        out, result = self.stages[name][rank].execute(plan, hidden)
        self.processes[address].step = plan.step
        if result is not None:
            self._send(address, name, result)
        else:
            self._forward(address, f"{name}/{rank + 1}", plan, out)
        self.flush()

    def _move(self, address: str, message: Give | Take) -> None:
        """KV from rank to rank, once both are there and have run what they have to: all of it, or half, or nothing."""
        both = self._moving.setdefault((message.store, message.pull), [])
        both.append((address, message))
        if len(both) == 1:

            def give_up() -> None:
                if len(both) == 1:
                    both.append(both[0])  # whoever comes now comes too late
                    self._moved(address, message, "nobody came")

            self._at_worker(address, message.within_s, give_up)
            return
        if len(both) > 2:
            self._moved(address, message, "nobody is there any more")
            return
        (giver, give), (taker, take) = sorted(both, key=lambda end: isinstance(end[1], Take))
        assert len(give.blocks) == len(take.blocks)
        fate = self.random.random()
        content: list[list[int]] = []

        def read() -> None:
            content.extend(self._stage(giver).read(give.blocks))
            self._moved(giver, give, "broken" if fate < 0.15 else "")

        def write() -> None:
            whole = len(content) == len(take.blocks) and fate > 0.35
            count = len(content) if whole else len(content) // 2
            self._stage(taker).write(take.blocks[:count], content[:count])
            self._moved(taker, take, "" if whole else "broken")

        took = self.random.choice([0.01, 1, 1.5 * PULL_TIMEOUT_S]) * self.random.random()
        self._when_run(giver, give.after, lambda: self._at_worker(giver, took * self.random.choice([0.0, 0.5]), read))
        self._when_run(taker, take.after, lambda: self._at_worker(taker, took, write))

    def _when_run(self, address: str, step: int, event: Callable[[], None]) -> None:
        """As soon as the worker has run this step."""
        if self.processes[address].step >= step:
            event()
        else:
            self._at_worker(address, 0.01, lambda: self._when_run(address, step, event))

    def _moved(self, address: str, message: Give | Take, error: str) -> None:
        name, rank = address.split("/")
        done = Moved(epoch=message.epoch, rank=int(rank), pull=message.pull, seconds=0.1, error=error)
        self._send(address, name, done)

    def _stage(self, address: str) -> FakeStage:
        name, rank = address.split("/")
        return self.stages[name][int(rank)]

    def _at_worker(self, address: str, delay: float, event: Callable[[], None]) -> None:
        """Unless it dies before."""
        process = self.processes[address]
        life = process.life
        self.at(self.now + delay, lambda: event() if process.life == life else None)

    def _forward(self, source: str, target: str, plan: StepPlan, hidden: list[int]) -> None:
        receiver = self.processes[target]
        arrival = max(self.now + self.random.expovariate(1 / 0.01), self._arrival.get((source, target), 0.0))
        self._arrival[source, target] = arrival
        life = receiver.life

        def deliver() -> None:
            if receiver.life == life:
                self._run_later(target, plan, hidden)

        self.at(arrival, deliver)

    # --- clients ----------------------------------------------------------------------------------------------------

    def _client(self, id: str, client: Client) -> None:
        router = self.routers[self.random.choice(list(self.routers))]
        client.tokens = [[] for _ in range(client.params.n)]
        client.finish = [None] * client.params.n

        def begin() -> None:
            names = self.names.of_prompt(client.prompt, client.salt)
            router.begin(Generation(id, client.prompt, client.params, client.timeout_s, client.salt), self.now, self.now, names)
            self.flush()

        def cancel() -> None:
            if not client.over:
                client.cancelled = True
                router.cancel(id)
                self.flush()

        self.at(client.at, begin)
        if client.cancel_at is not None:
            self.at(client.cancel_at, cancel)

    def _news(self, id: str, news: Any) -> None:
        client = self.clients[id]
        assert not client.over, "news of a request that was over"
        client.error = news.error
        for delta in news.deltas:
            client.scores += [entry.logprob for entry in delta.prompt_logprobs]
            if not delta.tokens and delta.finish is None:
                continue
            assert len(client.scores) == len(self._scores_of(client)), "tokens before all of the prompt was told of"
            assert client.finish[delta.choice] is None, "tokens after the end"
            assert (len(delta.logprobs) == len(delta.tokens)) == (client.params.logprobs is not None or not delta.tokens)
            client.tokens[delta.choice] += delta.tokens
            client.finish[delta.choice] = delta.finish

    # --- running and checking ---------------------------------------------------------------------------------------

    def run(self, limit_s: float) -> None:
        """Until all clients have what they asked for and all is quiet, or virtual time `limit_s`: then something hangs."""
        quiet_until = None
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
            if all(client.over for client in self.clients.values()):
                quiet_until = quiet_until or self.now + 60.0
                if self.now > quiet_until:
                    return
            assert self.now < limit_s, f"still waiting: {[id for id, c in self.clients.items() if not c.over]}"

    def check_clients(self) -> None:
        """Every client has exactly its tokens; those who left early have a beginning of them."""
        for id, client in self.clients.items():
            assert client.scores == self._scores_of(client)[: len(client.scores)], id
            beams = fake_beams(client.prompt, client.params, self.batch.pp) if client.params.beam_width else []
            for choice in range(client.params.n):
                wanted = beams[choice] if beams else fake_output(client.prompt, client.params, choice, self.batch.pp)
                given = client.tokens[choice]
                if client.finish[choice] is not None:
                    assert given == wanted, f"{id}/{choice}"
                    reason = "stop" if wanted and wanted[-1] in client.params.stop_token_ids else "length"
                    assert client.finish[choice] == reason
                else:
                    assert client.cancelled or client.error is not None
                    assert given == wanted[: len(given)]

    def _scores_of(self, client: Client) -> list[float]:
        return [] if client.params.prompt_logprobs is None else fake_scores(client.prompt, self.batch.pp)

    def check_empty(self) -> None:
        """Nothing is left anywhere: no block, no request, no plan, no binding."""
        assert self.scheduler.queued == 0
        assert all(len(journal) == 0 for journal in self.routers.values())
        for name, engine in self.engines.items():
            assert engine.batcher is not None, f"{name} does not serve"
            stats = engine.batcher.stats()
            assert (stats.blocks_used, stats.running, stats.waiting, stats.in_flight) == (0, 0, 0, 0), name
            engine.batcher.check_integrity()
            assert not engine._requests, name
            assert self.scheduler._engines[name].report.credit == engine.batcher.capacity()
            assert not self.scheduler._engines[name].bindings
            self._check_index(name)

    def _check_index(self, name: str) -> None:
        """The prefix index has just what the engine's tree has."""
        tree = self.engines[name].batcher.kv.tree  # type: ignore[union-attr]
        index = self.scheduler._prefixes.index
        known = {block for node in tree.nodes() for block in unpack(bytes(node.names))} if tree is not None else set()
        told = {block for shard in index._shards for block, mask in shard.items() if mask >> index._slots.get(name, 10**6) & 1}
        assert told == known, name
