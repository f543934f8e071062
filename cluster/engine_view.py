"""An engine as the global scheduler sees it: its last report, and what was bound to it since."""

import math
from collections.abc import Iterable
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


@dataclass(slots=True)
class EngineView:
    """An engine as its last report, and what was bound to it since, show it."""

    report: EngineReport
    heard_at: float
    max_sequence_tokens: int
    """The last known one: an engine that loads again will most likely hold what it held."""
    changed: set[str]
    """Where it puts its name when what that_take() says of it may have changed."""
    bindings: dict[tuple[str, int], _Binding] = field(default_factory=dict)
    bound: Credit = field(default_factory=lambda: Credit(0, 0))
    """The sum of the bindings."""
    bound_work: int = 0
    """Likewise."""
    name: str = field(init=False)
    delay: float = field(init=False)
    """What it adds to the cost of any request, see cluster/placement.py."""
    pool_tokens: float = field(init=False)
    """At least 1."""
    _longest: int = field(init=False)
    _most_tokens: float = field(init=False)
    _most_sequences: float = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.report.engine
        self._refresh()

    def hear(self, report: EngineReport, now: float) -> None:
        """A newer report of the same epoch."""
        self.report, self.heard_at = report, now
        self._refresh()

    def _refresh(self) -> None:
        """What that_take() and a choice go by: every engine is asked for every request, which must not take long."""
        report, left = self.report, self.left
        capacity, stats = report.capacity, report.stats
        idle = report.credit == capacity and not self.bindings
        # The most of each that a request may have: any, where it needs no more than half of all there is and so much is left.
        self._longest = report.max_sequence_tokens if report.ready else -1
        self._most_tokens = math.inf if idle or left.tokens >= max(1, capacity.tokens // 2) else float(left.tokens)
        self._most_sequences = math.inf if idle or left.sequences >= max(1, capacity.sequences // 2) else float(left.sequences)
        sequences = stats.running + stats.waiting + self.bound.sequences
        self.pool_tokens = float(max(1, capacity.tokens))
        self.delay = placement.delay(stats.backlog + self.bound_work, sequences)
        self.changed.add(self.name)

    @property
    def left(self) -> Credit:
        """Credit that is not bound."""
        credit = self.report.credit
        return Credit(credit.tokens - self.bound.tokens, credit.sequences - self.bound.sequences)

    def bind(self, place: Place, work: int, expires: float) -> None:
        """Take the credit that `place` needs, until it is accepted or the binding expires. `work`: tokens to be computed first."""
        key = (place.request, place.attempt)
        self.unbind(key)
        self.bindings[key] = _Binding(place.num_tokens, place.sequences, work, expires)
        self._count(self.bindings[key], 1)

    def unbind(self, key: tuple[str, int]) -> None:
        """Accepted, withdrawn or expired."""
        binding = self.bindings.pop(key, None)
        if binding is not None:
            self._count(binding, -1)

    def _count(self, binding: _Binding, sign: int) -> None:
        self.bound = Credit(self.bound.tokens + sign * binding.tokens, self.bound.sequences + sign * binding.sequences)
        self.bound_work += sign * binding.work
        self._refresh()


def that_take(views: Iterable[EngineView], place: Place) -> list[EngineView]:
    """Those whose credit covers `place`. What is more than half of all there is needs an idle engine, or half of it free."""
    # Numbers of one type are compared twice as fast as an int with a float.
    longest, tokens, sequences = place.longest, float(place.num_tokens), float(place.sequences)
    return [
        view for view in views if longest <= view._longest and tokens <= view._most_tokens and sequences <= view._most_sequences
    ]
