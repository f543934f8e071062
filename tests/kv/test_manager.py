"""Block tables: allocated on demand, reserved by the baselines, forked with copy-on-write."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import BatchConfig, PrefixCache, Reservation
from kv.blocks import IntegrityError
from kv.manager import KVManager
from kv.names import pack
from kv.radix import NO_MATCH

PAGED = BatchConfig(num_blocks=9, max_model_len=20, block_size=4, max_num_seqs=4)


def manager(reservation: Reservation = "paged", prefix_cache: PrefixCache = "off") -> KVManager:
    return KVManager(dataclasses.replace(PAGED, reservation=reservation, prefix_cache=prefix_cache))


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert manager().blocks_for(tokens) == blocks


def test_paged_tables_grow_by_what_is_missing() -> None:
    kv = manager()
    assert kv.admit(1, NO_MATCH, "", 20)
    assert kv.table(1) == []
    first = kv.allocate(1, 5)
    assert first is not None
    assert len(first) == 2
    assert kv.allocate(1, 8) == []
    second = kv.allocate(1, 9)
    assert kv.table(1) == [*first, *(second or [])]
    kv.release(1)
    assert not kv.holds(1)
    assert kv.pool.num_used == 0


def test_a_failed_allocation_changes_nothing() -> None:
    kv = manager()
    kv.admit(1, NO_MATCH, "", 20)
    kv.allocate(1, 4)
    before = list(kv.table(1))
    assert kv.allocate(1, 4 * 9) is None
    assert kv.table(1) == before
    kv.check_integrity()


@pytest.mark.parametrize(("reservation", "reserved"), [("max_tokens", 3), ("contiguous", 5)])
def test_baselines_reserve_a_whole_life(reservation: Reservation, reserved: int) -> None:
    kv = manager(reservation)
    assert kv.admit(1, NO_MATCH, "", 10)
    assert len(kv.table(1)) == reserved
    assert kv.allocate(1, 10) == []
    fits = 2 * reserved <= kv.pool.num_blocks - 1
    assert (kv.admit(2, NO_MATCH, "", 10) is not None) == fits
    assert kv.holds(2) == fits
    kv.check_integrity()


def test_contiguous_tables_are_runs() -> None:
    kv = manager("contiguous")
    kv.admit(1, NO_MATCH, "", 10)
    table = kv.table(1)
    assert table == list(range(table[0], table[0] + 5))


def begin(kv: KVManager, seq: int, tokens: list[int]) -> tuple[int, tuple[int, int] | None]:
    """A sequence of these tokens, all of them computed; how many were known, and the copy that it needs."""
    key = pack(tokens)
    beginning = kv.admit(seq, kv.match(key, ""), "", 20)
    assert beginning is not None
    assert kv.allocate(seq, len(tokens)) is not None
    kv.record(seq, key, len(tokens))
    kv.check_integrity()
    return beginning.num_tokens, beginning.copy


def test_what_a_sequence_leaves_is_found_again() -> None:
    kv = manager(prefix_cache="on")
    assert begin(kv, 1, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == (0, None)
    first = list(kv.table(1))
    assert begin(kv, 2, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == (8, None), "also while the first holds it"
    assert kv.table(2)[:2] == first[:2]
    assert kv.table(2)[2] != first[2]
    kv.release(1)
    kv.release(2)
    assert (kv.pool.num_held, kv.pool.num_used, kv.num_free) == (0, 2, 8)
    kv.begin_plan()
    known, copy = begin(kv, 3, [1, 2, 3, 4, 5, 6, 9, 9, 9])
    assert known == 6
    assert copy == (first[1], kv.table(3)[1])


def test_a_block_that_the_same_plan_writes_is_shared_but_not_copied() -> None:
    kv = manager(prefix_cache="on")
    begin(kv, 1, [1, 2, 3, 4, 5, 6, 7, 8])
    assert begin(kv, 2, [1, 2, 3, 4, 5, 6, 9, 9]) == (4, None)
    kv.begin_plan()
    known, copy = begin(kv, 3, [1, 2, 3, 4, 5, 6, 8, 8])
    assert known == 6
    assert copy is not None


def test_what_nobody_holds_gives_way() -> None:
    kv = manager(prefix_cache="on")
    for seq in range(4):
        begin(kv, seq, [seq] * 8)
        kv.release(seq)
    assert kv.pool.num_free == 0
    begin(kv, 9, [0] * 8)  # used again: 1 is the oldest now
    begin(kv, 10, [7] * 5)
    assert [kv.match(pack([seq] * 9), "").num_tokens for seq in range(4)] == [8, 0, 8, 8]
    assert kv.allocate(10, 4 * 7) is None
    assert [kv.match(pack([seq] * 9), "").num_tokens for seq in range(4)] == [8, 0, 8, 8], "a failure evicts nothing"


def test_salts_share_nothing() -> None:
    kv = manager(prefix_cache="on")
    begin(kv, 1, [1] * 9)
    assert kv.match(pack([1] * 9), "other").num_tokens == 0
    assert kv.match(pack([1] * 9), "").num_tokens == 8


def test_fork_shares_whole_blocks_and_copies_the_part_block() -> None:
    kv = manager()
    kv.admit(1, NO_MATCH, "", 20)
    kv.allocate(1, 7)
    fork = kv.fork(1, 2, 6)
    assert fork is not None
    assert kv.table(2)[0] == kv.table(1)[0]
    assert fork.copy == (kv.table(1)[1], kv.table(2)[1])
    assert fork.copy[0] != fork.copy[1]


def test_fork_at_a_block_boundary_copies_nothing() -> None:
    kv = manager()
    kv.admit(1, NO_MATCH, "", 20)
    kv.allocate(1, 12)
    fork = kv.fork(1, 2, 8)
    assert fork is not None
    assert fork.copy is None
    assert kv.table(2) == kv.table(1)[:2]


def test_fork_without_a_free_block_changes_nothing() -> None:
    kv = manager()
    kv.admit(1, NO_MATCH, "", 20)
    kv.allocate(1, 4 * 8)
    assert kv.fork(1, 2, 6) is None
    assert not kv.holds(2)
    kv.check_integrity()


def test_a_sequence_is_begun_once() -> None:
    kv = manager()
    kv.admit(1, NO_MATCH, "", 20)
    kv.allocate(1, 4)
    with pytest.raises(IntegrityError):
        kv.admit(1, NO_MATCH, "", 20)
    with pytest.raises(IntegrityError):
        kv.fork(1, 1, 4)


@given(st.data())
def test_nobody_writes_where_another_reads(data: st.DataObject) -> None:
    """Any order of admissions, growth, forks and releases: a sequence's positions from its fork on are in blocks of its own."""
    kv = manager()
    own_from: dict[int, int] = {}
    for seq in range(data.draw(st.integers(1, 12))):
        parents = [s for s in own_from if kv.table(s)]
        if data.draw(st.booleans()) and parents:
            parent = data.draw(st.sampled_from(parents))
            shared = data.draw(st.integers(0, len(kv.table(parent)) * 4))
            if kv.fork(parent, seq, shared) is not None:
                own_from[seq] = shared // 4
                own_from[parent] = max(own_from[parent], shared // 4)  # it writes on only behind what it shares
        elif kv.admit(seq, NO_MATCH, "", 20):
            own_from[seq] = 0
        for s in list(own_from):
            if data.draw(st.integers(0, 4)) == 0:
                kv.release(s)
                del own_from[s]
            else:
                kv.allocate(s, data.draw(st.integers(0, 20)))
        kv.check_integrity()
        for s, start in own_from.items():
            assert all(kv.pool.references(block) == 1 for block in kv.table(s)[start:])
    for s in own_from:
        kv.release(s)
    assert kv.pool.num_used == 0
