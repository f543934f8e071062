"""The pool of block numbers against an oracle that only counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.blocks import NULL_BLOCK, BlockPool, IntegrityError


@given(st.data(), st.integers(2, 20))
def test_counts_follow_an_oracle(data: st.DataObject, num_blocks: int) -> None:
    pool = BlockPool(num_blocks)
    held: list[int] = []  # one entry per table
    kept: set[int] = set()
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["allocate", "run", "share", "release", "keep", "drop"]))
        count = data.draw(st.integers(1, 5))
        used = {*held, *kept}
        if action in ("allocate", "run"):
            free = sorted(set(range(1, num_blocks)) - used)
            runs = [b for b in free if all(b + i in free for i in range(count))]
            got = pool.allocate(count) if action == "allocate" else pool.allocate_run(count)
            if action == "allocate":
                assert (got is None) == (count > len(free))
            else:
                assert got == (list(range(runs[0], runs[0] + count)) if runs else None)
            if got is not None:
                assert len(set(got)) == count
                assert set(got) <= set(free)
                held += got
        elif pick := {"share": used, "release": set(held), "keep": set(held) - kept, "drop": kept}[action]:
            some = data.draw(st.lists(st.sampled_from(sorted(pick)), max_size=3, unique=True))
            getattr(pool, action)(some)
            if action == "share":
                held += some
            elif action == "release":
                for block in some:
                    held.remove(block)
            else:
                kept = kept | set(some) if action == "keep" else kept - set(some)
        pool.check_integrity()
        assert pool.num_held == len(set(held))
        assert pool.num_free == num_blocks - 1 - len({*held, *kept})
        assert all(pool.references(block) == held.count(block) for block in range(num_blocks))
        assert all(pool.is_kept(block) == (block in kept) for block in range(num_blocks))


def test_null_block_is_never_given() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4) or []) == [1, 2, 3, 4]
    assert NULL_BLOCK == 0
    assert pool.allocate(1) is None
    assert pool.allocate_run(1) is None


def test_freed_blocks_come_back_last_in_first_out() -> None:
    pool = BlockPool(10)
    first = pool.allocate(3)
    assert first is not None
    pool.release(first)
    assert pool.allocate(1) == [first[-1]]


@pytest.mark.parametrize("block", [NULL_BLOCK, 3])
def test_free_blocks_can_be_neither_shared_nor_released(block: int) -> None:
    pool = BlockPool(5)
    with pytest.raises(IntegrityError):
        pool.share([block])
    with pytest.raises(IntegrityError):
        pool.release([block])
    with pytest.raises(IntegrityError):
        pool.keep([block])
    with pytest.raises(IntegrityError):
        pool.drop([block])


def test_a_block_released_twice_is_noticed() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    assert blocks is not None
    with pytest.raises(IntegrityError):
        pool.release([*blocks, *blocks])
