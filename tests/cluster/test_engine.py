"""An engine's life-cycle, one message and one moment at a time."""

import math
from typing import TypeVar

import pytest

from cluster.actions import KillWorkers, Send, StartWorkers
from cluster.engine import Engine
from cluster.epoch import EngineConfig
from cluster.protocol import (
    Cancel,
    Deltas,
    EngineDown,
    EngineReport,
    Ping,
    Pong,
    Rejected,
    Released,
    RouterDown,
    StageTime,
    StageTimes,
    StepPlan,
    StepResult,
    Submit,
    WorkerFailed,
)
from tests.cluster.messages import BATCH, ready, request, result

M = TypeVar("M")


class Bench:
    """An engine with its actions sorted by what they are."""

    def __init__(self, num_ranks: int = 1) -> None:
        config = EngineConfig("e", "e!", "s!", BATCH, num_ranks=num_ranks, step_timeout_s=8.0, load_timeout_s=100.0)
        self.now = 0.0
        self.engine = Engine(config, 10, self.now)
        self.sent: list[tuple[str, object]] = []
        self.killed: list[int] = []
        self.started: list[int] = []
        self.look()

    def look(self) -> None:
        self.sent = []
        for action in self.engine.take_actions():
            match action:
                case Send():
                    self.sent.append((action.address, action.message))
                case KillWorkers():
                    self.killed.append(action.epoch)
                case StartWorkers():
                    self.started.append(action.epoch)

    def all(self, kind: type[M]) -> list[M]:
        self.look()
        return [message for _, message in self.sent if isinstance(message, kind)]

    def tick(self, now: float, frozen: frozenset[int] = frozenset()) -> None:
        """Let the time come to `now`, a second at a time. Workers that are not `frozen` give a sign of life."""
        steps = [self.now + step for step in range(1, math.ceil(now - self.now))]
        for self.now in [*steps, now]:
            for rank in set(range(self.engine.config.num_ranks)) - frozen:
                self.engine.receive(Pong(self.engine.epoch, rank), self.now)
            self.engine.tick(self.now)


@pytest.fixture
def serving() -> Bench:
    bench = Bench()
    bench.engine.receive(ready(10), 0.0)
    bench.look()
    return bench


def test_serves_when_every_rank_is_ready() -> None:
    bench = Bench(num_ranks=2)
    assert bench.started == [10]
    bench.engine.receive(ready(10, 1, num_blocks=9, host_blocks=7), 1.0)
    assert bench.engine.batcher is None
    bench.engine.receive(ready(9, 0), 1.0)
    assert bench.engine.batcher is None, "a rank of an earlier epoch"
    bench.engine.receive(ready(10, 0, host_blocks=5), 1.0)
    assert bench.engine.batcher is not None
    assert bench.engine.batcher.config.num_blocks == 9, "the smallest pool counts"
    assert bench.engine.batcher.config.host_blocks == 5
    assert bench.all(EngineReport)[-1].ready


def test_a_request_from_submit_to_its_last_token(serving: Bench) -> None:
    serving.engine.receive(Submit(10, request(max_tokens=2)), 1.0)
    (plan,) = serving.all(StepPlan)
    serving.engine.receive(result(plan), 2.0)
    serving.look()
    (router, news), (_, second) = [s for s in serving.sent if isinstance(s[1], Deltas | StepPlan)]
    assert router == "router"
    assert isinstance(news, Deltas)
    assert (news.deltas[0].index, news.deltas[0].tokens, news.deltas[0].queued_s) == (0, [7], 0.0)
    assert isinstance(second, StepPlan)
    serving.engine.receive(result(second), 3.0)
    assert serving.all(Deltas)[0].deltas[0].finish == "length"
    assert not serving.engine._requests


def test_a_step_without_result_ends_the_epoch(serving: Bench) -> None:
    serving.engine.receive(Submit(10, request()), 100.0)
    serving.tick(108.0)
    assert serving.engine.epoch == 10, "the time counts from the launch, not from when it was last heard of"
    serving.tick(108.1)
    (released,) = serving.all(Released)
    assert (released.epoch, released.requests) == (10, [("r", 0)])
    assert serving.killed == [10]
    serving.tick(108.2)
    serving.look()
    assert serving.started == [10, 11], "the first failure is no reason to wait"


@pytest.mark.parametrize("busy", [False, True])
def test_every_rank_is_pinged_and_a_silent_one_ends_the_epoch(busy: bool) -> None:
    bench = Bench(num_ranks=3)
    for rank in range(3):
        bench.engine.receive(ready(10, rank), 0.0)
    bench.tick(100.0)
    assert bench.engine.epoch == 10
    bench.look()
    bench.tick(102.1)
    bench.look()
    assert [address for address, message in bench.sent if isinstance(message, Ping)] == ["w0", "w1", "w2"]
    if busy:  # a step may take longer than a worker may be silent
        bench.engine.receive(Submit(10, request()), 102.1)
    bench.tick(110.1, frozen=frozenset({1}))
    assert bench.engine.epoch == 10
    bench.tick(110.3, frozen=frozenset({1}))
    assert bench.engine.epoch == 11
    (message,) = [m for m in bench.all(EngineReport) if m.epoch == 11][:1]
    assert message.reason == "no sign of life from worker 1 for 8 s"


def test_the_time_of_each_stage_is_summed_up(serving: Bench) -> None:
    for stage, seconds in ((0, 0.25), (1, 0.5), (0, 0.5)):
        serving.engine.receive(StageTimes(10, stage, [StageTime(0, 5.0, 5.0 + seconds, 3)]), 1.0)
    serving.engine.receive(StageTimes(9, 0, [StageTime(0, 5.0, 9.0, 3)]), 1.0)
    serving.tick(2.5)
    told = {m.labels: m.value for m in serving.all(EngineReport)[-1].metrics if m.name == "rayline:stage_compute_seconds_total"}
    assert told == {(("engine", "e"), ("stage", "0")): 0.75, (("engine", "e"), ("stage", "1")): 0.5}


def test_a_rank_that_is_ready_is_watched_while_others_load() -> None:
    """It would end itself if its engine were silent."""
    bench = Bench(num_ranks=2)
    bench.engine.receive(ready(10, 1), 0.0)
    pings = 0
    for now in range(1, 91):
        bench.tick(float(now), frozen=frozenset({0}))
        pings += len(bench.all(Ping))
    assert pings >= 30
    assert bench.engine.epoch == 10
    bench.tick(99.0, frozen=frozenset({0, 1}))
    assert bench.engine.epoch == 11


def test_a_stall_is_forgiven_once(serving: Bench) -> None:
    """The message that ended it is no older than it seems."""
    serving.tick(1.0)
    serving.engine.receive(Pong(10, 0), 501.0)
    serving.engine.tick(501.0)
    serving.now = 501.0
    serving.tick(509.5, frozen=frozenset({0}))
    assert serving.engine.epoch == 11


def test_loading_is_given_up_in_time() -> None:
    bench = Bench()
    bench.tick(100.1)
    bench.look()
    assert bench.killed == [10]


def test_backoff_doubles_up_to_its_limit_and_ends_when_the_workers_have_proved_themselves() -> None:
    bench = Bench()
    now, waits = 0.0, []
    for _ in range(8):
        bench.engine.receive(WorkerFailed(epoch=bench.engine.epoch, rank=0, reason="no memory"), now)
        began = now
        while bench.engine._epoch.start_at is not None:
            now += 0.5
            bench.tick(now)
        waits.append(now - began)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
    bench.engine.receive(ready(bench.engine.epoch), now)
    for number in range(100):
        bench.engine.receive(Submit(bench.engine.epoch, request(str(number), max_tokens=1)), now)
        bench.engine.receive(result(bench.all(StepPlan)[0]), now)
    bench.engine.workers_died(bench.engine.epoch, "killed", now)
    bench.tick(now)
    assert bench.engine._epoch.start_at is None


def test_a_night_of_failures_is_survived() -> None:
    bench = Bench()
    for night in range(1100):
        bench.engine.receive(WorkerFailed(epoch=bench.engine.epoch, rank=0, reason="bad checkpoint"), 60.0 * night)
        bench.engine.tick(60.0 * night + 30.0)
        bench.look()
    assert bench.started[-1] == bench.engine.epoch


def test_results_of_an_earlier_epoch_are_dropped(serving: Bench) -> None:
    serving.engine.receive(Submit(10, request()), 1.0)
    (plan,) = serving.all(StepPlan)
    serving.engine.workers_died(10, "killed", 2.0)
    serving.tick(2.0)
    serving.engine.receive(ready(11), 3.0)
    serving.engine.receive(Submit(11, request(attempt=1)), 3.0)
    serving.engine.receive(result(plan), 3.0)
    assert not serving.all(Deltas)
    assert serving.engine.epoch == 11
    serving.engine.workers_died(10, "killed", 4.0)
    assert serving.engine.epoch == 11


@pytest.mark.parametrize("bad", ["error", "step", "missing"])
def test_a_result_that_cannot_be_right_ends_the_epoch_not_the_engine(serving: Bench, bad: str) -> None:
    serving.engine.receive(Submit(10, request()), 1.0)
    (plan,) = serving.all(StepPlan)
    answers = {
        "error": result(plan, error="out of memory"),
        "step": StepResult(epoch=10, step=5, results=[]),
        "missing": StepResult(epoch=10, step=0, results=[]),
    }
    serving.engine.receive(answers[bad], 2.0)
    assert serving.engine.epoch == 11
    assert serving.all(Released)[0].requests == [("r", 0)]


def test_workers_without_a_pool_end_the_epoch_not_the_engine() -> None:
    bench = Bench()
    bench.engine.receive(ready(10, num_blocks=1), 1.0)
    assert bench.engine.epoch == 11


def test_submits_of_another_epoch_are_released(serving: Bench) -> None:
    serving.engine.receive(Submit(9, request()), 1.0)
    (released,) = serving.all(Released)
    assert (released.epoch, released.requests) == (9, [("r", 0)])


def test_an_attempt_is_taken_once_and_replaced_by_a_later_one(serving: Bench) -> None:
    serving.engine.receive(Submit(10, request(attempt=1)), 1.0)
    (plan,) = serving.all(StepPlan)
    for attempt in (1, 0):
        serving.engine.receive(Submit(10, request(attempt=attempt)), 1.0)
        assert serving.engine.batcher is not None
        assert serving.engine.batcher.num_sequences == 1
        assert serving.all(EngineReport)[-1].accepted == [("r", attempt)], "its credit is given back all the same"
    serving.engine.receive(Cancel(request="r", attempt=0, choices=[0]), 1.0)
    assert serving.engine._requests["r"].attempt == 1, "a cancel of an earlier attempt"
    serving.engine.receive(Submit(10, request(attempt=2)), 1.0)
    assert serving.engine._requests["r"].attempt == 2
    serving.engine.receive(result(plan), 2.0)
    assert not serving.all(Deltas), "tokens of the attempt before"


def test_what_cannot_run_is_rejected(serving: Bench) -> None:
    serving.engine.receive(Submit(10, request(prompt=64)), 1.0)
    assert [r.request for r in serving.all(Rejected)] == ["r"]
    assert not serving.engine._requests


def test_nobody_waits_any_more(serving: Bench) -> None:
    serving.engine.receive(Submit(10, request("a", deadline_s=5.0)), 1.0)
    serving.engine.receive(Submit(10, request("b")), 1.0)
    assert serving.engine.batcher is not None
    serving.tick(5.9)
    assert serving.engine.batcher.num_sequences == 2
    serving.tick(6.0)
    assert serving.engine.batcher.num_sequences == 1
    serving.engine.receive(RouterDown("another"), 6.0)
    assert serving.engine.batcher.num_sequences == 1
    serving.engine.receive(RouterDown("router"), 6.0)
    assert serving.engine.batcher.num_sequences == 0
    assert not serving.engine._requests
    assert not serving.engine._deadlines


def test_a_router_wrongly_taken_for_dead_learns_that_its_requests_are_gone(serving: Bench) -> None:
    serving.engine.receive(Submit(10, request()), 1.0)
    serving.engine.receive(RouterDown("router"), 2.0)
    assert serving.all(Released)[0].requests == [("r", 0)]


def test_taken_for_dead_means_an_epoch_beyond_the_one_named(serving: Bench) -> None:
    serving.engine.receive(EngineDown("e", 9), 1.0)
    assert serving.engine.epoch == 10
    serving.engine.receive(EngineDown("e", 20), 1.0)
    assert serving.killed == [] or serving.killed == [10]
    assert serving.engine.epoch > 20, "else every report of it is answered by the next EngineDown"


def test_reports_only_what_changed_and_heartbeats(serving: Bench) -> None:
    serving.tick(0.5)
    assert not serving.all(EngineReport)
    serving.tick(1.1)
    (report,) = serving.all(EngineReport)
    serving.engine.receive(Submit(10, request()), 1.2)
    (next_report,) = serving.all(EngineReport)
    assert next_report.number == report.number + 1
    assert next_report.accepted == [("r", 0)]
    assert next_report.credit.sequences == report.credit.sequences - 1


def test_what_workers_wait_for_is_told_and_blamed_at_the_end() -> None:
    bench = Bench()
    bench.engine.workers_wait(9, "an epoch before", 0.1)
    assert bench.all(EngineReport) == []
    bench.engine.workers_wait(10, "waiting for resources: 2 bundles", 0.2)
    assert [report.reason for report in bench.all(EngineReport)] == ["waiting for resources: 2 bundles"]
    bench.engine.workers_wait(10, "", 3.0)
    assert [report.reason for report in bench.all(EngineReport)] == ["loading"]
    bench.engine.workers_wait(10, "waiting for resources: 1 bundle", 4.0)
    bench.tick(101.0)
    bench.look()
    assert bench.killed == [10]
    bench.engine.workers_wait(10, "too late", 102.0)
    bench.tick(103.0)
    assert "waiting for resources: 1 bundle" in bench.all(EngineReport)[-1].reason


def test_a_scheduler_elsewhere_hears_of_the_engine_at_once(serving: Bench) -> None:
    serving.engine.scheduler_at("s!", 0.1)
    assert serving.all(EngineReport) == []
    serving.engine.scheduler_at("t!", 0.2)
    serving.look()
    assert [address for address, message in serving.sent if isinstance(message, EngineReport)] == ["t!"]
