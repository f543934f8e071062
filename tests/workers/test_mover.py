"""KV blocks from the pool of one rank to that of another, and what becomes of transfers that go wrong."""

import queue
import socket
import threading
from typing import Any

import pytest
import torch

from cluster.protocol import Give, Moved, Take
from kv.formats import DTYPES
from kv.pool import KVPool
from workers import mover as movers
from workers.mover import Mover

CPU = torch.device("cpu")
BLOCKS = [3, 9, 4, 11]
THERE = [7, 1, 2, 10]


class Rank:
    """A rank with a pool of its own."""

    def __init__(self, rank: int, dtype: torch.dtype = torch.float32) -> None:
        self.pool = KVPool(2, 12, 4, 2, 8, dtype, CPU)
        for layer in range(2):
            self.pool.write(layer, torch.arange(12 * 4), torch.randn(12 * 4, 2, 8), torch.randn(12 * 4, 2, 8))
        self.said: queue.SimpleQueue[Moved] = queue.SimpleQueue()
        self.mover = Mover(self.pool, "127.0.0.1", epoch=5, rank=rank, report=self.said.put)

    def moved(self) -> Moved:
        """What it says next."""
        return self.said.get(timeout=30)


def give(pull: str, taker: Rank, peer: str = "b.5", after: int = -1, within_s: float = 20.0) -> Give:
    return Give(epoch=5, pull=pull, peer=peer, store=taker.mover.store, blocks=BLOCKS, after=after, within_s=within_s)


def take(pull: str, taker: Rank, peer: str = "a.5", after: int = -1, within_s: float = 20.0) -> Take:
    return Take(epoch=5, pull=pull, peer=peer, store=taker.mover.store, blocks=THERE, after=after, within_s=within_s)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_blocks_arrive_and_nothing_else_changes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = Rank(0, dtype), Rank(1, dtype)
    monkeypatch.setattr(movers, "_PIECE_BYTES", 3 * source.pool.bytes_per_block)  # three blocks, then one
    wanted_keys, wanted_values = target.pool.keys.clone(), target.pool.values.clone()
    wanted_keys[:, THERE], wanted_values[:, THERE] = source.pool.keys[:, BLOCKS], source.pool.values[:, BLOCKS]
    for pull in ("first", "again"):
        target.mover.put(take(pull, target))
        source.mover.put(give(pull, target))
        for rank, number in ((source, 0), (target, 1)):
            said = rank.moved()
            assert (said.pull, said.rank, said.epoch, said.error) == (pull, number, 5, "")
            assert said.seconds > 0
        assert torch.equal(target.pool.keys, wanted_keys)
        assert torch.equal(target.pool.values, wanted_values)


def test_both_directions_and_several_peers_at_once() -> None:
    """Each waits for nobody but its own peer: a circle of three does not stand still."""
    ranks = [Rank(number) for number in range(3)]
    for number, rank in enumerate(ranks):
        target = ranks[(number + 1) % 3]
        rank.mover.put(give(f"p{number}", target))
        target.mover.put(take(f"p{number}", target))
    assert all(not rank.moved().error for rank in ranks for _ in range(2))


def test_nobody_comes() -> None:
    source, target = Rank(0), Rank(1)
    source.mover.put(give("p", target, within_s=0.5))
    target.mover.put(take("q", target, within_s=0.5))
    assert "Timeout" in source.moved().error
    assert "Timeout" in target.moved().error


def test_a_store_that_answers_nobody() -> None:
    """As that of a frozen process: torch would wait for ever."""
    source = Rank(0)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        order = give("p", source, within_s=0.5)
        order.store = f"127.0.0.1:{frozen.getsockname()[1]}"
        source.mover.put(order)
        assert "Timeout" in source.moved().error


@pytest.mark.parametrize("side", ["giver", "taker"])
def test_nothing_is_moved_before_the_plans_have_run(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = Rank(0), Rank(1)
    touched: list[str] = []
    for rank, name, method in ((source, "giver", "gather"), (target, "taker", "scatter")):
        original = getattr(rank.pool, method)

        def noted(*args: Any, name: str = name, original: Any = original) -> Any:
            touched.append(name)
            return original(*args)

        monkeypatch.setattr(rank.pool, method, noted)
    after = {"giver": -1, "taker": -1, side: 3}
    source.mover.put(give("p", target, after=after["giver"]))
    target.mover.put(take("p", target, after=after["taker"]))
    late = source if side == "giver" else target
    for step in range(3):
        late.mover.executed(step)
    with pytest.raises(queue.Empty):
        late.said.get(timeout=0.3)
    assert side not in touched
    late.mover.executed(3)
    assert not source.moved().error
    assert not target.moved().error
    assert touched == ["giver", "taker"]


def test_a_plan_that_never_runs_fails_it() -> None:
    source, target = Rank(0), Rank(1)
    source.mover.put(give("p", target, after=1, within_s=0.5))
    target.mover.put(take("p", target, within_s=0.5))
    assert "step 1 was not run" in source.moved().error
    assert target.moved().error


def test_after_a_failure_they_meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = Rank(0), Rank(1)
    source.mover.put(give("first", target))
    target.mover.put(take("first", target))
    assert not source.moved().error
    assert not target.moved().error
    with monkeypatch.context() as broken:
        broken.setattr(target.pool, "room", lambda count: 1 / 0)
        source.mover.put(give("p", target))
        target.mover.put(take("p", target))
        assert "ZeroDivision" in target.moved().error
        source.moved()  # it may have sent all
    source.mover.put(give("q", target))
    target.mover.put(take("q", target))
    assert not source.moved().error
    assert not target.moved().error
    assert torch.equal(target.pool.keys[:, THERE], source.pool.keys[:, BLOCKS])


def test_a_giver_that_goes_away_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = Rank(0), Rank(1)
    monkeypatch.setattr(movers, "_PIECE_BYTES", 1)
    gone = threading.Event()
    original = source.pool.gather

    def gather(blocks: list[int]) -> torch.Tensor:
        if blocks == [BLOCKS[2]]:
            gone.set()
            raise RuntimeError("out of memory")
        return original(blocks)

    monkeypatch.setattr(source.pool, "gather", gather)
    source.mover.put(give("p", target, within_s=100.0))
    target.mover.put(take("p", target, within_s=100.0))
    assert "out of memory" in source.moved().error
    assert target.moved().error  # long before its time is over
    assert gone.is_set()


def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "_IDLE_S", 0.05)
    source, target = Rank(0), Rank(1)
    for pull in ("p", "q"):
        source.mover.put(give(pull, target))
        target.mover.put(take(pull, target))
        assert not source.moved().error
        assert not target.moved().error
        for rank in (source, target):
            while rank.mover._lines:
                pass
