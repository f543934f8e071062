"""One copy of the model as a state machine: its workers' life-cycle, its requests, its plans in flight. No I/O.

Messages and a clock go in, actions come out; cluster/actors.py carries them out with sockets and Ray, tests in one process on a
virtual clock. The life of the workers:

    start -> [loading] -- every rank ready --> [serving] -- error, death, silence --> [loading] of the next epoch ...

When an epoch ends its requests are released to their routers, which place them again with what was already delivered.
"""

import dataclasses
from collections.abc import Iterable

from cluster.actions import KillWorkers, Send, StartWorkers
from cluster.batcher import Batcher
from cluster.config import ConfigError
from cluster.engine_metrics import EngineMetrics
from cluster.epoch import EngineConfig, Epoch
from cluster.protocol import (
    CacheResync,
    Cancel,
    Credit,
    Deltas,
    EngineDown,
    EngineMessage,
    EngineReport,
    EngineStats,
    Moved,
    Ping,
    Pong,
    Pull,
    Pulled,
    Rejected,
    Released,
    Request,
    RouterDown,
    RouterMessage,
    SchedulerMessage,
    StageTimes,
    StepResult,
    Submit,
    TokenDelta,
    WorkerFailed,
    WorkerMessage,
    WorkerReady,
)
from cluster.pulls import refused

LOAD_FAILED = "could not load"
"""In an engine's reason: not a death, but something that a person has to mend."""
_SETTLED_RESULTS = 100
"""After so many good steps an epoch counts as healthy, and the next failure as the first."""
_STALLED_S = 3.0
_PING_S = 2.0
"""Workers end when they have not heard of their engine for a minute."""


Action = Send[RouterMessage | SchedulerMessage | WorkerMessage | EngineMessage] | StartWorkers | KillWorkers


class Engine:
    """The engine's logic. Feed it with receive(), workers_died() and tick(); carry out what take_actions() returns."""

    def __init__(self, config: EngineConfig, first_epoch: int, now: float) -> None:
        """`first_epoch` must be above every epoch of an engine of this name that was ever started: take unix milliseconds."""
        self.config = config
        self.metrics = EngineMetrics()
        self._scheduler = config.scheduler
        self._actions: list[Action] = []
        self._requests: dict[str, Request] = {}
        self._deadlines: dict[str, float] = {}
        self._accepted: list[tuple[str, int]] = []
        self._failures = 0
        self._reason = "starting"
        self._report_number = 0
        self._news = True
        """Something that the scheduler should hear of before the next heartbeat."""
        self._reported_at = now
        self._ticked_at = now
        self._epoch = Epoch(config, first_epoch, now, start_at=now)
        self.tick(now)

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._epoch.number

    @property
    def batcher(self) -> Batcher | None:
        """The current epoch's, once all workers are ready."""
        return self._epoch.batcher

    def take_actions(self) -> list[Action]:
        """All that is to be done now, in order; each is returned once."""
        actions, self._actions = self._actions, []
        return actions

    # --- what happens -----------------------------------------------------------------------------------------------

    def receive(self, message: EngineMessage, now: float) -> None:
        """Take in one message. Messages of other epochs change nothing."""
        match message:
            case Submit():
                self._submit(message, now)
            case Cancel():
                self._cancel(message)
            case RouterDown():
                self._router_down(message.router)
            case EngineDown() if message.epoch >= self.epoch:
                self._end_epoch("taken for dead by the scheduler", now, next_epoch=message.epoch + 1, failure=False)
            case CacheResync() if message.epoch == self.epoch:
                self._tell_whole(now)
            case StepResult():
                self._result(message, now)
            case Pull() | Pulled() | Moved():
                self._pull(message, now)
            case WorkerReady():
                self._worker_ready(message, now)
            case WorkerFailed() if message.epoch == self.epoch:
                self._end_epoch(f"worker {message.rank} {LOAD_FAILED}: {message.reason}", now)
            case Pong() if message.epoch == self.epoch:
                self._epoch.heard_at[message.rank] = now
            case StageTimes() if message.epoch == self.epoch:
                spent, known = sum(time.end - time.start for time in message.times), self.metrics.stage_seconds
                known[message.stage] = known.get(message.stage, 0.0) + spent
            case _:
                pass
        self._pump(now)

    def workers_died(self, epoch: int, reason: str, now: float) -> None:
        """A worker process of `epoch` is gone."""
        if epoch == self.epoch and self._epoch.start_at is None:
            self._end_epoch(reason, now)
        self._pump(now)

    def workers_wait(self, epoch: int, reason: str, now: float) -> None:
        """The workers of `epoch` can't start yet: /health says why, and load_timeout_s goes on. An empty reason: they can now."""
        if epoch == self.epoch and self.batcher is None and reason != self._epoch.waiting:
            self._epoch.waiting, self._reason, self._news = reason, reason or "loading", True
        self._pump(now)

    def scheduler_at(self, address: str, now: float) -> None:
        """Where the scheduler is to be reached. A new one learns of this engine at once."""
        if address != self._scheduler:
            self._scheduler, self._news = address, True
        self._pump(now)

    def tick(self, now: float) -> None:
        """Look at the clock: time-outs, back-off, heartbeats. Call a few times a second."""
        epoch = self._epoch
        gap, self._ticked_at = now - self._ticked_at, now
        if gap > _STALLED_S:
            epoch.stood_still(gap, now)
        if epoch.start_at is not None and now >= epoch.start_at:
            epoch.start_at, epoch.began_at = None, now
            self.metrics.epochs += 1
            self._actions.append(StartWorkers(epoch.number))
        if epoch.start_at is None:
            self._watch(epoch, now)
        if self._epoch.pulls is not None:
            self._epoch.pulls.tick(now)
        for request in [r for r, deadline in self._deadlines.items() if now >= deadline]:
            self._drop(request)
        self._pump(now)

    def _watch(self, epoch: Epoch, now: float) -> None:
        if reason := epoch.why_over(now):
            self._end_epoch(reason, now)
        elif now - epoch.pinged_at > min(_PING_S, self.config.worker_timeout_s / 4):
            epoch.pinged_at = now
            for worker in epoch.ready.values():
                self._send(worker.address, Ping(epoch.number))

    # --- requests ---------------------------------------------------------------------------------------------------

    def _submit(self, message: Submit, now: float) -> None:
        request, batcher = message.request, self.batcher
        key = (request.id, request.attempt)
        if message.epoch != self.epoch or batcher is None:
            self._send(request.reply_to, Released(self.config.name, message.epoch, [key], "the epoch is over"))
            return
        self._accepted.append(key)
        known = self._requests.get(request.id)
        if known is not None:
            if known.attempt >= request.attempt:
                return
            self._drop(request.id)
        impossible = batcher.why_impossible(request)
        if impossible is not None:
            self._send(request.reply_to, Rejected(request.id, request.attempt, impossible))
            return
        self._requests[request.id] = request
        if request.deadline_s is not None:
            self._deadlines[request.id] = now + request.deadline_s
        sequence = batcher.add(request, now)
        if self._epoch.pulls is not None:
            self._epoch.pulls.pull(sequence, message.source, now)

    def _cancel(self, message: Cancel) -> None:
        known = self._requests.get(message.request)
        if known is not None and known.attempt == message.attempt and self.batcher is not None:
            self.batcher.cancel(message.request, message.choices)
            self._news = True
            self._forget_ended([message.request])

    def _router_down(self, router: str) -> None:
        """Its requests are dropped, and it is told so: it may only have been silent."""
        theirs = [(r.id, r.attempt) for r in self._requests.values() if r.reply_to == router]
        for request, _ in theirs:
            self._drop(request)
        if theirs:
            self._send(router, Released(self.config.name, self.epoch, theirs, "the router was taken for dead"))

    def _drop(self, request: str) -> None:
        if self.batcher is not None:
            self.batcher.cancel(request)
        self._news = True
        self._requests.pop(request, None)
        self._deadlines.pop(request, None)

    def _forget_ended(self, requests: Iterable[str]) -> None:
        assert self.batcher is not None
        for request in requests:
            if not self.batcher.has_request(request):
                self._requests.pop(request, None)
                self._deadlines.pop(request, None)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _pump(self, now: float) -> None:
        """ORCA's loop: launch until as many plans are in flight as there are stages, and one ahead where that helps."""
        epoch, batcher = self._epoch, self.batcher
        while batcher is not None and batcher.wants_plan:
            idle = not batcher.in_flight
            plan = batcher.schedule(now)
            if plan is None:
                break
            if idle:
                epoch.progress_at = now
            self.metrics.steps += 1
            self.metrics.tokens_computed += batcher.in_flight[-1].num_tokens
            self._send(epoch.ready[0].address, plan)
        if epoch.pulls is not None:
            self._actions.extend(epoch.pulls.take_sends())
        self._report(now)
        news = epoch.news.due(now) if epoch.news is not None else None
        if news is not None:
            self._send(self._scheduler, news)

    def _result(self, result: StepResult, now: float) -> None:
        batcher = self.batcher
        if result.epoch != self.epoch or batcher is None:
            return
        if result.error is not None:
            self._end_epoch(f"step {result.step} failed: {result.error}", now)
            return
        if not batcher.expects(result):
            self._end_epoch(f"step {result.step}: not the result that was expected", now)
            return
        launched = batcher.in_flight[0]
        deltas = batcher.update(result)
        if self._epoch.pulls is not None:
            self._epoch.pulls.worth.computed(launched.num_tokens, result.compute_s)
        self._epoch.progress_at = now
        self._epoch.results += 1
        if self._epoch.results == _SETTLED_RESULTS:
            self._failures = 0
        self._deliver(deltas)

    def _pull(self, message: Pull | Pulled | Moved, now: float) -> None:
        pulls = self._epoch.pulls
        if pulls is not None and (isinstance(message, Pulled) or message.epoch == self.epoch):
            pulls.receive(message, now)
        elif isinstance(message, Pull):
            self._send(message.reply_to, refused(message, "gone"))

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        """One message per router, however many of its requests have news."""
        by_router: dict[str, list[TokenDelta]] = {}
        for delta in deltas:
            by_router.setdefault(self._requests[delta.request].reply_to, []).append(delta)
        for router, news in by_router.items():
            self._send(router, Deltas(self.config.name, self.epoch, news))
        ended = [delta.request for delta in deltas if delta.finish is not None]
        self._news = self._news or bool(ended)
        self._forget_ended(ended)

    # --- epochs -----------------------------------------------------------------------------------------------------

    def _worker_ready(self, message: WorkerReady, now: float) -> None:
        if message.epoch != self.epoch or self._epoch.start_at is not None:
            return
        try:
            if self._epoch.is_ready(message, now, self.metrics.pulls):
                self._reason, self._news = "", True
        except ConfigError as error:
            self._end_epoch(f"workers can't serve: {error}", now)

    def _end_epoch(self, reason: str, now: float, next_epoch: int = 0, failure: bool = True) -> None:
        """Everything of this epoch is over. The next one begins at once, or later if the last ones failed early too."""
        over = self._epoch
        suspects: set[str] = set()
        if over.batcher is not None:
            self.metrics.batches += over.batcher.counters
            suspects = {s.request.id for launched in over.batcher.in_flight for s in launched.sequences}
        by_router: dict[str, list[tuple[str, int]]] = {}
        for request in self._requests.values():
            by_router.setdefault(request.reply_to, []).append((request.id, request.attempt))
        for router, requests in by_router.items():
            blamed = [id for id, _ in requests if failure and id in suspects]
            self._send(router, Released(self.config.name, over.number, requests, reason, blamed))
        self._requests.clear()
        self._deadlines.clear()
        self._accepted.clear()
        self._actions.append(KillWorkers(over.number, reason))
        self._reason = reason
        wait = min(self.config.longest_backoff_s, 2.0 ** min(self._failures - 1, 10)) if failure and self._failures else 0.0
        self._failures += failure
        self._epoch = Epoch(self.config, max(over.number + 1, next_epoch), now, start_at=now + wait)
        self._report_number = 0
        self._news = True

    # --- reports ----------------------------------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        """Tell the scheduler when a request came or went, and every heartbeat: at request rate, not once a step."""
        if not self._news and not self._accepted and now - self._reported_at < self.config.heartbeat_s:
            return
        batcher = self.batcher
        credit = batcher.credit() if batcher else Credit(0, 0)
        self._news, self._reported_at = False, now
        self._report_number += 1
        accepted, self._accepted = self._accepted, []
        running = self.metrics
        if batcher is not None:
            running = dataclasses.replace(running, batches=running.batches + batcher.counters)
        report = EngineReport(
            engine=self.config.name,
            epoch=self.epoch,
            number=self._report_number,
            address=self.config.address,
            ready=batcher is not None,
            reason=self._reason,
            credit=credit,
            capacity=batcher.capacity() if batcher else Credit(0, 0),
            max_sequence_tokens=batcher.config.max_sequence_tokens if batcher else 0,
            accepted=accepted,
            stats=batcher.stats() if batcher else EngineStats(),
            metrics=running.samples(self.config.name),
            cache_changes=self._epoch.news.sent if self._epoch.news is not None else 0,
        )
        self._send(self._scheduler, report)

    def _tell_whole(self, now: float) -> None:
        tree, news = self.batcher.kv.tree if self.batcher is not None else None, self._epoch.news
        if tree is not None and news is not None:
            for piece in news.whole(tree, now):
                self._send(self._scheduler, piece)

    def _send(self, address: str, message: RouterMessage | SchedulerMessage | WorkerMessage | EngineMessage) -> None:
        self._actions.append(Send(address, message))
