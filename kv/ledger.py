"""Where the KV slots go: used, shared and wasted (the accounting of PagedAttention, Kwon et al. 2023, section 3.1 and figure 2)."""

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
