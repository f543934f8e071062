"""An engine as the global scheduler sees it: its last report, and what was bound to it since."""

import math
from dataclasses import dataclass, field

from cluster import placement
from cluster.protocol import Credit, EngineReport, Place


@dataclass(frozen=True)
class _Binding:
    tokens: int
    sequences: int
    work: int
    """Tokens to be computed before its first new one."""
    expires: float


@dataclass
class EngineView:
    """An engine as its last report, and what was bound to it since, show it."""

    report: EngineReport
    heard_at: float
    max_sequence_tokens: int
    """The last known one: an engine that loads again will most likely hold what it held."""
    bindings: dict[tuple[str, int], _Binding] = field(default_factory=dict)
    bound: Credit = field(default_factory=lambda: Credit(0, 0))
    """The sum of the bindings."""
    bound_work: int = 0
    """Likewise."""
    recent_work: float = 0.0
    """Of all that was bound to it, the older the less: see fade()."""

    @property
    def left(self) -> Credit:
        """Credit that is not bound."""
        credit = self.report.credit
        return Credit(credit.tokens - self.bound.tokens, credit.sequences - self.bound.sequences)

    def takes(self, place: Place) -> bool:
        """Whether the credit covers `place`. What is more than half of all there is needs an idle engine, or half of it free."""
        report, capacity = self.report, self.report.capacity
        if not report.ready or place.longest > report.max_sequence_tokens:
            return False
        left = self.left
        tokens = min(place.num_tokens, max(1, capacity.tokens // 2))
        sequences = min(place.sequences, max(1, capacity.sequences // 2))
        idle = report.credit == capacity and not self.bindings
        return idle or (left.tokens >= tokens and left.sequences >= sequences)

    def cost(self, place: Place, overlap: int, mean_turnover: float) -> tuple[float, int, str]:
        """Of placing here, where `overlap` tokens of the prompt are known: the least is the best (see cluster/placement.py).
        `mean_turnover`: recent work by pool tokens, of all engines."""
        stats = self.report.stats
        sequences = stats.running + stats.waiting + self.bound.sequences
        turnover = self.recent_work / max(1, self.report.capacity.tokens) / mean_turnover if mean_turnover else 1.0
        option = placement.Option(overlap, stats.backlog + self.bound_work, sequences, turnover)
        return placement.cost(option, place.num_tokens), -overlap, self.report.engine

    def bind(self, place: Place, work: int, expires: float) -> None:
        """Take the credit that `place` needs, until it is accepted or the binding expires. `work`: tokens to be computed first."""
        key = (place.request, place.attempt)
        self.unbind(key)
        self.bindings[key] = _Binding(place.num_tokens, place.sequences, work, expires)
        self.recent_work += work
        self._count(self.bindings[key], 1)

    def fade(self, share: float) -> None:
        """All engines together were bound work for this share of their pools: what was before has lost so much of its weight."""
        self.recent_work *= math.exp(-share)

    def unbind(self, key: tuple[str, int]) -> None:
        """Accepted, withdrawn or expired."""
        binding = self.bindings.pop(key, None)
        if binding is not None:
            self._count(binding, -1)

    def _count(self, binding: _Binding, sign: int) -> None:
        self.bound = Credit(self.bound.tokens + sign * binding.tokens, self.bound.sequences + sign * binding.sequences)
        self.bound_work += sign * binding.work
