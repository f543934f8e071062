"""Where the KV slots go: used, shared and wasted (the accounting of PagedAttention, Kwon et al. 2023, section 3.1 and figure 2)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ledger:
    """Slots of the pool at one moment. A block in several tables counts once; its extra uses are `shared`."""

    allocated: int = 0
    """Slots in blocks that some sequence holds."""
    used: int = 0
    """Of these, slots with valid KV."""
    shared: int = 0
    """Slots that sharing saved: used through more tables than one, counted once less than their tables."""

    @property
    def wasted(self) -> int:
        """Allocated but without KV: reserved for tokens to come, or the unfilled end of a last block."""
        return self.allocated - self.used

    @property
    def waste(self) -> float:
        """Wasted share of what is allocated, 0 when nothing is."""
        return self.wasted / self.allocated if self.allocated else 0.0


def measure(tables: Iterable[tuple[Sequence[int], int]], block_size: int) -> Ledger:
    """Ledger over (block table, tokens with valid KV) of each sequence."""
    filled: dict[int, int] = {}
    total = 0
    for blocks, num_tokens in tables:
        total += min(num_tokens, len(blocks) * block_size)
        for index, block in enumerate(blocks):
            valid = min(block_size, max(0, num_tokens - index * block_size))
            filled[block] = max(filled.get(block, 0), valid)
    used = sum(filled.values())
    return Ledger(allocated=len(filled) * block_size, used=used, shared=total - used)
