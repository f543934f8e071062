"""Counters summed over processes that come and go."""

from collections import OrderedDict
from collections.abc import Iterable

from cluster.protocol import MetricSample

_Key = tuple[str, tuple[tuple[str, str], ...]]


MAX_SOURCES = 4096


class Totals:
    """Running totals of many sources. What a source counted stays in the sum when it is gone or starts again from zero."""

    def __init__(self) -> None:
        self._folded: dict[_Key, float] = {}
        """What sources counted that are not kept apart any more."""
        self._sources: OrderedDict[str, dict[_Key, float]] = OrderedDict()
        """Last heard of last. Those that are gone stay for a while: they may only have been silent."""

    def put(self, source: str, samples: Iterable[MetricSample]) -> None:
        """The source's totals so far. A total below the last one means that the source began anew."""
        new = {(s.name, s.labels): s.value for s in samples}
        old = self._sources.pop(source, {})
        if any(new.get(key, 0.0) < value for key, value in old.items()):
            self._fold(old)
        self._sources[source] = new
        if len(self._sources) > MAX_SOURCES:
            self._fold(self._sources.popitem(last=False)[1])

    def _fold(self, totals: dict[_Key, float]) -> None:
        for key, value in totals.items():
            self._folded[key] = self._folded.get(key, 0.0) + value

    def samples(self) -> list[MetricSample]:
        """The sums, sorted by name and labels."""
        sums = dict(self._folded)
        for current in self._sources.values():
            for key, value in current.items():
                sums[key] = sums.get(key, 0.0) + value
        return [MetricSample(name, labels, sums[name, labels]) for name, labels in sorted(sums)]
