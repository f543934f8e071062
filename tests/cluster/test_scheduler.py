"""The cluster's queue: order, credit, late binding, and who is told of whose death."""

from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.actions import KillEngine
from cluster.config import PlacementPolicy
from cluster.protocol import (
    ClusterStatus,
    EngineDown,
    EngineReport,
    MetricSample,
    Place,
    Placement,
    Refusal,
    RouterDown,
    RouterHello,
    Stop,
    Withdraw,
)
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from tests.cluster.messages import place, report

M = TypeVar("M")


class Bench:
    def __init__(self, config: SchedulerConfig | None = None) -> None:
        self.now = 0.0
        self.scheduler = GlobalScheduler(config or SchedulerConfig(max_queue=3), self.now)

    def tick(self, now: float) -> None:
        """Let the time come to `now`, a second at a time."""
        while self.now + 1.0 < now:
            self.now += 1.0
            self.scheduler.tick(self.now)
        self.now = now
        self.scheduler.tick(now)

    def receive(self, *messages: Place | Withdraw | RouterHello | EngineReport, now: float = 0.0) -> None:
        for message in messages:
            self.scheduler.receive(message, now)

    def sent(self, kind: type[M]) -> list[tuple[str, M]]:
        return [(s.address, s.message) for s in self.scheduler.take_messages() if isinstance(s.message, kind)]

    def placed(self) -> list[tuple[str, str]]:
        return [(p.request, p.engine) for _, p in self.sent(Placement)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_waits_for_credit_and_is_bound_late(bench: Bench) -> None:
    bench.receive(place("a"), now=1.0)
    assert bench.placed() == []
    bench.receive(report(), now=3.0)
    ((address, placement),) = bench.sent(Placement)
    assert address == "router"
    assert (placement.engine, placement.epoch, placement.address, placement.waited_s) == ("e", 1, "e!", 2.0)


def test_the_first_to_arrive_is_the_first_to_be_bound(bench: Bench) -> None:
    bench.receive(place("b", arrival=2.0), place("a", arrival=1.0), place("c", arrival=3.0), report(tokens=8, sequences=4))
    assert bench.placed() == [("a", "e"), ("b", "e")]


def test_nobody_overtakes_the_head(bench: Bench) -> None:
    bench.receive(report(tokens=10), place("big", tokens=11, arrival=1.0), place("small", tokens=1, arrival=2.0))
    assert bench.placed() == []


@pytest.mark.parametrize(("tokens", "sequences", "taken"), [(8, 4, 2), (11, 4, 2), (63, 1, 1), (3, 4, 0)])
def test_credit_is_not_given_twice(bench: Bench, tokens: int, sequences: int, taken: int) -> None:
    bench.receive(report(tokens=tokens, sequences=sequences), *(place(str(i)) for i in range(3)))
    assert len(bench.placed()) == taken
    bench.receive(report(tokens=tokens, sequences=sequences, number=2))
    assert bench.placed() == [], "the same credit, not yet less what was bound"


def test_accepted_bindings_are_the_engines_to_count(bench: Bench) -> None:
    bench.receive(report(tokens=4), place("a"), place("b"))
    assert bench.placed() == [("a", "e")]
    bench.receive(report(tokens=4, number=2, accepted=[("a", 0)]))
    assert bench.placed() == [("b", "e")]


def test_a_binding_never_accepted_expires(bench: Bench) -> None:
    bench.receive(report(tokens=4), place("a"), place("b"))
    bench.receive(report(tokens=4, number=2), now=9.0)
    bench.tick(9.9)
    assert bench.placed() == [("a", "e")]
    bench.tick(10.0)
    assert bench.placed() == [("b", "e")]


def test_a_withdrawn_binding_gives_its_credit_back(bench: Bench) -> None:
    bench.receive(report(tokens=4), place("a"), place("b"), Withdraw("a", 0))
    assert bench.placed() == [("a", "e"), ("b", "e")]


def test_an_idle_engine_takes_whatever_fits_it_alone(bench: Bench) -> None:
    bench.receive(report(), place("wide", tokens=80, sequences=9), place("next"))
    assert bench.placed() == [("wide", "e")]


def test_a_full_queue_turns_away_the_new_but_not_those_that_ran(bench: Bench) -> None:
    bench.receive(*(place(str(i)) for i in range(4)), place("ran", attempt=1))
    assert [(r.request, r.reason) for _, r in bench.sent(Refusal)] == [("3", "queue_full")]
    assert bench.scheduler.queued == 4


def test_placing_again_what_waits_already_is_not_turned_away(bench: Bench) -> None:
    bench.receive(*(place(str(i)) for i in range(3)), place("0"))
    assert bench.sent(Refusal) == []
    assert bench.scheduler.queued == 3


def test_too_large_for_all(bench: Bench) -> None:
    bench.receive(report("e", longest=64), report("f", longest=32), place("a", longest=64), place("b", longest=65))
    assert bench.placed() == [("a", "e")]


def test_one_that_turns_out_too_large_does_not_block_the_queue(bench: Bench) -> None:
    """Placed while every engine was still loading."""
    bench.receive(report(ready=False), place("huge", longest=65, arrival=1.0), place("a", arrival=2.0))
    bench.receive(report(number=2))
    sent = [s.message for s in bench.scheduler.take_messages()]
    assert [m.reason for m in sent if isinstance(m, Refusal)] == ["too_large"]
    assert [m.request for m in sent if isinstance(m, Placement)] == ["a"]


def test_what_ran_on_a_larger_engine_waits_for_its_return(bench: Bench) -> None:
    bench.receive(report("large", longest=64), report("small", longest=32))
    bench.receive(report("large", epoch=2, ready=False), place("a", attempt=1, longest=64))
    assert bench.sent(Refusal) == []


def test_deadline_in_the_queue(bench: Bench) -> None:
    bench.receive(place("a", deadline_s=5.0), place("b"), now=1.0)
    bench.tick(5.9)
    assert bench.sent(Refusal) == []
    bench.tick(6.0)
    assert [(r.request, r.reason) for _, r in bench.sent(Refusal)] == [("a", "deadline")]
    assert bench.scheduler.queued == 1


def test_older_reports_and_epochs_are_dropped(bench: Bench) -> None:
    bench.receive(report(number=2, tokens=0), report(number=1), place("a"))
    assert bench.placed() == []
    bench.receive(report(epoch=2, tokens=0), report(epoch=1, number=9))
    assert bench.placed() == []


def test_a_new_epoch_ends_the_bindings_and_epochs_before_it(bench: Bench) -> None:
    bench.receive(RouterHello("router", []), report(tokens=4), place("a"))
    bench.scheduler.take_messages()
    bench.receive(report(epoch=3, tokens=4))
    assert (("router", EngineDown("e", 2))) in bench.sent(EngineDown)
    bench.receive(place("b"))
    assert bench.placed() == [("b", "e")]


def test_silence_is_death_and_the_dead_are_told(bench: Bench) -> None:
    bench.receive(RouterHello("router", []), report(), now=1.0)
    bench.scheduler.take_messages()
    for now in (5.0, 11.0):
        bench.receive(RouterHello("router", []), now=now)
        bench.tick(now)
    assert bench.sent(EngineDown) == [], "ten seconds are not over"
    bench.tick(11.5)
    assert bench.sent(EngineDown) == [("router", EngineDown("e", 1))]
    bench.receive(report(number=2), place("a"))
    assert bench.sent(EngineDown) == [("e!", EngineDown("e", 1))]
    bench.receive(report(epoch=2))
    assert bench.placed() == [("a", "e")]


def test_a_scheduler_that_slept_does_not_take_all_others_for_dead(bench: Bench) -> None:
    bench.receive(RouterHello("router", []), report(), now=1.0)
    bench.scheduler.take_messages()
    bench.scheduler.tick(1.0)
    bench.scheduler.tick(60.0)
    assert bench.sent(EngineDown) == [], "nothing could be heard meanwhile; the mailbox is yet to be read"


def test_a_silent_router_is_forgotten_and_engines_are_told(bench: Bench) -> None:
    bench.receive(RouterHello("router", []), place("a"), place("b", reply_to="other"))
    for now in (9.0, 10.5):
        bench.receive(report(number=int(now), tokens=0), RouterHello("other", []), now=now)
        bench.tick(now)
    assert bench.sent(RouterDown) == [("e!", RouterDown("router"))]
    assert bench.scheduler.queued == 1


def test_a_router_that_only_placed_is_told_of_deaths_too(bench: Bench) -> None:
    """After a restart of the scheduler its first word may be a Place."""
    bench.receive(report(), place("a"))
    bench.scheduler.engine_died("e", 1, 1.0)
    assert ("router", EngineDown("e", 1)) in bench.sent(EngineDown)


def test_a_new_router_is_told_the_status_and_the_heartbeat_goes_to_all(bench: Bench) -> None:
    bench.receive(report(), RouterHello("x", []))
    assert [(a, [e.engine for e in s.engines]) for a, s in bench.sent(ClusterStatus)] == [("x", ["e"])]
    bench.tick(0.0)
    assert [a for a, _ in bench.sent(ClusterStatus)] == ["x"]


def test_counters_outlive_their_process_but_count_once(bench: Bench) -> None:
    def total() -> float:
        return sum(sample.value for sample in bench.scheduler.status().metrics)

    def counted(value: float) -> list[MetricSample]:
        return [MetricSample("steps", (), value)]

    bench.receive(report(metrics=counted(5.0)), report("f", metrics=counted(2.0)))
    assert total() == 7
    bench.receive(report(number=2, epoch=2, metrics=counted(1.0)))
    assert total() == 8, "a new process counts from zero"
    bench.scheduler.engine_died("e", 2, 0.0)
    assert total() == 8
    bench.receive(report(epoch=3, metrics=counted(3.0)))
    assert total() == 10, "the same process again, wrongly taken for dead: 5 + 3 + 2"
    for value in (1.0, 4.0):
        bench.scheduler.counted("scheduler", counted(value))
    assert total() == 14, "the process's own are the latest totals too"


def test_round_robin_takes_turns() -> None:
    bench = Bench(SchedulerConfig(placement="round_robin"))
    bench.receive(report("e"), report("f"), *(place(str(i), arrival=i) for i in range(4)))
    assert sorted(engine for _, engine in bench.placed()) == ["e", "e", "f", "f"]


def test_least_loaded_takes_the_one_with_most_credit(bench: Bench) -> None:
    bench.receive(report("e", sequences=2), report("f", sequences=4), *(place(str(i), arrival=i) for i in range(3)))
    assert [engine for _, engine in bench.placed()][:2] == ["f", "f"]


def test_an_engine_that_stays_silent_is_killed_again_and_again(bench: Bench) -> None:
    bench.receive(report(), now=1.0)
    bench.tick(31.0)
    assert bench.scheduler.take_kills() == [], "its silence was noticed long ago; a new process would take some seconds"
    bench.tick(31.5)
    assert bench.scheduler.take_kills() == [KillEngine("e")]
    bench.tick(91.0)
    assert bench.scheduler.take_kills() == [], "it may be slow to start: each time it gets longer"
    bench.tick(92.0)
    assert bench.scheduler.take_kills() == [KillEngine("e")]
    bench.tick(211.0)
    assert bench.scheduler.take_kills() == []
    bench.tick(213.0)
    assert bench.scheduler.take_kills() == [KillEngine("e")]


def test_an_engine_that_speaks_again_is_not_killed(bench: Bench) -> None:
    bench.receive(report(), now=1.0)
    bench.tick(20.0)
    bench.receive(report(epoch=2), now=20.0)
    bench.tick(29.0)
    bench.receive(report(epoch=2, number=2), now=29.0)
    bench.tick(38.0)
    assert bench.scheduler.take_kills() == []


def test_an_engine_silent_since_before_the_scheduler_is_killed_too(bench: Bench) -> None:
    bench.scheduler.expect("e", 0.0)
    bench.scheduler.expect("f", 0.0)
    bench.receive(report("f"), now=5.0)
    bench.tick(31.0)
    assert bench.scheduler.take_kills() == [KillEngine("e")]


def test_an_engine_that_hangs_before_its_first_word_after_a_death_is_killed_too(bench: Bench) -> None:
    bench.receive(report(), now=1.0)
    bench.scheduler.engine_died("e", 1, 2.0)
    bench.tick(31.0)
    assert bench.scheduler.take_kills() == []
    bench.tick(33.0)
    assert bench.scheduler.take_kills() == [KillEngine("e")]


def test_a_scheduler_that_slept_kills_nobody(bench: Bench) -> None:
    bench.receive(report(), now=1.0)
    bench.tick(20.0)
    bench.scheduler.tick(300.0)
    assert bench.scheduler.take_kills() == []


def test_a_router_that_is_coming_keeps_what_the_last_one_leaves(bench: Bench) -> None:
    """A redeploy ends the old replica first."""
    bench.receive(RouterHello("x", []), now=1.0)
    bench.scheduler.router_comes(2.0)
    bench.receive(RouterHello("x", [], True), now=3.0)
    assert not bench.scheduler.lease_over(300.0)
    bench.receive(RouterHello("y", []), now=300.0)
    bench.receive(RouterHello("y", [], True), now=301.0)
    assert not bench.scheduler.lease_over(305.0)
    assert bench.scheduler.lease_over(307.0), "it has come and gone"


def test_a_router_that_never_comes_is_waited_for_as_long_as_the_first(bench: Bench) -> None:
    bench.scheduler.router_comes(1.0)
    bench.receive(RouterHello("x", [], True), now=3.0)
    assert not bench.scheduler.lease_over(600.0)
    assert bench.scheduler.lease_over(602.0)


def test_when_the_last_router_has_left_the_lease_is_short(bench: Bench) -> None:
    bench.receive(RouterHello("x", []), RouterHello("y", []), place("a", reply_to="x"), now=1.0)
    bench.receive(RouterHello("x", [], leaving=True), now=2.0)
    bench.tick(10.0)
    assert not bench.scheduler.lease_over(10.0), "the other one is there"
    assert bench.scheduler.queued == 0
    bench.receive(RouterHello("y", [], leaving=True), now=10.0)
    assert not bench.scheduler.lease_over(15.0)
    assert bench.scheduler.lease_over(15.1)


def test_a_new_router_after_the_last_goodbye_keeps_the_lease(bench: Bench) -> None:
    bench.receive(RouterHello("x", []), RouterHello("x", [], leaving=True), RouterHello("y", []), now=1.0)
    assert not bench.scheduler.lease_over(60.9)
    assert bench.scheduler.lease_over(61.1), "without a goodbye it is the heartbeat that counts"


def test_a_goodbye_of_one_unknown_does_not_end_what_never_began(bench: Bench) -> None:
    bench.receive(RouterHello("x", []), now=1.0)
    bench.receive(RouterHello("z", [], leaving=True), now=1.0)
    assert not bench.scheduler.lease_over(30.0)


def test_stop_is_told_to_all_routers(bench: Bench) -> None:
    bench.receive(RouterHello("x", []), place("a", reply_to="y"))
    bench.scheduler.stop()
    assert [address for address, _ in bench.sent(Stop)] == ["x", "y"]


@given(st.data())
def test_asking_only_engines_that_have_changed_changes_nothing(data: st.DataObject) -> None:
    """Beside a scheduler that asks all engines each time."""
    policies: list[PlacementPolicy] = ["round_robin", "least_loaded", "prefix"]
    policy = data.draw(st.sampled_from(policies))
    ours, asking_all = (GlobalScheduler(SchedulerConfig(max_queue=5, placement=policy), 0.0) for _ in range(2))
    now, epochs = 0.0, dict.fromkeys("abc", 1)
    small, engine, request = st.integers(0, 70), st.sampled_from("abc"), st.sampled_from("rstuv")
    told: Place | EngineReport | Withdraw | None
    for number in range(1, data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["place", "place", "report", "report", "withdraw", "die", "time"])):
            case "place":
                told = place(data.draw(request), tokens=data.draw(small), longest=data.draw(small), arrival=data.draw(small) / 1.0)
            case "report":
                name, tokens, accepted = data.draw(engine), data.draw(small), [(data.draw(request), 0)]
                told = report(name, epochs[name], number, tokens, accepted=accepted, ready=data.draw(st.booleans()))
            case "withdraw":
                told = Withdraw(data.draw(request), 0)
            case "die":
                name = data.draw(engine)
                for scheduler in (ours, asking_all):
                    scheduler.engine_died(name, epochs[name], now)
                epochs[name] += 1
                continue
            case _:
                told = None
                now += 4.0
        asking_all._stuck = None
        for scheduler in (ours, asking_all):
            if told is None:
                scheduler.tick(now)
            else:
                scheduler.receive(told, now)
        assert ours.take_messages() == asking_all.take_messages()
        assert ours.take_kills() == asking_all.take_kills()
