"""The prefix index as the global scheduler keeps it: fed by what engines tell, in order, or anew where something is missing."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.protocol import CacheChanges
from kv.index import PrefixIndex

_PATIENCE_S = 5.0
"""After so long the whole is asked for again."""


@dataclass
class _Feed:
    epoch: int
    next: int = 0
    """Number of the message that follows what is known."""
    asked_at: float | None = None
    """When the whole was asked for, if it has not come."""


class Prefixes:
    """Which engine has how much of a prompt."""

    def __init__(self, max_blocks: int) -> None:
        """`max_blocks`: names kept, the least recently used go first."""
        self.index = PrefixIndex(max_blocks)
        self._feeds: dict[str, _Feed] = {}

    def follow(self, engine: str, epoch: int, sent: int, now: float) -> bool:
        """The engine lives in this epoch and has sent so many CacheChanges; False if it has to be asked for the whole."""
        feed = self._feeds.get(engine)
        if feed is None or feed.epoch < epoch:
            self.forget(engine)
            feed = self._feeds[engine] = _Feed(epoch)
        return sent <= feed.next or not self._may_ask(feed, now)

    def forget(self, engine: str) -> None:
        """The engine, or its epoch, is over."""
        self.index.forget(engine)
        self._feeds.pop(engine, None)

    def take(self, message: CacheChanges, now: float) -> bool:
        """Take in what an engine tells; False if it has to be asked for the whole."""
        feed = self._feeds.get(message.engine)
        if feed is None or feed.epoch != message.epoch:
            return True  # its epoch is over; or it was not heard of yet, and its first report will ask for the whole
        if message.whole:
            self.index.forget(message.engine)
            feed.asked_at = None
        elif feed.asked_at is not None or message.number != feed.next:
            return not self._may_ask(feed, now)
        feed.next = message.number + 1
        for added, names in message.changes:
            if added:
                self.index.added(message.engine, names)
            else:
                self.index.removed(message.engine, names)
        return True

    def _may_ask(self, feed: _Feed, now: float) -> bool:
        """Whether to ask for the whole, unless that was done just now."""
        if feed.asked_at is not None and now - feed.asked_at < _PATIENCE_S:
            return False
        feed.asked_at = now
        return True

    def overlap(self, names: Sequence[int]) -> dict[str, int]:
        """How many of a prompt's first blocks (kv.index.unpack) each engine has; those that have none are left out."""
        return self.index.overlap(names)

    def expect(self, engine: str, names: Sequence[int], now: float) -> None:
        """A request with these blocks is on its way to the engine."""
        self.index.expect(engine, names, now)

    def tick(self, now: float) -> None:
        """Look at the clock. Call a few times a second."""
        self.index.tick(now)
