"""Attention from torch's own operators, for any device: gather blocks, then scaled_dot_product_attention.

Decodes (spans of one query) are sorted by length and run in groups of like length, each one padded call: a call per sequence
costs more than the padding does, one call for all costs more than it saves. The heads of a group share keys and values, so they
become the query rows of one head of the call (a head per query head would read the context once for each). Longer spans run one
by one. A span that begins at position 0 needs nothing from a pool that
keeps what it is given. Layers with the same sliding window share the metadata, and
read only the blocks that the window leaves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kv.formats import DEQUANTIZED_BYTES
from kv.pool import KVPool
from workers.attention.spans import PagedSpans

_WASTED_BLOCKS = {"cpu": 8, "cuda": 1024}
"""Padding that a group may hold before a further call is cheaper than padding more. On a GPU (not measured yet) a call is five
launches of some 5 us each, in which an H200 reads 1,600 blocks of 64 KiB."""
_GROUP_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Keys gathered by one call, at most (a single longer sequence aside): what was gathered should still be in the cache when read.
For a GPU it only bounds the memory that is taken."""


@dataclass(frozen=True)
class DecodeGroup:
    """Decodes of like length."""

    first: int
    """Its first row among the decodes sorted by length."""
    size: int
    blocks: Tensor
    """[size * padded length in blocks] int64: what to gather."""
    bias: Tensor
    """[size, 1, 1, padded length in tokens]: 0 where there is a token in sight, else -inf."""


@dataclass(frozen=True)
class LongSpan:
    """A span of several queries."""

    rows: slice
    length: int
    """Positions of the context, from where its first block begins to the last query."""
    blocks: Tensor | None
    """[blocks of the context] int64, or None where the batch's own keys and values are the context."""
    bias: Tensor | None
    """[queries, length]: 0 where a query may look, else -inf; None where each sees all up to itself."""


@dataclass(frozen=True)
class View:
    """What layers with one sliding window do."""

    groups: list[DecodeGroup]
    long: list[LongSpan]


class PortableAttention:
    """Holds the pool and the memory to gather into, which grows to the largest group and is kept."""

    def __init__(self, pool: KVPool, windows: Sequence[int | None], dtype: torch.dtype) -> None:
        """windows: per layer, see ModelShape. dtype: of queries."""
        self.pool = pool
        self.windows = windows
        self.dtype = dtype
        self._kept_otherwise = pool.quantized or pool.dtype != dtype
        """Whether what a batch has just written is read otherwise than it was."""
        self._room = pool.room_to_read(0)

    def prepare(self, spans: PagedSpans) -> "PortableStep":
        """Sort, group and pad; see AttentionBackend."""
        lengths = spans.end - spans.start
        singles = np.flatnonzero(lengths == 1)
        singles = singles[np.argsort(spans.end[singles], kind="stable")]
        long = np.flatnonzero(lengths > 1)
        views = {window: self._view(spans.through(window), singles, long) for window in dict.fromkeys(self.windows)}
        return PortableStep(self, self._indices(spans.first_row[singles]), views)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks [n] int64, [n * block_size, num_kv_heads, head_dim] each; valid until the next call."""
        if self._room.shape[1] < len(blocks):
            self._room = self.pool.room_to_read(len(blocks))
        return self.pool.read(layer, blocks, self.dtype, self._room)

    def _view(self, spans: PagedSpans, singles: NDArray[np.int64], long: NDArray[np.int64]) -> View:
        counts = np.maximum.accumulate(spans.num_blocks[singles])  # a window's ends differ by a block
        groups = [self._group(spans, singles, first, last) for first, last in self._cut(counts)]
        return View(groups, [self._long_span(spans, int(i)) for i in long])

    def _cut(self, num_blocks: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Ranges [first, last) of decodes, sorted by length, that run together."""
        pool, device = self.pool, self.pool.device.type
        per_number = DEQUANTIZED_BYTES if pool.quantized else self.dtype.itemsize
        block_bytes = pool.block_size * pool.num_kv_heads * pool.head_dim * per_number
        most = max(1, _GROUP_BYTES[device] // block_bytes)
        cuts: list[tuple[int, int]] = []
        first = wasted = 0
        counts: list[int] = num_blocks.tolist()
        for i in range(1, len(counts)):
            wasted += (i - first) * (counts[i] - counts[i - 1])
            if wasted > _WASTED_BLOCKS[device] or (i - first + 1) * counts[i] > most:
                cuts.append((first, i))
                first, wasted = i, 0
        return [*cuts, (first, len(counts))] if counts else []

    def _group(self, spans: PagedSpans, singles: NDArray[np.int64], first: int, last: int) -> DecodeGroup:
        which = singles[first:last]
        tables = spans.padded_tables(which)
        positions = spans.begin[which][:, None] + np.arange(tables.shape[1] * spans.block_size)
        hidden = spans.hidden(spans.start[which][:, None], positions)
        return DecodeGroup(first, last - first, self._indices(tables.reshape(-1)), self._bias(hidden)[:, None, None, :])

    def _long_span(self, spans: PagedSpans, i: int) -> LongSpan:
        rows = slice(int(spans.first_row[i]), int(spans.first_row[i + 1]))
        begin, start, end = int(spans.begin[i]), int(spans.start[i]), int(spans.end[i])
        blocks = self._indices(spans.table(i)) if start > 0 or self._kept_otherwise else None
        if start == 0 and (spans.window is None or spans.window >= end):
            return LongSpan(rows, end, blocks, None)
        hidden = spans.hidden(np.arange(start, end)[:, None], np.arange(begin, end))
        return LongSpan(rows, end - begin, blocks, self._bias(hidden))

    def _indices(self, blocks: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(blocks).to(self.pool.device, non_blocking=True)

    def _bias(self, hidden: NDArray[np.bool_]) -> Tensor:
        bias = torch.zeros(hidden.shape, dtype=self.dtype, device=self.pool.device)
        return bias.masked_fill_(torch.from_numpy(hidden).to(bias.device, non_blocking=True), -math.inf)


@dataclass(frozen=True)
class PortableStep:
    """One iteration's groups and spans."""

    backend: PortableAttention
    decode_rows: Tensor
    """[num_decodes] int64: rows of the batch in the order of the groups."""
    views: dict[int | None, View]
    """By sliding window."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See AttentionStep."""
        view = self.views[self.backend.windows[layer]]
        output = torch.empty(len(queries), queries.shape[1] * queries.shape[2], dtype=queries.dtype, device=queries.device)
        for span in view.long:
            output[span.rows] = self._long_span(span, layer, queries[span.rows], keys[span.rows], values[span.rows])
        if view.groups:
            sorted_queries = queries.index_select(0, self.decode_rows)
            decoded = [self._decode(group, layer, sorted_queries[group.first : group.first + group.size]) for group in view.groups]
            output.index_copy_(0, self.decode_rows, torch.cat(decoded))
        return output

    def _decode(self, group: DecodeGroup, layer: int, queries: Tensor) -> Tensor:
        """[size, num_heads, head_dim] -> [size, num_heads * head_dim]"""
        keys, values = self.backend.gather(layer, group.blocks)
        num_kv_heads, head_dim = keys.shape[1:]
        rows = queries.view(group.size, num_kv_heads, -1, head_dim)
        per_head = rows.shape[2]
        if per_head % 2 and rows.device.type == "cpu":
            # With several threads torch's kernel gives an odd number of rows other bits by where in the batch they stand.
            rows = F.pad(rows, (0, 0, 0, 1))
        keys = keys.view(group.size, -1, num_kv_heads, head_dim).transpose(1, 2)
        values = values.view(group.size, -1, num_kv_heads, head_dim).transpose(1, 2)
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=group.bias)
        return attended[:, :, :per_head].reshape(group.size, -1)

    def _long_span(self, span: LongSpan, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[n, num_heads, head_dim] -> [n, num_heads * head_dim]"""
        if span.blocks is not None:
            keys, values = (context[: span.length] for context in self.backend.gather(layer, span.blocks))
        n, num_heads, head_dim = queries.shape
        num_kv_heads = keys.shape[1]
        group = num_heads // num_kv_heads
        # A key/value head is a batch entry and its query heads are the heads: the context is shared by strides, never repeated.
        rows = queries.view(n, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        keys, values = (x.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (keys, values))
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=span.bias, is_causal=span.bias is None)
        return attended.permute(2, 0, 1, 3).reshape(n, -1)
