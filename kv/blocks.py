"""The pool of KV blocks as numbers: which are free, how many tables hold each, which are kept. The tensors are in kv/pool.py."""

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0
"""Never given to a sequence: padded rows read and write here."""


class IntegrityError(AssertionError):
    """Bookkeeping that contradicts itself: always a bug, never a user's fault."""


class BlockPool:
    """Blocks 1 .. num_blocks - 1. One is free when no table holds it and nobody keeps it.

    Freed blocks are handed out again last in, first out, so that a small working set stays warm in the caches.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_held = 0
        """Blocks that at least one table holds."""
        self._refs = [0] * num_blocks
        self._kept = bytearray(num_blocks)
        self._free = deque(range(num_blocks - 1, NULL_BLOCK, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one table, or kept."""
        return self.num_blocks - 1 - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, anywhere in the pool; None (and nothing taken) if there aren't so many."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        self.num_held += count
        return blocks

    def allocate_run(self, count: int) -> list[int] | None:
        """`count` blocks with consecutive ids, first fit; None if no free run is that long.

        Only for the contiguous baseline: O(num_blocks).
        """
        if count > len(self._free):
            return None
        run = 0
        for block in range(NULL_BLOCK + 1, self.num_blocks):
            run = run + 1 if self._refs[block] == 0 and not self._kept[block] else 0
            if run == count:
                blocks = list(range(block - count + 1, block + 1))
                taken = set(blocks)
                self._free = deque(b for b in self._free if b not in taken)
                for b in blocks:
                    self._refs[b] = 1
                self.num_held += count
                return blocks
        return None

    def share(self, blocks: Iterable[int]) -> None:
        """One more table holds each of these blocks, which are held or kept."""
        for block in blocks:
            if self._refs[block] == 0:
                if not self._kept[block]:
                    raise IntegrityError(f"block {block} is shared but not allocated")
                self.num_held += 1
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One table less holds each; those of none become free, unless they are kept."""
        for block in blocks:
            if self._refs[block] < 1:
                raise IntegrityError(f"block {block} is released but not allocated")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self.num_held -= 1
                if not self._kept[block]:
                    self._free.append(block)

    def keep(self, blocks: Iterable[int]) -> None:
        """These blocks, which tables hold, are not to become free with their last table."""
        for block in blocks:
            if self._refs[block] < 1 or self._kept[block]:
                raise IntegrityError(f"block {block} is kept twice, or in no table")
            self._kept[block] = 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Keep these blocks no longer; those of no table become free."""
        for block in blocks:
            if not self._kept[block]:
                raise IntegrityError(f"block {block} is dropped but not kept")
            self._kept[block] = 0
            if self._refs[block] == 0:
                self._free.append(block)

    def references(self, block: int) -> int:
        """How many tables hold this block."""
        return self._refs[block]

    def is_kept(self, block: int) -> bool:
        """Whether it outlives its tables."""
        return bool(self._kept[block])

    def check_integrity(self) -> None:
        """Raise IntegrityError unless free list and counts agree."""
        free = set(self._free)
        if len(free) != len(self._free) or NULL_BLOCK in free:
            raise IntegrityError("the free list holds a block twice, or the null block")
        for block in range(NULL_BLOCK + 1, self.num_blocks):
            if (self._refs[block] == 0 and not self._kept[block]) != (block in free):
                raise IntegrityError(
                    f"block {block} has {self._refs[block]} references, is {'' if self._kept[block] else 'not '}kept "
                    f"and {'' if block in free else 'not '}free"
                )
        if self.num_held != sum(1 for count in self._refs if count):
            raise IntegrityError("the number of held blocks is miscounted")
