"""The pool of KV blocks as numbers: which are free, and how many tables hold each. The tensors are in kv/pool.py."""

from collections import deque
from collections.abc import Iterable

NULL_BLOCK = 0
"""Never given to a sequence: padded rows read and write here."""


class IntegrityError(AssertionError):
    """Bookkeeping that contradicts itself: always a bug, never a user's fault."""


class BlockPool:
    """Reference-counted blocks 1 .. num_blocks - 1.

    Freed blocks are handed out again last in, first out, so that a small working set stays warm in the caches.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free = deque(range(num_blocks - 1, NULL_BLOCK, -1))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one table."""
        return self.num_blocks - 1 - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, anywhere in the pool; None (and nothing taken) if there aren't so many."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def allocate_run(self, count: int) -> list[int] | None:
        """`count` blocks with consecutive ids, first fit; None if no free run is that long.

        Only for the contiguous baseline: O(num_blocks).
        """
        if count > len(self._free):
            return None
        run = 0
        for block in range(NULL_BLOCK + 1, self.num_blocks):
            run = run + 1 if self._refs[block] == 0 else 0
            if run == count:
                blocks = list(range(block - count + 1, block + 1))
                taken = set(blocks)
                self._free = deque(b for b in self._free if b not in taken)
                for b in blocks:
                    self._refs[b] = 1
                return blocks
        return None

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these allocated blocks."""
        for block in blocks:
            if self._refs[block] < 1:
                raise IntegrityError(f"block {block} is shared but not allocated")
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each; those without any become free."""
        for block in blocks:
            if self._refs[block] < 1:
                raise IntegrityError(f"block {block} is released but not allocated")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free.append(block)

    def references(self, block: int) -> int:
        """How many tables hold this block."""
        return self._refs[block]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless free list and reference counts agree."""
        free = set(self._free)
        if len(free) != len(self._free) or NULL_BLOCK in free:
            raise IntegrityError("the free list holds a block twice, or the null block")
        for block in range(NULL_BLOCK + 1, self.num_blocks):
            if (self._refs[block] == 0) != (block in free):
                raise IntegrityError(
                    f"block {block} has {self._refs[block]} references and is {'' if block in free else 'not '}free"
                )
