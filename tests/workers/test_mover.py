"""KV blocks from the pool of one rank to that of another, and what becomes of transfers that go wrong."""

import queue
import threading

import pytest
import torch

from cluster.protocol import Give, Moved, Take
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
        self.pool.keys.copy_(torch.randn(self.pool.keys.shape))
        self.pool.values.copy_(torch.randn(self.pool.keys.shape))
        self.said: queue.SimpleQueue[Moved] = queue.SimpleQueue()
        self.mover = Mover(self.pool, "127.0.0.1", epoch=5, rank=rank, report=self.said.put)

    def moved(self) -> Moved:
        """What it says next."""
        return self.said.get(timeout=30)


def give(pull: str, taker: Rank, group: str = "g", blocks: list[int] = BLOCKS, within_s: float = 20.0) -> Give:
    return Give(epoch=5, pull=pull, peer="b", group=group, store=taker.mover.store, blocks=blocks, within_s=within_s)


def take(pull: str, taker: Rank, group: str = "g", blocks: list[int] = THERE, within_s: float = 20.0) -> Take:
    return Take(epoch=5, pull=pull, peer="a", group=group, store=taker.mover.store, blocks=blocks, within_s=within_s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_arrive_and_nothing_else_changes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "_PIECE_BYTES", 3 * 2 * 2 * 4 * 2 * 8 * dtype.itemsize)  # three blocks, then one
    source, target = Rank(0, dtype), Rank(1, dtype)
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
        rank.mover.put(give(f"p{number}", target, f"g{number}"))
        target.mover.put(take(f"p{number}", target, f"g{number}"))
    assert all(not rank.moved().error for rank in ranks for _ in range(2))


def test_nobody_comes() -> None:
    source, target = Rank(0), Rank(1)
    source.mover.put(give("p", target, within_s=0.5))
    assert source.moved().error
    target.mover.put(take("p", target, "other", within_s=0.5))
    assert target.moved().error


def test_after_a_failure_another_group_works() -> None:
    source, target = Rank(0), Rank(1)
    source.mover.put(give("p", target, blocks=BLOCKS[:2]))  # they do not agree on how many
    target.mover.put(take("p", target))
    assert any(rank.moved().error for rank in (source, target))
    source.mover.put(give("q", target, "h"))
    target.mover.put(take("q", target, "h"))
    while (said := target.moved()).pull != "q":
        pass
    assert not said.error
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
        source.mover.put(give(pull, target, pull))
        target.mover.put(take(pull, target, pull))
        assert not source.moved().error
        assert not target.moved().error
        for rank in (source, target):
            while rank.mover._lines:
                pass
