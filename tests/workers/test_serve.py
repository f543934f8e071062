"""A rank's loop without a model: what is passed on, what is answered, and how it ends."""

from collections import deque
from collections.abc import Iterator

import pytest

from cluster.channel import Mailbox
from cluster.config import Config
from cluster.protocol import (
    EngineMessage,
    Ping,
    Pong,
    StageTime,
    StageTimes,
    StepPlan,
    StepResult,
    WorkerFailed,
    WorkerMessage,
)
from parallel.mesh import Mesh
from workers.rank import run_rank
from workers.serve import Intake, serve_plans

HOST, EPOCH = "127.0.0.1", 5


def plan(step: int, epoch: int = EPOCH) -> StepPlan:
    return StepPlan(epoch=epoch, step=step, admitted=[], chunks=[], copies=[], finished=[])


class FakeRunner:
    """Notes what it is asked for, and fails at one step."""

    def __init__(self, answers: bool = True, fails_at: int = -1) -> None:
        self.answers = answers
        self.times: deque[StageTime] = deque()
        self.calls: list[tuple[str, int]] = []
        self._fails_at = fails_at

    def expect(self, plan: StepPlan) -> None:
        self.calls.append(("expect", plan.step))

    def execute(self, plan: StepPlan) -> StepResult:
        self.calls.append(("execute", plan.step))
        if plan.step == self._fails_at:
            raise ValueError("a broken part")
        self.times.append(StageTime(plan.step, 1.0, 2.0, 3))
        return StepResult(epoch=plan.epoch, step=plan.step, results=[])


@pytest.fixture
def engine() -> Iterator[Mailbox[EngineMessage]]:
    with Mailbox[EngineMessage](EngineMessage, HOST) as mailbox:
        yield mailbox


@pytest.fixture
def worker() -> Iterator[Mailbox[WorkerMessage]]:
    with Mailbox[WorkerMessage](WorkerMessage, HOST) as mailbox:
        yield mailbox


@pytest.fixture
def peer() -> Iterator[Mailbox[WorkerMessage]]:
    with Mailbox[WorkerMessage](WorkerMessage, HOST) as mailbox:
        yield mailbox


def got(mailbox: Mailbox[EngineMessage]) -> EngineMessage:
    message = mailbox.receive(10)
    assert message is not None
    return message


def test_plans_are_passed_on_and_pings_answered_while_nothing_is_computed(
    engine: Mailbox[EngineMessage], worker: Mailbox[WorkerMessage], peer: Mailbox[WorkerMessage]
) -> None:
    intake = Intake(worker, engine.address, EPOCH, 3, [peer.address])
    for message in (plan(0), plan(0, epoch=4), Ping(EPOCH), Ping(4), plan(1)):
        engine.send(worker.address, message)
    assert [peer.receive(10), peer.receive(10)] == [plan(0), plan(1)]
    assert got(engine) == Pong(EPOCH, 3)
    assert [intake.plans.get(timeout=10), intake.plans.get(timeout=10)] == [plan(0), plan(1)]
    intake.close()
    assert intake.plans.get(timeout=10) is None
    assert engine.receive(0) is None


def test_results_and_times_go_to_the_engine_and_an_error_ends_it(
    engine: Mailbox[EngineMessage], worker: Mailbox[WorkerMessage]
) -> None:
    intake = Intake(worker, engine.address, EPOCH, 0)
    for step in range(4):
        engine.send(worker.address, plan(step))
    runner = FakeRunner(fails_at=2)
    assert serve_plans(runner, intake, worker, engine.address, Mesh().seat(0), EPOCH) == "ValueError: a broken part"
    assert [c for c in runner.calls if c[0] == "execute"] == [("execute", step) for step in range(3)]
    assert all(runner.calls.index(("expect", step)) < runner.calls.index(("execute", step)) for step in range(3))
    answers = [got(engine) for _ in range(3)]
    told = [(answer.step, answer.error) for answer in answers if isinstance(answer, StepResult)]
    assert told == [(0, None), (1, None), (2, "ValueError: a broken part")]
    intake.close()


@pytest.mark.parametrize("leader", [True, False])
def test_times_are_told_by_leaders_and_kept_by_nobody(
    engine: Mailbox[EngineMessage], worker: Mailbox[WorkerMessage], leader: bool
) -> None:
    intake = Intake(worker, engine.address, EPOCH, 0, silence_s=2.0)
    engine.send(worker.address, plan(0))
    runner = FakeRunner(answers=False)
    seat = Mesh(tp=2).seat(0 if leader else 1)
    end = serve_plans(runner, intake, worker, engine.address, seat, EPOCH)
    assert end == "the engine has been silent for 2 s"
    assert not runner.times
    assert engine.receive(0.2) == (StageTimes(EPOCH, 0, [StageTime(0, 1.0, 2.0, 3)]) if leader else None)
    intake.close()


def test_a_plan_that_is_missing_ends_the_epoch(engine: Mailbox[EngineMessage], worker: Mailbox[WorkerMessage]) -> None:
    intake = Intake(worker, engine.address, EPOCH, 0)
    for step in (0, 1, 3):
        engine.send(worker.address, plan(step))
    end = serve_plans(FakeRunner(answers=False), intake, worker, engine.address, Mesh().seat(0), EPOCH)
    assert end == "LostPlanError: plan 3 came after plan 1"
    answer = got(engine)
    assert isinstance(answer, StepResult)
    assert answer.error == end
    intake.close()


def test_a_plan_that_cannot_be_passed_on_ends_the_epoch(engine: Mailbox[EngineMessage], worker: Mailbox[WorkerMessage]) -> None:
    intake = Intake(worker, engine.address, EPOCH, 0, ["no address"])
    engine.send(worker.address, plan(0))
    assert "could not be passed on to no address" in serve_plans(
        FakeRunner(), intake, worker, engine.address, Mesh().seat(0), EPOCH
    )
    intake.close()


def test_a_model_that_is_not_there_is_reported(engine: Mailbox[EngineMessage]) -> None:
    config = Config("/no/such/model", device="cpu")
    assert "no such model directory" in run_rank(config, 0, EPOCH, engine.address, "", "", HOST)
    message = got(engine)
    assert isinstance(message, WorkerFailed)
    assert (message.epoch, message.rank) == (EPOCH, 0)
