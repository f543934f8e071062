"""What attention must know of a batch: which rows belong to which sequence, and where its context lies in the pool."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from workers.sequences import Span


@dataclass(frozen=True)
class PagedSpans:
    """The spans of one iteration in batch order, as arrays. Rows [first_row[i], first_row[i + 1]) are span i's queries at positions
    [start[i], end[i]); it attends to positions [begin[i], end[i]) of its sequence, each query up to its own."""

    block_size: int
    start: NDArray[np.int64]
    """[num_spans]"""
    end: NDArray[np.int64]
    """[num_spans]"""
    first_row: NDArray[np.int64]
    """[num_spans + 1]"""
    tables: NDArray[np.int64]
    """[sum of block counts]: the block tables one after the other, each cut to the blocks that hold [begin, end)."""
    first_block: NDArray[np.int64]
    """[num_spans + 1]: where each table starts in `tables`."""
    begin: NDArray[np.int64]
    """[num_spans]: position that each table starts at, a multiple of block_size: 0, or what a sliding window leaves."""
    window: int | None = None
    """How many positions a query sees, its own included; None: all up to its own."""

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int) -> "PagedSpans":
        """Gather the arrays of `spans`, which must not be empty."""
        start = np.array([span.start for span in spans], dtype=np.int64)
        end = np.array([span.end for span in spans], dtype=np.int64)
        num_blocks = -(-end // block_size)
        tables = np.concatenate([span.state.blocks[:n] for span, n in zip(spans, num_blocks.tolist(), strict=True)])
        rows, first_block = _offsets(end - start), _offsets(num_blocks)
        return cls(block_size, start, end, rows, tables.astype(np.int64), first_block, np.zeros_like(start))

    def through(self, window: int | None) -> "PagedSpans":
        """The same spans, seen through a sliding window: their tables without the blocks that no query sees."""
        if window is None:
            return self
        unseen = np.maximum(self.start + 1 - window, 0) // self.block_size
        kept = self.num_blocks - unseen
        first_block = _offsets(kept)
        which = np.arange(first_block[-1]) + np.repeat(self.first_block[:-1] + unseen - first_block[:-1], kept)
        return replace(self, tables=self.tables[which], first_block=first_block, begin=unseen * self.block_size, window=window)

    def hidden(self, queries: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where a query at a position does not see a key at a position; the two arrays broadcast."""
        future = keys > queries
        return future if self.window is None else future | (keys <= queries - self.window)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_blocks(self) -> NDArray[np.int64]:
        """[num_spans]: blocks of each span's context."""
        return np.diff(self.first_block)

    def table(self, i: int) -> NDArray[np.int64]:
        """[num_blocks[i]]: block table of span i."""
        return self.tables[self.first_block[i] : self.first_block[i + 1]]

    def padded_tables(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """[len(which), most blocks among them]: block tables, padded with the null block."""
        counts = self.num_blocks[which]
        column = np.arange(counts.max())
        inside = column < counts[:, None]
        return np.where(inside, self.tables[np.where(inside, self.first_block[which][:, None] + column, 0)], 0)

    def positions(self) -> NDArray[np.int64]:
        """[num_tokens]: position of every row in its sequence."""
        return np.arange(self.first_row[-1]) + np.repeat(self.start - self.first_row[:-1], np.diff(self.first_row))

    def slots(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[num_tokens]: where in the pool every row's key and value go. Not for spans seen through a window."""
        first_block = np.repeat(self.first_block[:-1], np.diff(self.first_row))
        block, offset = np.divmod(positions, self.block_size)
        return self.tables[first_block + block] * self.block_size + offset


def _offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(counts)))
