"""A worker's loop: plans in, results out. No Ray in here; workers/worker.py is the actor around it."""

import logging
import time
from typing import Protocol

from cluster.channel import Mailbox
from cluster.protocol import Ping, Pong, StepPlan, StepResult, WorkerMessage

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What executes plans."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one iteration; plans come in order."""
        ...


def serve_plans(runner: Runner, mailbox: Mailbox[WorkerMessage], engine: str, epoch: int, rank: int, silence_s: float) -> str:
    """Execute plans of `epoch` until the engine has been silent for `silence_s`; returns why it ended.

    An exception of the runner is reported to the engine, which ends the epoch.
    """
    heard_at = time.monotonic()
    while True:
        message = mailbox.receive(timeout_s=1.0)
        if message is None:
            if time.monotonic() - heard_at > silence_s:
                return f"the engine has been silent for {silence_s:.0f} s"
            continue
        heard_at = time.monotonic()
        if message.epoch != epoch:
            continue
        match message:
            case StepPlan():
                mailbox.send(engine, _execute(runner, message))
            case Ping():
                mailbox.send(engine, Pong(epoch, rank))


def _execute(runner: Runner, plan: StepPlan) -> StepResult:
    try:
        return runner.execute(plan)
    except Exception as error:
        log.exception("step %d failed", plan.step)
        return StepResult(epoch=plan.epoch, step=plan.step, results=[], error=f"{type(error).__name__}: {error}")
