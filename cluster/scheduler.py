"""The cluster's one queue as a state machine: who waits, which engine takes whom. No I/O.

Binding is late: an engine grants credit (tokens and sequences it can take now), and the request that arrived first is bound when
some engine's credit covers it. First come first served: nobody overtakes the head of the queue. Credit is what an engine's last
report says, less what was bound to it and not yet accepted there; a binding that is never accepted (its router died) expires. So
a lost report costs a moment, never correctness.
"""

import bisect
import math
from dataclasses import dataclass
from typing import Literal

from cluster.actions import KillEngine, Send
from cluster.config import PlacementPolicy
from cluster.engine_view import EngineView, that_take
from cluster.metrics import Totals
from cluster.placement import Turnover, cheapest
from cluster.prefixes import Prefixes
from cluster.protocol import (
    CacheChanges,
    CacheResync,
    ClusterStatus,
    EngineDown,
    EngineMessage,
    EngineReport,
    EngineStatus,
    MetricSample,
    Place,
    PlaceAgain,
    Placement,
    PullSource,
    Refusal,
    RouterDown,
    RouterHello,
    RouterMessage,
    SchedulerMessage,
    Stop,
    Withdraw,
)
from kv.index import unpack


@dataclass(frozen=True)
class SchedulerConfig:
    """Settings of the cluster's queue. Times in seconds."""

    max_queue: int = 1024
    placement: PlacementPolicy = "least_loaded"
    block_size: int = 16
    """Of the engines' pools, for placement by prefixes."""
    kv_pull: bool = False
    """Whether engines can take KV from each other."""
    max_index_blocks: int = 1 << 24
    """Names of blocks that the prefix index keeps, of about 100 bytes each."""
    binding_timeout_s: float = 10.0
    """A bound request not accepted by then gives its credit back."""
    silence_s: float = 10.0
    """An engine or router not heard of for so long is taken for dead."""
    lease_s: float = 60.0
    """The application is over when no router was heard of for so long ..."""
    first_router_s: float = 600.0
    """... or when none has ever come, for so long ..."""
    leave_s: float = 5.0
    """... or so long after the last one said that it leaves: a new version's routers may be about to come."""
    replace_s: float = 30.0
    """An engine whose process is still silent after so long hangs, and is killed: one that died would have come back."""
    heartbeat_s: float = 1.0
    retry_after_s: float = 1.0


@dataclass
class _Silence:
    """Of an engine that has gone silent."""

    since: float
    """When it was last heard of, or killed."""
    patience_s: float
    """How long until it is killed (again)."""


@dataclass(frozen=True)
class _Waiting:
    place: Place
    since: float
    deadline: float

    @property
    def order(self) -> tuple[float, str]:
        """First come first served over the cluster."""
        return (self.place.arrival, self.place.request)


class GlobalScheduler:
    """The scheduler's logic. Feed it with receive(), engine_died() and tick(); send what take_messages() returns."""

    def __init__(self, config: SchedulerConfig, now: float) -> None:
        self.config = config
        self._line: list[_Waiting] = []
        """In order of arrival."""
        self._waiting: dict[str, _Waiting] = {}
        """The same by request."""
        self._engines: dict[str, EngineView] = {}
        self._changed: set[str] = set()
        """Engines that may take now what they did not when the head of the queue was asked for last."""
        self._stuck: _Waiting | None = None
        """This head of the queue, which no other engine takes."""
        self._pools: float | None = None
        """Tokens of all engines' pools; None: to be added up anew."""
        self._over: dict[str, int] = {}
        """By engine: the last epoch known to be over."""
        self._routers: dict[str, float] = {}
        """When each was last heard of."""
        self._greeted: set[str] = set()
        """Routers that know that this scheduler began without their requests."""
        self._totals = Totals()
        self._silent: dict[str, _Silence] = {}
        """By engine."""
        self._messages: list[Send[RouterMessage | EngineMessage]] = []
        self._kills: list[KillEngine] = []
        self._next_heartbeat = now
        self._ticked_at = now
        self._lease_until = now + config.first_router_s
        self._coming_until = now
        self._turn = 0
        self._prefixes = Prefixes(config.max_index_blocks)
        self._turnover = Turnover()

    def take_messages(self) -> list[Send[RouterMessage | EngineMessage]]:
        """All that is to be sent now, in order; each is returned once."""
        messages, self._messages = self._messages, []
        return messages

    def take_kills(self) -> list[KillEngine]:
        """Engines to be killed now; each is returned once."""
        kills, self._kills = self._kills, []
        return kills

    def expect(self, engine: str, now: float) -> None:
        """An engine of this name exists, or will again; if it does not speak, it hangs, and was not heard of before."""
        self._silent.setdefault(engine, _Silence(now, self.config.replace_s))

    def router_comes(self, now: float) -> None:
        """A router is starting: the application is not over before it has had the time to, whoever leaves meanwhile."""
        self._coming_until = now + self.config.first_router_s

    def stop(self) -> None:
        """Tell all routers to end their requests and to take no more."""
        for router in self._routers:
            self._send(router, Stop())

    def lease_over(self, now: float) -> bool:
        """Routers are the application's sign of life: whether all have been silent for the lease's time."""
        return now > max(self._lease_until, self._coming_until)

    @property
    def queued(self) -> int:
        """Requests that wait for an engine."""
        return len(self._line)

    # --- what happens -----------------------------------------------------------------------------------------------

    def receive(self, message: SchedulerMessage, now: float) -> None:
        """Take in one message."""
        match message:
            case Place():
                self._place(message, now)
            case Withdraw():
                self._withdraw(message.request, message.attempt)
            case RouterHello():
                self._hello(message, now)
                if not message.leaving:
                    return
            case EngineReport():
                self._engine_report(message, now)
            case CacheChanges():
                if not self._prefixes.take(message, now):
                    self._send(self._engines[message.engine].report.address, CacheResync(message.engine, message.epoch))
                return
        self._bind(now)

    def counted(self, source: str, samples: list[MetricSample]) -> None:
        """A process's running totals that come in no message, such as those of the scheduler's own mailbox."""
        self._totals.put(source, samples)

    def engine_died(self, engine: str, epoch: int, now: float) -> None:
        """The engine's process is gone, and with it all its epochs up to `epoch`."""
        view = self._engines.get(engine)
        if view is not None and view.report.epoch <= epoch:
            del self._engines[engine]
            self._pools = None
            self.expect(engine, now)
            self._end_epoch(engine, epoch)
            self._tell_status()
        self._bind(now)

    def tick(self, now: float) -> None:
        """Look at the clock: silence, expired bindings and deadlines, heartbeats. Call a few times a second."""
        gap, self._ticked_at = now - self._ticked_at, now
        if gap > self.config.silence_s / 2:  # it was this process that stood still: nobody had a chance to be heard
            self._forgive(gap)
        for view in [v for v in self._engines.values() if now - v.heard_at > self.config.silence_s]:
            self._silent[view.report.engine] = _Silence(view.heard_at, self.config.replace_s)
            self.engine_died(view.report.engine, view.report.epoch, now)
        for engine, silence in self._silent.items():
            if now - silence.since > silence.patience_s:
                silence.since, silence.patience_s = now, 2 * silence.patience_s  # it may be slow to start
                self._kills.append(KillEngine(engine))
        for router in [r for r, heard in self._routers.items() if now - heard > self.config.silence_s]:
            self._router_died(router)
        for view in self._engines.values():
            for key in [key for key, binding in view.bindings.items() if now >= binding.expires]:
                view.unbind(key)
        for waiting in [w for w in self._line if now >= w.deadline]:
            self._refuse(waiting.place, "deadline")
        self._prefixes.tick(now)
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self.config.heartbeat_s
            self._tell_status()
        self._bind(now)

    def _forgive(self, gap: float) -> None:
        for view in self._engines.values():
            view.heard_at += gap
        for silence in self._silent.values():
            silence.since += gap
        for router in self._routers:
            self._routers[router] += gap
        self._lease_until += gap
        self._coming_until += gap

    # --- requests ---------------------------------------------------------------------------------------------------

    def _place(self, place: Place, now: float) -> None:
        self._routers[place.reply_to] = now
        known = self._waiting.get(place.request)
        if known is not None and known.place.attempt > place.attempt:
            return
        self._forget(place.request)
        # A request that ran already and lost its engine is never turned away: its client has seen its first tokens.
        if place.attempt == 0 and len(self._line) >= self.config.max_queue:
            self._refuse(place, "queue_full")
            return
        deadline = math.inf if place.deadline_s is None else now + place.deadline_s
        waiting = self._waiting[place.request] = _Waiting(place, now, deadline)
        bisect.insort(self._line, waiting, key=_order)

    def _withdraw(self, request: str, attempt: int) -> None:
        waiting = self._waiting.get(request)
        if waiting is not None and waiting.place.attempt == attempt:
            self._forget(request)
        for view in self._engines.values():
            view.unbind((request, attempt))

    def _forget(self, request: str) -> None:
        waiting = self._waiting.pop(request, None)
        if waiting is not None:
            del self._line[bisect.bisect_left(self._line, waiting.order, key=_order)]

    def _refuse(self, place: Place, reason: Literal["queue_full", "too_large", "deadline"]) -> None:
        self._forget(place.request)
        retry_after_s = self.config.retry_after_s if reason == "queue_full" else 0.0
        self._send(place.reply_to, Refusal(place.request, place.attempt, reason, retry_after_s))

    def _bind(self, now: float) -> None:
        while self._line:
            waiting = self._line[0]
            place = waiting.place
            if able := self._able(waiting):
                names = unpack(place.names) if self.config.placement == "prefix" else ()
                overlap, pools = self._prefixes.overlap(names), self._pool_tokens()
                view = self._choose(place, able, overlap, pools)
                engine = view.name
                self._forget(place.request)
                known = overlap.get(engine, 0)
                work = place.num_tokens - known * self.config.block_size
                view.bind(place, work, now + self.config.binding_timeout_s)
                if self.config.placement == "prefix":
                    self._turnover.bound(engine, work, pools)
                    self._prefixes.expect(engine, names[known:], now)
                report, waited_s = view.report, now - waiting.since
                source = self._source(overlap, engine) if self.config.kv_pull else None
                placement = Placement(place.request, place.attempt, engine, report.epoch, report.address, waited_s, source)
                self._send(place.reply_to, placement)
            elif place.attempt == 0 and self._larger_than_all(place):
                self._refuse(place, "too_large")
            else:
                return

    def _able(self, waiting: _Waiting) -> list[EngineView]:
        """The engines that take the head of the queue. While there are none, only those that have changed are asked again."""
        place = waiting.place
        changed = [view for name in self._changed if (view := self._engines.get(name))]
        self._changed.clear()
        if waiting is self._stuck and not that_take(changed, place):
            return []
        able = that_take(self._engines.values(), place)
        self._stuck = None if able else waiting
        return able

    def _larger_than_all(self, place: Place) -> bool:
        """Whether some engine is ready, and none that is known, ready or not, holds as many tokens."""
        views = self._engines.values()
        ready = any(view.report.ready for view in views)
        return ready and all(place.longest > view.max_sequence_tokens for view in views)

    def _choose(self, place: Place, able: list[EngineView], overlap: dict[str, int], pools: float) -> EngineView:
        """One of the engines that take it. `overlap`: blocks of the prompt that engines have. `pools`: tokens of all engines'."""
        match self.config.placement:
            case "round_robin":
                self._turn += 1
                return able[self._turn % len(able)]
            case "least_loaded":
                return max(able, key=lambda view: (view.left.sequences, view.left.tokens))
            case "prefix":
                return cheapest(able, place.num_tokens, overlap, self.config.block_size, self._turnover, pools)

    def _source(self, overlap: dict[str, int], engine: str) -> PullSource | None:
        """The engine that has the most of a prompt, where that is more than `engine` has."""
        most = max(overlap.values(), default=0)
        if most <= overlap.get(engine, 0):
            return None
        views = [view for name, blocks in overlap.items() if blocks == most and (view := self._engines.get(name)) is not None]
        ready = [view for view in views if view.report.ready]
        if not ready:
            return None
        source = min(ready, key=lambda view: (view.delay, view.name))
        return PullSource(source.name, source.report.epoch, source.report.address, most)

    def _pool_tokens(self) -> float:
        """Of all engines."""
        if self._pools is None:
            self._pools = sum(view.pool_tokens for view in self._engines.values())
        return self._pools

    # --- engines and routers ----------------------------------------------------------------------------------------

    def _engine_report(self, report: EngineReport, now: float) -> None:
        self._silent.pop(report.engine, None)
        if report.epoch <= self._over.get(report.engine, -1):
            self._send(report.address, EngineDown(report.engine, self._over[report.engine]))
            return
        view = self._engines.get(report.engine)
        if view is None or report.epoch > view.report.epoch:
            self._end_epoch(report.engine, report.epoch - 1)
            limit = 0 if view is None else view.max_sequence_tokens
            self._pools = None
            view = self._engines[report.engine] = EngineView(report, now, limit, self._changed)
            changed = True
        elif report.epoch == view.report.epoch and report.number > view.report.number:
            changed = report.ready != view.report.ready
            if report.capacity != view.report.capacity:
                self._pools = None
            view.hear(report, now)
        else:
            return
        view.max_sequence_tokens = report.max_sequence_tokens or view.max_sequence_tokens
        if not self._prefixes.follow(report.engine, report.epoch, report.cache_changes, now):
            self._send(report.address, CacheResync(report.engine, report.epoch))
        for key in report.accepted:
            view.unbind(key)
        self._totals.put(report.engine, report.metrics)
        if changed:
            self._tell_status()

    def _end_epoch(self, engine: str, epoch: int) -> None:
        """Tell all routers, whether or not they have something there: a stale word is dropped, a missing one is a hung client."""
        self._over[engine] = max(epoch, self._over.get(engine, -1))
        self._prefixes.forget(engine)
        self._turnover.forget(engine)
        for router in self._routers:
            self._send(router, EngineDown(engine, epoch))

    def _hello(self, hello: RouterHello, now: float) -> None:
        self._totals.put(hello.router, hello.metrics)
        if hello.leaving:
            self._leave(hello.router, now)
            return
        if hello.router not in self._greeted:
            self._coming_until = now
            self._greeted.add(hello.router)
            self._send(hello.router, PlaceAgain())
            self._send(hello.router, self.status())
        self._routers[hello.router] = now
        self._lease_until = now + self.config.lease_s

    def _leave(self, router: str, now: float) -> None:
        if router in self._routers:
            self._router_died(router)
        if not self._routers:
            self._lease_until = min(self._lease_until, now + self.config.leave_s)

    def _router_died(self, router: str) -> None:
        del self._routers[router]
        self._greeted.discard(router)
        for waiting in [w for w in self._line if w.place.reply_to == router]:
            self._forget(waiting.place.request)
        for view in self._engines.values():
            self._send(view.report.address, RouterDown(router))

    # --- status -----------------------------------------------------------------------------------------------------

    def status(self) -> ClusterStatus:
        """What the cluster looks like now."""
        engines = [_status(view.report) for view in self._engines.values()]
        return ClusterStatus(engines, len(self._line), self._totals.samples())

    def _tell_status(self) -> None:
        status = self.status()
        for router in self._routers:
            self._send(router, status)

    def _send(self, address: str, message: RouterMessage | EngineMessage) -> None:
        self._messages.append(Send(address, message))


def _status(report: EngineReport) -> EngineStatus:
    return EngineStatus(report.engine, report.epoch, report.ready, report.max_sequence_tokens, report.stats, report.reason)


def _order(waiting: _Waiting) -> tuple[float, str]:
    return waiting.order
