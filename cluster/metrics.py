"""Counters summed over processes that come and go."""

from collections.abc import Iterable

from cluster.protocol import MetricSample

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Totals:
    """Running totals of many sources. What a source counted stays in the sum when it is gone or starts again from zero."""

    def __init__(self) -> None:
        self._retired: dict[_Key, float] = {}
        self._current: dict[str, dict[_Key, float]] = {}

    def put(self, source: str, samples: Iterable[MetricSample]) -> None:
        """The source's totals so far. A total below the last one means that the source began anew."""
        new = {(s.name, s.labels): s.value for s in samples}
        old = self._current.get(source, {})
        if any(new.get(key, 0.0) < value for key, value in old.items()):
            self.retire(source)
        self._current[source] = new

    def retire(self, source: str) -> None:
        """The source is gone: keep what it counted."""
        for key, value in self._current.pop(source, {}).items():
            self._retired[key] = self._retired.get(key, 0.0) + value

    def samples(self) -> list[MetricSample]:
        """The sums, sorted by name and labels."""
        sums = dict(self._retired)
        for current in self._current.values():
            for key, value in current.items():
                sums[key] = sums.get(key, 0.0) + value
        return [MetricSample(name, labels, sums[name, labels]) for name, labels in sorted(sums)]
