"""Who holds which blocks: block tables, allocated on demand, forked with copy-on-write.

Ownership of one sequence's slots, by position:

    0 ............ num_computed ............ end of the running chunk ............ end of the last block
    |-- valid KV ----|-- written by launched plans --|-- allocated, not yet written: at most one block (paged) --|

A table's blocks are held (one reference each) from `admit` to `release`. Nobody ever writes into a block that another table
holds: a fork shares whole blocks only, and copies the one it will write into.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.config import BatchConfig
from kv.blocks import BlockPool, IntegrityError
from kv.ledger import Ledger, measure


@dataclass(frozen=True)
class PrefixMatch:
    """The longest known prefix of some tokens: whole blocks that hold their KV."""

    num_tokens: int = 0
    blocks: tuple[int, ...] = ()


class PrefixCache(Protocol):
    """What the manager asks of a tree of KV that outlives its sequences (RadixAttention)."""

    def match(self, tokens: Sequence[int], salt: str) -> PrefixMatch:
        """The longest prefix of `tokens`, at most len - 1 of them. Changes nothing."""

    def pending(self, tokens: Sequence[int], blocks: Sequence[int], salt: str) -> None:
        """These whole blocks will hold the KV of `tokens` once the plan being made has run: later plans may rely on it."""

    def computed(self, tokens: Sequence[int], blocks: Sequence[int], salt: str) -> None:
        """The result is in: these blocks hold the KV of `tokens`, generated ones included."""

    def evict(self, count: int) -> int:
        """Give back up to `count` least recently used blocks that no sequence holds; returns how many."""


class NoPrefixCache:
    """prefix_cache: off."""

    def match(self, tokens: Sequence[int], salt: str) -> PrefixMatch:
        """Nothing is ever known."""
        return PrefixMatch()

    def pending(self, tokens: Sequence[int], blocks: Sequence[int], salt: str) -> None:
        """Not kept."""

    def computed(self, tokens: Sequence[int], blocks: Sequence[int], salt: str) -> None:
        """Not kept."""

    def evict(self, count: int) -> int:
        """There is nothing to evict."""
        return 0


@dataclass(frozen=True)
class Fork:
    """A new table that begins with another sequence's KV."""

    copy: tuple[int, int] | None
    """(source, destination): the block both will write into, to be copied before the plan's chunks run."""


class KVManager:
    """Block tables of one engine's admitted sequences. Failure to allocate is None, and then nothing has changed."""

    def __init__(self, config: BatchConfig, cache: PrefixCache | None = None) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        self.cache = cache or NoPrefixCache()
        self._tables: dict[int, list[int]] = {}

    def match(self, tokens: Sequence[int], salt: str) -> PrefixMatch:
        """The longest cached prefix of `tokens`. Changes nothing."""
        return self.cache.match(tokens, salt)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.config.block_size)

    def table(self, seq: int) -> list[int]:
        """The block table of an admitted sequence. Not to be changed."""
        return self._tables[seq]

    @property
    def sequences(self) -> set[int]:
        """Those that have a table."""
        return set(self._tables)

    def holds(self, seq: int) -> bool:
        """Whether `seq` has a table."""
        return seq in self._tables

    def admit(self, seq: int, match: PrefixMatch, max_tokens: int) -> bool:
        """Begin a table for `seq` with a matched prefix; the baselines reserve the blocks of its whole life now.

        max_tokens: the most tokens (prompt and output) it can come to. False if a reservation can't be had.
        """
        self._check_new(seq)
        reserved = self._reserve(max_tokens)
        if reserved is None:
            return False
        self.pool.share(match.blocks)
        self._tables[seq] = [*match.blocks, *reserved]
        return True

    def _check_new(self, seq: int) -> None:
        if seq in self._tables:
            raise IntegrityError(f"sequence {seq} is admitted twice")

    def blocks_to_admit(self, num_tokens: int, max_tokens: int) -> int:
        """Blocks that a sequence with `num_tokens` known ones needs to begin, without sharing."""
        match self.config.reservation:
            case "paged":
                return self.blocks_for(num_tokens)
            case "max_tokens":
                return self.blocks_for(max_tokens)
            case "contiguous":
                return self.blocks_for(self.config.max_sequence_tokens)

    def _reserve(self, max_tokens: int) -> list[int] | None:
        if self.config.reservation == "paged":
            return []
        count = self.blocks_to_admit(0, max_tokens)
        return self.pool.allocate(count) if self.config.reservation == "max_tokens" else self.pool.allocate_run(count)

    def allocate(self, seq: int, num_tokens: int) -> list[int] | None:
        """Make room for the first `num_tokens` tokens of `seq`; returns the blocks appended to its table, perhaps none."""
        table = self._tables[seq]
        missing = self.blocks_for(num_tokens) - len(table)
        if missing <= 0:
            return []
        if missing > self.pool.num_free:
            self.cache.evict(missing - self.pool.num_free)
        blocks = self.pool.allocate(missing)
        if blocks is not None:
            table.extend(blocks)
        return blocks

    def fork(self, parent: int, child: int, num_tokens: int) -> Fork | None:
        """Begin `child`'s table with the parent's KV of the first `num_tokens` tokens: whole blocks shared, a part block copied.

        The part block is copied at once and not at the first write, since both will write there in their next iteration anyway.
        None if there is no block for the copy.
        """
        self._check_new(child)
        whole, rest = divmod(num_tokens, self.config.block_size)
        source = self._tables[parent]
        copied: list[int] = []
        if rest:
            taken = self.pool.allocate(1)
            if taken is None:
                return None
            copied = taken
        self.pool.share(source[:whole])
        self._tables[child] = [*source[:whole], *copied]
        return Fork((source[whole], copied[0]) if rest else None)

    def release(self, seq: int) -> None:
        """End a sequence's table; blocks held by nobody else become free."""
        self.pool.release(self._tables.pop(seq))

    def ledger(self, computed: dict[int, int]) -> Ledger:
        """The slots of all tables; `computed` has each sequence's number of tokens with valid KV."""
        size = self.config.block_size
        if self.pool.num_used == sum(map(len, self._tables.values())):  # nothing is shared: no need to look at single blocks
            used = sum(min(computed.get(seq, 0), len(table) * size) for seq, table in self._tables.items())
            return Ledger(self.pool.num_used * size, used)
        return measure(((table, computed.get(seq, 0)) for seq, table in self._tables.items()), size)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless tables and reference counts agree."""
        self.pool.check_integrity()
        counts: dict[int, int] = {}
        for seq, table in self._tables.items():
            if len(set(table)) != len(table):
                raise IntegrityError(f"sequence {seq} holds a block twice")
            for block in table:
                counts[block] = counts.get(block, 0) + 1
        for block, count in counts.items():
            if self.pool.references(block) < count:
                raise IntegrityError(f"block {block} is in {count} tables but has {self.pool.references(block)} references")
        if isinstance(self.cache, NoPrefixCache) and self.pool.num_used != len(counts):
            raise IntegrityError(f"{self.pool.num_used - len(counts)} blocks are allocated, but in no table")
