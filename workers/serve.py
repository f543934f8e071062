"""A rank's loop: plans in, results out. No Ray in here; workers/worker.py is the actor around it.

Two threads. The intake receives: it passes a plan on at once, to the next stage and the tensor-parallel peers, however long the
plans before it still compute (ORCA, section 4.2), and answers pings. The other one computes, plan after plan; what has come when it
begins with one is expected then (see parallel.handoff).
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.channel import Mailbox
from cluster.protocol import Give, Moved, Ping, Pong, StageTime, StageTimes, StepPlan, StepResult, Take, WorkerMessage
from parallel.mesh import Seat

SILENCE_S = 60.0
"""Without a word of the engine, which pings every few seconds, a worker ends after so long."""
_REPORT_S = 1.0

log = logging.getLogger(__name__)


class LostPlanError(RuntimeError):
    """A plan is missing on its way: the epoch is over."""


class Runner(Protocol):
    """What executes plans."""

    times: deque[StageTime]

    @property
    def answers(self) -> bool:
        """Whether its results go to the engine."""
        ...

    def expect(self, plan: StepPlan) -> None:
        """A plan that will be executed after those before it."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one iteration; plans come in order."""
        ...


class Intake:
    """Receives for a rank of one epoch, in a thread of its own, until the engine is silent for too long or close() is called."""

    def __init__(
        self,
        mailbox: Mailbox[WorkerMessage],
        engine: str,
        epoch: int,
        rank: int,
        followers: Sequence[str] = (),
        silence_s: float = SILENCE_S,
        move: Callable[[Give | Take], None] | None = None,
    ) -> None:
        """followers: mailboxes that plans are passed on to, in this order. move: begins a transfer of KV, where that can be."""
        self.plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        """In order; None when no more will come."""
        self.end = ""
        """Why no more will come."""
        self._mailbox, self._engine, self._epoch, self._rank = mailbox, engine, epoch, rank
        self._followers = tuple(followers)
        self._silence_s = silence_s
        self._move = move
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and wait for its end."""
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        try:
            self._receive()
        except Exception as error:
            if self._closing:  # the process is being ended, and its sockets are closed
                return
            log.exception("the intake failed")
            self.end = f"{type(error).__name__}: {error}"
            self._mailbox.send(self._engine, StepResult(epoch=self._epoch, step=-1, results=[], error=self.end))
        finally:
            self.plans.put(None)

    def _receive(self) -> None:
        heard_at, step = time.monotonic(), -1
        while not self._closing:
            message = self._mailbox.receive(timeout_s=0.5)
            now = time.monotonic()
            if message is None:
                if now - heard_at > self._silence_s:
                    self.end = f"the engine has been silent for {self._silence_s:.0f} s"
                    return
                continue
            heard_at = now
            if message.epoch != self._epoch:
                continue
            match message:
                case StepPlan():
                    if message.step not in (0, step + 1):  # ranks that run different plans would mix their sums
                        raise LostPlanError(f"plan {message.step} came after plan {step}")
                    step = message.step
                    for follower in self._followers:
                        if not self._mailbox.send(follower, message):
                            raise LostPlanError(f"plan {step} could not be passed on to {follower}")
                    self.plans.put(message)
                case Ping():
                    self._mailbox.send(self._engine, Pong(self._epoch, self._rank))
                case Give() | Take() if self._move is not None:
                    self._move(message)
                case Give() | Take():
                    error = "this rank moves no KV"
                    moved = Moved(epoch=self._epoch, rank=self._rank, pull=message.pull, seconds=0.0, error=error)
                    self._mailbox.send(self._engine, moved)


def serve_plans(
    runner: Runner,
    intake: Intake,
    mailbox: Mailbox[WorkerMessage],
    engine: str,
    seat: Seat,
    epoch: int,
    executed: Callable[[int], None] = lambda step: None,
) -> str:
    """Execute the intake's plans until no more will come; returns why. executed: is told each step that was.

    An exception of the runner is reported to the engine, which ends the epoch, and ends this too.
    """
    plans: deque[StepPlan] = deque()
    over = False
    reported_at = time.monotonic()
    while True:
        while not over and not (plans and intake.plans.empty()):  # all that has come is expected before the first of it is run
            try:
                plan = intake.plans.get(timeout=_REPORT_S)
            except queue.Empty:
                break
            if plan is None:
                over = True
            else:
                plans.append(plan)
                runner.expect(plan)
        if plans:
            plan = plans.popleft()
            result = _execute(runner, plan)
            executed(plan.step)
            if runner.answers or result.error is not None:
                mailbox.send(engine, result)
            if result.error is not None:
                return result.error
        elif over:
            return intake.end
        if runner.times and time.monotonic() - reported_at > _REPORT_S:
            reported_at = time.monotonic()
            if seat.leader:
                mailbox.send(engine, StageTimes(epoch, seat.stage, list(runner.times)))
            runner.times.clear()


def _execute(runner: Runner, plan: StepPlan) -> StepResult:
    try:
        return runner.execute(plan)
    except Exception as error:
        log.exception("step %d failed", plan.step)
        return StepResult(epoch=plan.epoch, step=plan.step, results=[], error=f"{type(error).__name__}: {error}")
