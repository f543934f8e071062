"""Native attention over blocks that sequences share: the bits that each query has alone."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv.formats import DTYPES
from kv.pool import KVPool
from tests.workers.spans import make_span
from workers.attention import PagedSpans
from workers.attention.reference import ReferenceAttention
from workers.native.kernels import NativeAttention
from workers.native.library import Library, Threads

NOTHING = torch.empty(0)
SHAPES = [(4, 4, 8), (6, 2, 16), (5, 1, 10), (16, 8, 64), (3, 3, 34), (40, 1, 12)]
"""Heads, heads of keys and values, numbers in each."""


@dataclass(frozen=True)
class Piece:
    """Queries at [start, end) of a sequence with a block table."""

    start: int
    end: int
    table: list[int]


@st.composite
def families(draw: st.DrawFn, block: int) -> tuple[list[Piece], int]:
    """Sequences that begin with the blocks of others, or with none of theirs, in any order; and how many blocks there are."""
    pieces: list[Piece] = []
    used = 0
    for _ in range(draw(st.integers(1, 24))):
        before, count = draw(st.integers(0, 150)), draw(st.sampled_from([1, 1, 1, 1, 2, 5, 17, 40]))
        whole = before // block  # what is computed now goes to blocks of its own
        parent = draw(st.sampled_from([[], *(piece.table[: piece.start // block] for piece in pieces)]))
        table = parent[: draw(st.integers(0, whole))] if draw(st.booleans()) else parent[:whole]
        missing = -(-(before + count) // block) - len(table)
        pieces.append(Piece(before, before + count, table + list(range(used, used + missing))))
        used += missing
    names = (np.random.default_rng(used).permutation(used) + 1).tolist()
    named = [Piece(p.start, p.end, [names[i] for i in p.table]) for p in pieces]
    return draw(st.permutations(named)), used + 1


def filled(num_blocks: int, block: int, kv_heads: int, dim: int, dtype: torch.dtype) -> KVPool:
    """With a key and a value in every slot."""
    pool = KVPool(1, num_blocks, block, kv_heads, dim, dtype, torch.device("cpu"))
    slots = torch.arange(block, num_blocks * block)
    shape = (len(slots), kv_heads, dim)
    pool.write(0, slots, torch.randn(shape), torch.randn(shape) + 0.5)
    return pool


def attended(pool: KVPool, pieces: list[Piece], queries: list[Tensor], window: int | None, threads: Threads) -> list[Tensor]:
    """All pieces in one batch."""
    paged = PagedSpans.of([make_span(p.start, p.end, p.table) for p in pieces], pool.block_size)
    rows = NativeAttention(pool, [window], threads).prepare(paged).attend(0, torch.cat(queries), NOTHING, NOTHING)
    return list(torch.split(rows, [len(q) for q in queries]))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(
    st.data(),
    st.sampled_from(SHAPES),
    st.sampled_from([None, None, 1, 33, 100]),
    st.sampled_from([4, 7, 16, 32]),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=10, derandomize=True)
def test_queries_that_share_blocks_have_the_bits_they_have_alone(
    library: Library,
    dtype: torch.dtype,
    data: st.DataObject,
    model: tuple[int, int, int],
    window: int | None,
    block: int,
    num_threads: int,
) -> None:
    heads, kv_heads, dim = model
    pieces, num_blocks = data.draw(families(block))
    torch.manual_seed(num_blocks)
    pool = filled(num_blocks, block, kv_heads, dim, dtype)
    queries = [torch.randn(piece.end - piece.start, heads, dim) for piece in pieces]
    threads = Threads(library, num_threads)
    together = attended(pool, pieces, queries, window, threads)
    for piece, own, result in zip(pieces, queries, together, strict=True):
        assert torch.equal(attended(pool, [piece], [own], window, threads)[0], result)
    last = pieces[-1]  # and query by query
    singles = [Piece(p, p + 1, last.table[: p // block + 1]) for p in range(last.start, last.end)]
    for i, single in enumerate(singles):
        assert torch.equal(attended(pool, [single], [queries[-1][i : i + 1]], window, threads)[0][0], together[-1][i])
    paged = PagedSpans.of([make_span(p.start, p.end, p.table) for p in pieces], block)
    expected = ReferenceAttention(pool, [window]).prepare(paged).attend(0, torch.cat(queries), NOTHING, NOTHING)
    torch.testing.assert_close(torch.cat(together), expected, atol=1e-5 if pool.quantized else 3e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_many_sequences_behind_one_prompt_and_behind_copies_of_it(library: Library, dtype: torch.dtype, count: int) -> None:
    """Decodes (count 1) and verified drafts or chunks; the copies share nothing."""
    torch.manual_seed(5)
    pool = filled(1 + 40 * 8, 16, 2, 24, dtype)
    prompt = list(range(1, 6))
    sequences, copies, used = [], [], 6
    for i in range(37):
        own = list(range(used, used + 3))
        copied = list(range(used + 3, used + 8))
        used += 8
        for place, copy in zip(prompt, copied, strict=True):
            for stored in (pool.keys, pool.values):
                stored[:, copy] = stored[:, place]
        end = 80 + count + i % 25
        sequences.append(Piece(end - count, end, prompt + own))
        copies.append(Piece(end - count, end, copied + own))
    queries = [torch.randn(count, 6, 24) for _ in sequences]
    threads = Threads(library, 2)
    shared, apart = (attended(pool, pieces, queries, None, threads) for pieces in (sequences, copies))
    assert torch.equal(torch.cat(shared), torch.cat(apart))
