"""Who holds which blocks: block tables, allocated on demand, begun with what is known already, forked with copy-on-write.

Ownership of one sequence's slots, by position:

    0 ............ num_computed ............ end of the running chunk ............ end of the last block
    |-- valid KV ----|-- written by launched plans --|-- allocated, not yet written: at most one block (paged) --|

A table's blocks are held (one reference each) from `admit` to `release`. Nobody ever writes into a block that another table
holds or that the tree keeps, but for what `record` says of the plan that is being made: whole blocks only are shared, and the one
that will be written into is copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.config import BatchConfig
from cluster.protocol import Transfer
from kv.blocks import BlockPool, IntegrityError
from kv.ledger import Ledger
from kv.radix import NO_MATCH, Key, Lease, Observer, PrefixMatch, RadixTree


@dataclass(frozen=True)
class Beginning:
    """A new table's first tokens, whose KV there is already."""

    num_tokens: int
    copy: tuple[int, int] | None
    """(source, destination): a part of a block that this table will write into, to be copied before the plan's chunks run."""


@dataclass
class _Table:
    blocks: list[int]
    lease: Lease | None = None
    """Of the part of the table that the tree has."""
    forked: int = 0
    """So many first blocks were shared by a fork, of another table or with another table."""


class KVManager:
    """Block tables of one engine's admitted sequences, and the tree of what they leave behind, if the settings want one.

    Failure to allocate is None, and then no table has changed.
    """

    def __init__(self, config: BatchConfig, observer: Observer | None = None) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks)
        keeps = config.keeps_prefixes
        self.tree = RadixTree(self.pool, config.block_size, observer, config.host_blocks) if keeps else None
        self.host = None if self.tree is None else self.tree.host
        self._tables: dict[int, _Table] = {}
        self._fresh: set[int] = set()
        """Blocks that the plan being made will write: whole ones can be shared in it, but no part copied before it has run."""

    def begin_plan(self, copies: Sequence[tuple[int, int]] = ()) -> None:
        """What was recorded so far is written before anything that is planned from now on. `copies`: of the new plan; what a
        Beginning asks for is to be appended at once, since transfers have their places among them."""
        self._fresh.clear()
        if self.host is not None:
            self.host.begin_plan(copies)

    def take_transfers(self) -> list[Transfer]:
        """Between the pool and the host, for the plan that is being made."""
        return [] if self.host is None else self.host.take_transfers()

    @property
    def has_transfers(self) -> bool:
        """Whether some are decided that no plan has taken."""
        return self.host is not None and self.host.has_transfers

    @property
    def num_free(self) -> int:
        """Blocks that can be had: free ones, and those that only the tree keeps."""
        return self.pool.num_free + (0 if self.tree is None else self.tree.num_idle)

    def match(self, key: Key, salt: str) -> PrefixMatch:
        """The longest known prefix of packed tokens (kv.names.pack), at most all but the last. Changes nothing."""
        if self.tree is None:
            return NO_MATCH
        match = self.tree.match(key, salt)
        return match if match.part is None or match.part[0] not in self._fresh else replace(match, part=None)

    def known_tokens(self, match: PrefixMatch) -> int:
        """Of a match's whole blocks, wherever they are."""
        return match.num_tokens + len(match.host) * self.config.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.config.block_size)

    def table(self, seq: int) -> list[int]:
        """The block table of an admitted sequence. Not to be changed."""
        return self._tables[seq].blocks

    @property
    def sequences(self) -> set[int]:
        """Those that have a table."""
        return set(self._tables)

    def holds(self, seq: int) -> bool:
        """Whether `seq` has a table."""
        return seq in self._tables

    def admit(self, seq: int, match: PrefixMatch, salt: str, max_tokens: int) -> Beginning | None:
        """Begin a table for `seq` with a matched prefix; the baselines reserve the blocks of its whole life now.

        max_tokens: the most tokens (prompt and output) it can come to. None if a reservation can't be had.
        """
        self._check_new(seq)
        reserved = self._reserve(max_tokens)
        if reserved is None:
            return None
        if self.tree is None:
            self._tables[seq] = _Table(reserved)
            return Beginning(0, None)
        loaded = min(len(match.host), self.num_free - match.idle)
        lease = self.tree.lock(match, salt, loaded)
        table = self._tables[seq] = _Table(list(match.blocks), lease)
        self.pool.share(match.blocks)
        if loaded:
            return self._bring_back(table, lease, loaded)
        if match.part is not None:
            source, count = match.part
            copied = self._take(1)
            if copied is not None:
                table.blocks += copied
                return Beginning(match.num_tokens + count, (source, copied[0]))
        return Beginning(match.num_tokens, None)

    def hold(self, seq: int, match: PrefixMatch, salt: str) -> None:
        """Begin a table for `seq`, which is no sequence's, with just those whole blocks of a match that are in the pool."""
        self._check_new(seq)
        assert self.tree is not None
        self._tables[seq] = _Table(list(match.blocks), self.tree.lock(match, salt))
        self.pool.share(match.blocks)

    def _bring_back(self, table: _Table, lease: Lease, count: int) -> Beginning:
        """Load the `count` blocks on the host that `lease` holds."""
        assert self.tree is not None
        blocks = self._take(count)
        assert blocks is not None, "there were as many"
        self.tree.bring_back(lease, blocks)
        table.blocks += blocks
        return Beginning(len(table.blocks) * self.config.block_size, None)

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
        table = self._tables[seq].blocks
        missing = self.blocks_for(num_tokens) - len(table)
        if missing <= 0:
            return []
        blocks = self._take(missing)
        if blocks is not None:
            table.extend(blocks)
        return blocks

    def _take(self, count: int) -> list[int] | None:
        if count > self.num_free:
            return None
        if self.tree is not None and count > self.pool.num_free:
            self.tree.evict(count - self.pool.num_free)
        return self.pool.allocate(count)

    def record(self, seq: int, key: Key, num_tokens: int) -> None:
        """The first `num_tokens` of the packed tokens `key` have their KV in the table of `seq`, or will have it once the plan that
        is being made has run. Whole blocks of it can be found from now on, and outlive the table."""
        if self.tree is None:
            return
        table = self._tables[seq]
        assert table.lease is not None
        end = self._end_of_own(table, table.lease, num_tokens)
        if end > table.lease.num_blocks:
            self._fresh.update(table.blocks[table.lease.num_blocks : end])
            self.tree.insert(table.lease, key, table.blocks[:end])

    def fork(self, parent: int, child: int, num_tokens: int) -> Beginning | None:
        """Begin `child`'s table with the parent's KV of the first `num_tokens` tokens: whole blocks shared, a part block copied.

        The part block is copied at once and not at the first write, since both will write there in their next iteration anyway.
        None if there is no block for the copy.
        """
        self._check_new(child)
        whole, rest = divmod(num_tokens, self.config.block_size)
        source = self._tables[parent]
        copied = self._take(1) if rest else []
        if copied is None:
            return None
        lease = None
        if self.tree is not None and source.lease is not None:
            lease = self.tree.share(source.lease, min(whole, source.lease.num_blocks))
        self.pool.share(source.blocks[:whole])
        source.forked = max(source.forked, whole)
        self._tables[child] = _Table([*source.blocks[:whole], *copied], lease, whole)
        return Beginning(num_tokens, (source.blocks[whole], copied[0]) if rest else None)

    def release(self, seq: int, key: Key = b"", num_tokens: int = 0) -> None:
        """End a sequence's table; blocks held by nobody else become free, or idle in the tree, which keeps the whole ones of the
        first `num_tokens` tokens of `key`, whose KV they have."""
        table = self._tables.pop(seq)
        if self.tree is not None and table.lease is not None:
            self.tree.release(table.lease, key, table.blocks[: self._end_of_own(table, table.lease, num_tokens)])
        self.pool.release(table.blocks)

    def _end_of_own(self, table: _Table, lease: Lease, num_tokens: int) -> int:
        """Whole blocks of the first `num_tokens` tokens, up to one behind the lease that another table shares by a fork: what the
        tree has is either held by a lease of each of its tables, or idle."""
        whole = num_tokens // self.config.block_size
        behind = range(lease.num_blocks, min(whole, table.forked))
        shared = (at for at in behind if self.pool.references(table.blocks[at]) > 1)
        return next(shared, whole)

    def ledger(self, computed: dict[int, int]) -> Ledger:
        """The slots of all tables; `computed` has each sequence's number of tokens with valid KV."""
        size = self.config.block_size
        tables = self._tables.items()
        filled = sum(min(computed.get(seq, 0), len(table.blocks) * size) for seq, table in tables)
        shared = (sum(len(table.blocks) for _, table in tables) - self.pool.num_held) * size  # only whole blocks are
        return Ledger(self.pool.num_held * size, filled - shared, shared)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless tables and reference counts agree."""
        self.pool.check_integrity()
        counts: dict[int, int] = {}
        for seq, table in self._tables.items():
            if len(set(table.blocks)) != len(table.blocks):
                raise IntegrityError(f"sequence {seq} holds a block twice")
            for block in table.blocks:
                counts[block] = counts.get(block, 0) + 1
        for block in range(self.pool.num_blocks):
            if self.pool.references(block) != counts.get(block, 0):
                raise IntegrityError(
                    f"block {block} is in {counts.get(block, 0)} tables but has {self.pool.references(block)} references"
                )
        if self.tree is not None:
            self.tree.check_integrity()
