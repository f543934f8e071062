"""Placement by prefixes: what engines tell, how the scheduler keeps it, and where requests go."""

import dataclasses

import pytest

from cluster import cache_news, structs
from cluster.actions import Send
from cluster.cache_news import CacheNews
from cluster.engine import Engine
from cluster.epoch import EngineConfig
from cluster.prefixes import Prefixes
from cluster.protocol import CacheChanges, CacheResync, EngineStats, Place, Placement, Submit
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from kv.blocks import BlockPool
from kv.index import unpack
from kv.names import BlockNames, pack
from kv.radix import NO_MATCH, RadixTree
from tests.cluster.messages import BATCH, place, ready, report, request, result

SIZE = BATCH.block_size
NAMES = BlockNames("secret", SIZE)
PROMPT = list(range(40))


def named(id: str, prompt: list[int]) -> Place:
    return structs.replace(place(id, tokens=len(prompt), longest=60), names=NAMES.of_prompt(prompt))


def told(engine: str, prompt: list[int], number: int = 0, epoch: int = 1, whole: bool = False) -> CacheChanges:
    return CacheChanges(engine=engine, epoch=epoch, number=number, changes=[(True, NAMES.of_prompt(prompt))], whole=whole)


class Cluster:
    """A scheduler with two engines that are ready."""

    def __init__(self) -> None:
        self.scheduler = GlobalScheduler(SchedulerConfig(placement="prefix", block_size=SIZE), 0.0)
        self.numbers = {"a": 0, "b": 0}
        for engine in self.numbers:
            self.report(engine)

    def report(self, engine: str, backlog: int = 0, running: int = 0, **changes: object) -> None:
        self.numbers[engine] += 1
        stats = EngineStats(backlog=backlog, running=running)
        base = report(engine, number=self.numbers[engine], sequences=4)
        self.scheduler.receive(structs.replace(base, stats=stats, **changes), 0.0)

    def placed(self, asked: Place) -> str:
        """Where it goes; then it is withdrawn."""
        self.scheduler.receive(asked, 0.0)
        sent = [send.message for send in self.scheduler.take_messages()]
        (placement,) = [message for message in sent if isinstance(message, Placement)]
        self.scheduler._engines[placement.engine].unbind((asked.request, asked.attempt))
        return placement.engine

    def asked_for_the_whole(self) -> list[CacheResync]:
        return [send.message for send in self.scheduler.take_messages() if isinstance(send.message, CacheResync)]


def test_a_request_goes_where_its_prefix_is_unless_that_engine_is_too_busy() -> None:
    cluster = Cluster()
    cluster.scheduler.receive(told("b", PROMPT), 0.0)
    assert cluster.placed(named("r", PROMPT)) == "b"
    cluster.report("b", backlog=140, cache_changes=1)
    assert cluster.placed(named("s", PROMPT)) == "b"
    cluster.report("b", backlog=260, cache_changes=1)
    assert cluster.placed(named("t", PROMPT)) == "a"
    cluster.report("a", backlog=290)
    assert cluster.placed(named("u", PROMPT)) == "b", "a is expected to have it too by now, but has more to do"


def test_what_was_just_placed_counts_before_the_engine_tells() -> None:
    cluster = Cluster()
    first = cluster.placed(named("r", PROMPT))
    cluster.report(first, backlog=1)
    assert cluster.placed(named("s", [*PROMPT, 7])) == first
    other = [99, *PROMPT]
    assert cluster.placed(named("t", other)) != first


def test_a_new_epoch_knows_nothing() -> None:
    cluster = Cluster()
    cluster.scheduler.receive(told("b", PROMPT), 0.0)
    cluster.report("b", epoch=2, backlog=1)
    cluster.scheduler.receive(told("b", PROMPT, number=1), 0.0)  # of the epoch that is over
    assert cluster.placed(named("r", PROMPT)) == "a"


def test_a_gap_is_closed_by_asking_for_the_whole() -> None:
    cluster = Cluster()
    cluster.scheduler.receive(told("b", PROMPT[:8], number=0), 0.0)
    cluster.scheduler.receive(told("b", PROMPT, number=2), 0.0)
    assert cluster.asked_for_the_whole() == [CacheResync("b", 1)]
    cluster.scheduler.receive(told("b", PROMPT, number=3), 1.0)
    assert cluster.asked_for_the_whole() == [], "it was just asked"
    cluster.scheduler.receive(told("b", PROMPT, number=4), 7.0)
    assert cluster.asked_for_the_whole() == [CacheResync("b", 1)], "but not for ever"
    assert cluster.scheduler._prefixes.overlap(unpack(NAMES.of_prompt(PROMPT))) == {"b": 2}
    cluster.scheduler.receive(told("b", PROMPT[:20], number=5, whole=True), 8.0)
    assert cluster.scheduler._prefixes.overlap(unpack(NAMES.of_prompt(PROMPT))) == {"b": 5}


def test_a_scheduler_that_comes_later_asks_for_what_it_missed() -> None:
    prefixes = Prefixes(1 << 20)
    assert not prefixes.follow("a", 1, sent=3, now=0.0)
    assert prefixes.follow("a", 1, sent=3, now=1.0)
    assert prefixes.take(told("a", PROMPT, number=3, whole=True), 2.0)
    assert prefixes.follow("a", 1, sent=4, now=3.0)


def engine_with(prompt: list[int]) -> tuple[Engine, list[CacheChanges]]:
    """An engine that has computed a prompt, and what it told the scheduler."""
    batch = dataclasses.replace(BATCH, prefix_cache="on")
    engine = Engine(EngineConfig("e", "e!", "s!", batch, names=NAMES), 1, 0.0)
    engine.receive(ready(1), 0.0)
    asked = request("r", max_tokens=1)
    asked.prompt[:] = prompt
    engine.receive(Submit(1, asked), 0.0)
    said: list[CacheChanges] = []
    for now in (0.1 * step for step in range(1, 20)):
        for action in engine.take_actions():
            if isinstance(action, Send) and isinstance(action.message, CacheChanges):
                said.append(action.message)
            elif isinstance(action, Send) and type(action.message).__name__ == "StepPlan":
                engine.receive(result(action.message), now)  # type: ignore[arg-type]
        engine.tick(now)
    return engine, said


def test_an_engine_tells_what_it_has_and_tells_it_again() -> None:
    engine, said = engine_with(PROMPT)
    assert [message.number for message in said] == list(range(len(said)))
    assert b"".join(names for message in said for added, names in message.changes if added) == NAMES.of_prompt(PROMPT)
    engine.receive(CacheResync("e", 1), 2.0)
    (again,) = [a.message for a in engine.take_actions() if isinstance(a, Send) and isinstance(a.message, CacheChanges)]
    assert (again.whole, again.number) == (True, len(said))
    assert again.changes == [(True, NAMES.of_prompt(PROMPT))]


def test_a_large_tree_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_news, "_PIECE_BYTES", 0)
    pool = BlockPool(40)
    news = CacheNews("e", 1, NAMES)
    tree = RadixTree(pool, SIZE, news.log)
    prompts = [[number] * 3 * SIZE for number in range(4)]
    for prompt in prompts:
        blocks = pool.allocate(3)
        assert blocks is not None
        tree.release(tree.lock(NO_MATCH), pack(prompt), blocks)
        pool.release(blocks)
    prefixes = Prefixes(1000)
    prefixes.follow("e", 1, 0, 0.0)
    prefixes.take(told("e", PROMPT), 0.0)
    news.sent = 1
    pieces = news.whole(tree, 0.0)
    assert [(piece.number, piece.whole) for piece in pieces] == [(1, True), (2, False), (3, False), (4, False)]
    assert all(prefixes.take(piece, 0.0) for piece in pieces)
    assert [prefixes.overlap(unpack(NAMES.of_prompt(prompt))) for prompt in [*prompts, PROMPT]] == [{"e": 3}] * 4 + [{}]


def test_names_are_those_of_whole_blocks() -> None:
    assert len(unpack(NAMES.of_prompt(PROMPT))) == len(PROMPT) // SIZE
    assert NAMES.of(pack(PROMPT)) == NAMES.of_prompt(PROMPT)
