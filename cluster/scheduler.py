"""The cluster's one queue as a state machine: who waits, which engine takes whom. No I/O.

Binding is late: an engine grants credit (tokens and sequences it can take now), and the request that arrived first is bound when
some engine's credit covers it. First come first served: nobody overtakes the head of the queue. Credit is what an engine's last
report says, less what was bound to it and not yet accepted there; a binding that is never accepted (its router died) expires. So
a lost message costs a moment, never correctness.
"""

import bisect
from dataclasses import dataclass, field

from cluster.config import PlacementPolicy
from cluster.metrics import Totals
from cluster.protocol import (
    ClusterStatus,
    EngineDown,
    EngineMessage,
    EngineReport,
    EngineStatus,
    Place,
    Placement,
    Refusal,
    RouterDown,
    RouterHello,
    RouterMessage,
    SchedulerMessage,
    Withdraw,
)


@dataclass(frozen=True)
class Send:
    """Put a message into the mailbox at `address`."""

    address: str
    message: RouterMessage | EngineMessage


@dataclass(frozen=True)
class SchedulerConfig:
    """Settings of the cluster's queue. Times in seconds."""

    max_queue: int = 1024
    placement: PlacementPolicy = "least_loaded"
    binding_timeout_s: float = 10.0
    """A bound request not accepted by then gives its credit back."""
    silence_s: float = 10.0
    """An engine or router not heard of for so long is taken for dead."""
    lease_s: float = 60.0
    """The application is over when no router was heard of for so long."""
    heartbeat_s: float = 1.0
    retry_after_s: float = 1.0


@dataclass
class _Binding:
    tokens: int
    sequences: int
    expires: float


@dataclass
class _EngineView:
    """An engine as its last report, and what was bound to it since, show it."""

    report: EngineReport
    heard_at: float
    bindings: dict[tuple[str, int], _Binding] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Credit left."""
        return self.report.credit.tokens - sum(b.tokens for b in self.bindings.values())

    @property
    def sequences(self) -> int:
        """Credit left."""
        return self.report.credit.sequences - sum(b.sequences for b in self.bindings.values())

    def takes(self, place: Place) -> bool:
        """Whether the credit covers `place`; an idle engine takes whatever can ever run there."""
        if not self.report.ready or place.longest > self.report.max_sequence_tokens:
            return False
        idle = self.report.credit == self.report.capacity and not self.bindings
        return idle or (self.tokens >= place.num_tokens and self.sequences >= place.sequences)


@dataclass(order=True)
class _Waiting:
    order: tuple[float, str]
    place: Place = field(compare=False)
    since: float = field(compare=False)
    deadline: float | None = field(compare=False)


class GlobalScheduler:
    """The scheduler's logic. Feed it with receive(), engine_died() and tick(); send what take_messages() returns."""

    def __init__(self, config: SchedulerConfig, incarnation: str, now: float) -> None:
        """`incarnation`: drawn anew at every start."""
        self.config = config
        self.incarnation = incarnation
        self._queue: list[_Waiting] = []
        self._engines: dict[str, _EngineView] = {}
        self._over: dict[str, int] = {}
        """By engine: the last epoch known to be over."""
        self._routers: dict[str, float] = {}
        """When each was last heard of."""
        self._totals = Totals()
        self._messages: list[Send] = []
        self._next_heartbeat = now
        self._router_heard_at: float | None = None
        self._turn = 0

    def take_messages(self) -> list[Send]:
        """All that is to be sent now, in order; each is returned once."""
        messages, self._messages = self._messages, []
        return messages

    def lease_over(self, now: float) -> bool:
        """Routers are the application's sign of life: whether there were some, and all have been silent for the lease's time."""
        return self._router_heard_at is not None and now - self._router_heard_at > self.config.lease_s

    @property
    def queued(self) -> int:
        """Requests that wait for an engine."""
        return len(self._queue)

    # --- what happens -----------------------------------------------------------------------------------------------

    def receive(self, message: SchedulerMessage, now: float) -> None:
        """Take in one message."""
        match message:
            case Place():
                self._place(message, now)
            case Withdraw():
                self._withdraw((message.request, message.attempt))
            case RouterHello():
                if message.router not in self._routers:
                    self._send(message.router, self.status())
                self._routers[message.router] = self._router_heard_at = now
                self._totals.put(message.router, message.metrics)
            case EngineReport():
                self._engine_report(message, now)
        self._bind(now)

    def engine_died(self, engine: str, now: float) -> None:
        """The engine's process is gone: all its epochs so far are over."""
        view = self._engines.pop(engine, None)
        if view is not None:
            self._end_epoch(engine, view.report.epoch)
            self._totals.retire(engine)
            self._tell_status()
        self._bind(now)

    def tick(self, now: float) -> None:
        """Look at the clock: silence, expired bindings and deadlines, heartbeats. Call a few times a second."""
        for engine in [e for e, view in self._engines.items() if now - view.heard_at > self.config.silence_s]:
            self.engine_died(engine, now)
        for router in [r for r, heard in self._routers.items() if now - heard > self.config.silence_s]:
            self._router_died(router)
        for view in self._engines.values():
            view.bindings = {key: b for key, b in view.bindings.items() if now < b.expires}
        late = [w for w in self._queue if w.deadline is not None and now >= w.deadline]
        for waiting in late:
            self._queue.remove(waiting)
            self._send(waiting.place.reply_to, Refusal(waiting.place.request, waiting.place.attempt, "deadline"))
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + self.config.heartbeat_s
            self._tell_status()
        self._bind(now)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _place(self, place: Place, now: float) -> None:
        ready = [view.report for view in self._engines.values() if view.report.ready]
        if ready and all(place.longest > report.max_sequence_tokens for report in ready):
            self._send(place.reply_to, Refusal(place.request, place.attempt, "too_large"))
            return
        # A request that runs already and lost its engine is never turned away: its client has seen its first tokens.
        if place.attempt == 0 and len(self._queue) >= self.config.max_queue:
            refusal = Refusal(place.request, place.attempt, "queue_full", self.config.retry_after_s)
            self._send(place.reply_to, refusal)
            return
        self._withdraw((place.request, place.attempt))
        deadline = None if place.deadline_s is None else now + place.deadline_s
        bisect.insort(self._queue, _Waiting((place.arrival, place.request), place, now, deadline))

    def _withdraw(self, key: tuple[str, int]) -> None:
        self._queue = [w for w in self._queue if (w.place.request, w.place.attempt) != key]
        for view in self._engines.values():
            view.bindings.pop(key, None)

    def _bind(self, now: float) -> None:
        while self._queue:
            waiting = self._queue[0]
            view = self._choose(waiting.place)
            if view is None:
                return
            self._queue.pop(0)
            place, report = waiting.place, view.report
            binding = _Binding(place.num_tokens, place.sequences, now + self.config.binding_timeout_s)
            view.bindings[place.request, place.attempt] = binding
            placement = Placement(
                place.request, place.attempt, report.engine, report.epoch, report.address, waited_s=now - waiting.since
            )
            self._send(place.reply_to, placement)

    def _choose(self, place: Place) -> _EngineView | None:
        able = [view for view in self._engines.values() if view.takes(place)]
        if not able:
            return None
        if self.config.placement == "round_robin":
            self._turn += 1
            return able[self._turn % len(able)]
        return max(able, key=lambda view: (view.sequences, view.tokens))

    # --- engines and routers ----------------------------------------------------------------------------------------

    def _engine_report(self, report: EngineReport, now: float) -> None:
        if report.epoch <= self._over.get(report.engine, -1):
            self._send(report.address, EngineDown(report.engine, self._over[report.engine]))
            return
        view = self._engines.get(report.engine)
        if view is None or report.epoch > view.report.epoch:
            self._end_epoch(report.engine, report.epoch - 1)
            view = self._engines[report.engine] = _EngineView(report, now)
            changed = True
        elif report.epoch == view.report.epoch and report.number > view.report.number:
            changed = report.ready != view.report.ready
            view.report, view.heard_at = report, now
        else:
            return
        for key in report.accepted:
            view.bindings.pop(key, None)
        self._totals.put(report.engine, report.metrics)
        if changed:
            self._tell_status()

    def _end_epoch(self, engine: str, epoch: int) -> None:
        """Tell all routers, whether or not they have something there: a stale word is dropped, a missing one is a hung client."""
        self._over[engine] = max(epoch, self._over.get(engine, -1))
        for router in self._routers:
            self._send(router, EngineDown(engine, epoch))

    def _router_died(self, router: str) -> None:
        del self._routers[router]
        self._totals.retire(router)
        self._queue = [w for w in self._queue if w.place.reply_to != router]
        for view in self._engines.values():
            self._send(view.report.address, RouterDown(router))

    # --- status -----------------------------------------------------------------------------------------------------

    def status(self) -> ClusterStatus:
        """What the cluster looks like now."""
        engines = [_status(view.report) for view in self._engines.values()]
        return ClusterStatus(self.incarnation, engines, len(self._queue), self._totals.samples())

    def _tell_status(self) -> None:
        status = self.status()
        for router in self._routers:
            self._send(router, status)

    def _send(self, address: str, message: RouterMessage | EngineMessage) -> None:
        self._messages.append(Send(address, message))


def _status(report: EngineReport) -> EngineStatus:
    return EngineStatus(report.engine, report.epoch, report.ready, report.max_sequence_tokens, report.stats, report.reason)
