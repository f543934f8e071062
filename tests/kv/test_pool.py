"""The KV pool's tensors."""

import pytest
import torch

from kv.pool import HostBlocks, KVPool


def make_pool(num_blocks: int = 6) -> KVPool:
    return KVPool(3, num_blocks, 4, 2, 5, torch.float32, torch.device("cpu"))


def test_a_slot_is_block_times_size_plus_offset() -> None:
    pool = make_pool()
    keys, values = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    pool.write(1, torch.tensor([4 * 2 + 3, 4 * 5, 4 * 1 + 1]), keys, values)
    for i, (block, offset) in enumerate([(2, 3), (5, 0), (1, 1)]):
        assert torch.equal(pool.keys[1, block, offset], keys[i])
        assert torch.equal(pool.values[1, block, offset], values[i])
    assert int((pool.keys != 0).any(-1).any(-1).sum()) == 3


def test_write_takes_strided_rows() -> None:
    pool = make_pool()
    mixed = torch.randn(4, 6, 5)
    pool.write(0, torch.arange(8, 12), mixed[:, 2:4], mixed[:, 4:])
    assert torch.equal(pool.keys[0, 2], mixed[:, 2:4])
    assert torch.equal(pool.values[0, 2], mixed[:, 4:])


def test_copies_run_in_order_through_all_layers() -> None:
    pool = make_pool()
    pool.keys.normal_()
    pool.values.normal_()
    keys, values = pool.keys.clone(), pool.values.clone()
    pool.copy_blocks([(1, 2), (2, 3), (4, 1)])
    for block, source in [(1, 4), (2, 1), (3, 1), (4, 4), (5, 5)]:
        assert torch.equal(pool.keys[:, block], keys[:, source])
        assert torch.equal(pool.values[:, block], values[:, source])


def test_a_new_pool_holds_finite_numbers() -> None:
    pool = make_pool()
    assert pool.num_blocks == 6
    assert pool.block_size == 4
    assert not pool.keys.any()
    assert not pool.values.any()


def test_blocks_go_to_the_host_and_come_back_elsewhere() -> None:
    pool = make_pool(9)
    pool.keys.normal_()
    pool.values.normal_()
    keys, values = pool.keys.clone(), pool.values.clone()
    host = HostBlocks(pool, 5)
    assert pool.bytes_per_block * 5 == host.slots.numel() * host.slots.element_size()
    host.store([4, 1, 7, 2], [3, 0, 4, 1])
    host.load([0, 4, 1], [8, 6, 4])
    for block, source in [(8, 1), (6, 7), (4, 2), (1, 1), (2, 2), (3, 3), (5, 5), (7, 7)]:
        assert torch.equal(pool.keys[:, block], keys[:, source])
        assert torch.equal(pool.values[:, block], values[:, source])


def test_what_is_staged_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(12)
    pool.keys.normal_()
    keys = pool.keys.clone()
    monkeypatch.setattr("kv.pool._STAGED_BYTES", 3 * pool.bytes_per_block)
    host = HostBlocks(pool, 10)
    host.store(range(1, 11), range(10))
    host.load(range(10), range(11, 1, -1))
    assert torch.equal(pool.keys[:, 2:], keys[:, 1:11].flip(1))
