"""Attention over paged spans: the metadata, the reference against a definition, the portable backend against the reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ConfigError
from kv.formats import DTYPES
from kv.pool import KVPool
from tests.workers.spans import make_span
from workers.attention import PagedSpans, make_attention
from workers.attention.portable import PortableAttention
from workers.sequences import Span

BLOCK = 4


def lay_out(spans: list[tuple[int, int]], seed: int = 0) -> tuple[list[Span], int]:
    """Spans [start, end) on shuffled blocks, with a block to spare in each table; and the number of blocks in the pool."""
    counts = [-(-end // BLOCK) + 1 for _, end in spans]
    ids = (np.random.default_rng(seed).permutation(sum(counts)) + 1).tolist()
    made = []
    for (start, end), count in zip(spans, counts, strict=True):
        made.append(make_span(start, end, [ids.pop() for _ in range(count)]))
    return made, sum(counts) + 1


def attend(
    name: str,
    spans: list[Span],
    num_blocks: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    window: int | None = None,
    kept: torch.dtype | None = None,
) -> tuple[torch.Tensor, KVPool, torch.Tensor]:
    """Random context and queries through backend `name`; returns outputs, pool and queries."""
    torch.manual_seed(1)
    pool = KVPool(2, num_blocks, BLOCK, kv_heads, dim, kept or dtype, torch.device("cpu"))
    every = torch.arange(num_blocks * BLOCK)
    pool.write(1, every, *torch.randn(2, len(every), kv_heads, dim))
    paged = PagedSpans.of(spans, BLOCK)
    rows = int(paged.first_row[-1])
    queries, keys, values = (torch.randn(rows, n, dim).to(dtype) for n in (heads, kv_heads, kv_heads))
    pool.write(1, torch.from_numpy(paged.slots(paged.positions())), keys, values)
    return make_attention(name, pool, [None, window], dtype).prepare(paged).attend(1, queries, keys, values), pool, queries


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=9))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_metadata_is_what_a_loop_over_tokens_gives(sizes: list[tuple[int, int]]) -> None:
    spans, _ = lay_out([(start, start + n) for start, n in sizes])
    paged = PagedSpans.of(spans, BLOCK)
    positions = [p for span in spans for p in range(span.start, span.end)]
    slots = [int(span.state.blocks[p // BLOCK]) * BLOCK + p % BLOCK for span in spans for p in range(span.start, span.end)]
    assert paged.positions().tolist() == positions
    assert paged.slots(paged.positions()).tolist() == slots
    assert [paged.table(i).tolist() for i in range(len(spans))] == [s.state.blocks[: -(-s.end // BLOCK)].tolist() for s in spans]
    which = np.arange(len(spans))[::-1]
    padded = paged.padded_tables(which)
    for row, i in zip(padded.tolist(), which.tolist(), strict=True):
        table = paged.table(i).tolist()
        assert row == table + [0] * (padded.shape[1] - len(table))


@pytest.mark.parametrize("window", [None, 1, 3, 4, 6, 100])
def test_the_reference_is_the_textbook_formula(window: int | None) -> None:
    spans, num_blocks = lay_out([(0, 5), (6, 7), (3, 9)])
    out, pool, queries = attend("reference", spans, num_blocks, heads=4, kv_heads=2, dim=6, dtype=torch.float32, window=window)
    row = 0
    for span in spans:
        for position in range(span.start, span.end):
            slots = [
                (int(span.state.blocks[p // BLOCK]), p % BLOCK)
                for p in range(max(0, position + 1 - (window or 1000)), position + 1)
            ]
            for head in range(4):
                scores = [float(queries[row, head] @ pool.keys[1, b, o, head // 2]) / math.sqrt(6) for b, o in slots]
                weights = np.exp(scores) / np.exp(scores).sum()
                wanted = sum(float(w) * pool.values[1, b, o, head // 2] for w, (b, o) in zip(weights, slots, strict=True))
                torch.testing.assert_close(out[row].view(4, 6)[head], wanted, atol=1e-5, rtol=1e-5)
            row += 1


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([1, 1, 1, 2, 5, 17])), min_size=1, max_size=24),
    st.sampled_from([(4, 4, 8), (6, 2, 16), (5, 1, 10)]),
    st.sampled_from([None, 1, 3, 4, 7, 16, 50, 100]),
    st.sampled_from([None, None, *DTYPES.values()]),
)
@settings(deadline=None, max_examples=90, derandomize=True)
def test_the_portable_backend_is_the_reference(
    sizes: list[tuple[int, int]], model: tuple[int, int, int], window: int | None, kept: torch.dtype | None
) -> None:
    spans, num_blocks = lay_out([(start, start + n) for start, n in sizes])
    expected, _, _ = attend("reference", spans, num_blocks, *model, torch.float32, window, kept)
    actual, _, _ = attend("torch", spans, num_blocks, *model, torch.float32, window, kept)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_reference(dtype: torch.dtype) -> None:
    spans, num_blocks = lay_out([(0, 30), (20, 21), (9, 30), (0, 1), (55, 56)])
    expected, _, _ = attend("reference", spans, num_blocks, 6, 2, 16, dtype)
    actual, _, _ = attend("torch", spans, num_blocks, 6, 2, 16, dtype)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, atol=0.03, rtol=0.03)


def test_many_decodes_of_many_lengths_are_cut_into_groups() -> None:
    sizes = [(n, n + 1) for n in (*range(40, 75), 3, 4, 300, 301)]
    spans, num_blocks = lay_out(sizes)
    expected, pool, _ = attend("reference", spans, num_blocks, 4, 2, 8, torch.float32)
    actual, _, _ = attend("torch", spans, num_blocks, 4, 2, 8, torch.float32)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    groups = PortableAttention(pool, [None], torch.float32).prepare(PagedSpans.of(spans, BLOCK)).views[None].groups
    assert 3 <= len(groups) < len(spans)
    assert sum(group.size for group in groups) == len(spans)


def test_a_window_reads_no_more_blocks_than_it_covers() -> None:
    spans, num_blocks = lay_out([(99, 100), (98, 99), (40, 57), (2, 3), (0, 9)])
    pool = KVPool(1, num_blocks, BLOCK, 1, 2, torch.float32, torch.device("cpu"))
    (view,) = PortableAttention(pool, [6], torch.float32).prepare(PagedSpans.of(spans, BLOCK)).views.values()
    assert [group.blocks.shape[0] // group.size for group in view.groups] == [2]
    assert [None if span.blocks is None else len(span.blocks) for span in view.long] == [7, None]


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ConfigError, match="flash"):
        make_attention("flash", KVPool(1, 2, 4, 1, 2, torch.float32, torch.device("cpu")), [None], torch.float32)


@pytest.mark.parametrize(("per_head", "dim"), [(1, 64), (1, 32), (2, 32), (3, 16), (3, 128), (5, 64), (7, 32)])
def test_a_decode_has_the_same_bits_alone_and_in_a_batch_on_two_threads(per_head: int, dim: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        spans, num_blocks = lay_out([(length - 1, length) for length in [40] * 8])
        together, pool, queries = attend("torch", spans, num_blocks, 2 * per_head, 2, dim, torch.float32)
        backend = PortableAttention(pool, [None, None], torch.float32)
        for row, span in enumerate(spans):
            query = queries[row : row + 1]
            alone = backend.prepare(PagedSpans.of([span], BLOCK)).attend(1, query, query[:, :2], query[:, :2])
            assert torch.equal(alone[0], together[row]), f"row {row}"
    finally:
        torch.set_num_threads(before)
