"""The KV pool's tensors."""

import pytest
import torch

from kv.formats import DTYPES, dequantize, is_quantized, quantize
from kv.pool import HostBlocks, KVPool

ALL = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def make_pool(num_blocks: int = 6, dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(3, num_blocks, 4, 2, 5, dtype, torch.device("cpu"))


def fill(pool: KVPool) -> None:
    """Every slot with keys and values of its own."""
    slots = torch.arange(pool.num_blocks * 4)
    for layer in range(3):
        pool.write(layer, slots, torch.randn(len(slots), 2, 5), torch.randn(len(slots), 2, 5) + 3)


def content(pool: KVPool) -> torch.Tensor:
    """[blocks, layers, 2, block_size, heads, head_dim]: all that is read."""
    every = torch.arange(pool.num_blocks)
    layers = torch.stack([torch.stack(pool.read(layer, every, torch.float32)) for layer in range(3)])
    return layers.view(3, 2, -1, 4, 2, 5).movedim(2, 0)


@ALL
def test_what_is_read_is_what_was_written_as_it_is_kept(dtype: torch.dtype) -> None:
    pool = make_pool(dtype=dtype)
    keys, values = torch.randn(3, 2, 5).bfloat16(), torch.randn(3, 2, 5).bfloat16()
    pool.write(1, torch.tensor([4 * 2 + 3, 4 * 5, 4 * 1 + 1]), keys, values)
    room = pool.room_to_read(5)
    for read_as in (torch.bfloat16, torch.float32):
        for through in (None, room):
            found = pool.read(1, torch.tensor([5, 1, 2]), read_as, through)
            for got, wrote in zip(found, (keys, values), strict=True):
                kept = dequantize(quantize(wrote, dtype), 2, 5, dtype) if is_quantized(dtype) else wrote.to(dtype)
                assert got.shape == (12, 2, 5)
                assert torch.equal(got[[11, 0, 5]], kept.to(read_as))
                assert int((got != 0).any(-1).any(-1).sum()) == 3


@ALL
def test_a_block_takes_what_it_is_said_to(dtype: torch.dtype) -> None:
    pool = make_pool(7, dtype)
    assert pool.bytes_per_block * 7 == pool.keys.nbytes + pool.values.nbytes
    vector = 5 * dtype.itemsize + {torch.int8: 4, torch.float8_e4m3fn: 2}.get(dtype, 0)
    assert pool.bytes_per_block == 2 * 3 * 4 * 2 * vector


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


@ALL
def test_copies_run_in_order_through_all_layers(dtype: torch.dtype) -> None:
    pool = make_pool(dtype=dtype)
    fill(pool)
    before = content(pool)
    pool.copy_blocks([(1, 2), (2, 3), (4, 1)])
    assert torch.equal(content(pool)[1:], before[[4, 1, 1, 4, 5]])


def test_a_new_pool_holds_finite_numbers() -> None:
    pool = make_pool()
    assert pool.num_blocks == 6
    assert pool.block_size == 4
    assert not pool.keys.any()
    assert not pool.values.any()


@ALL
def test_blocks_go_to_the_host_and_come_back_elsewhere(dtype: torch.dtype) -> None:
    pool = make_pool(9, dtype)
    fill(pool)
    before = content(pool)
    host = HostBlocks(pool, 5)
    assert pool.bytes_per_block * 5 == host.slots.numel() * host.slots.element_size()
    host.store([4, 1, 7, 2], [3, 0, 4, 1])
    host.load([0, 4, 1], [8, 6, 4])
    assert torch.equal(content(pool)[1:], before[[1, 2, 3, 2, 5, 7, 7, 1]])


def test_what_is_staged_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(12)
    pool.keys.normal_()
    keys = pool.keys.clone()
    monkeypatch.setattr("kv.pool._STAGED_BYTES", 3 * pool.bytes_per_block)
    host = HostBlocks(pool, 10)
    host.store(range(1, 11), range(10))
    host.load(range(10), range(11, 1, -1))
    assert torch.equal(pool.keys[:, 2:], keys[:, 1:11].flip(1))
