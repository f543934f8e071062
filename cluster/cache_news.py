"""What an engine tells the scheduler of its radix tree, for the prefix index: at most so often, in order, or the whole anew."""

from cluster.protocol import CacheChanges
from kv.changes import ChangeLog
from kv.names import BlockNames
from kv.radix import RadixTree

_EVERY_S = 0.02


class CacheNews:
    """Of one epoch of one engine. No I/O."""

    def __init__(self, engine: str, epoch: int, names: BlockNames) -> None:
        self.log = ChangeLog(names)
        """The tree's observer."""
        self.sent = 0
        """Messages of this epoch."""
        self._engine, self._epoch = engine, epoch
        self._sent_at = 0.0

    def due(self, now: float) -> CacheChanges | None:
        """The message that is to be sent now, if one is."""
        if not self.log or now - self._sent_at < _EVERY_S:
            return None
        return self._message(self.log.take(), now, whole=False)

    def whole(self, tree: RadixTree, now: float) -> CacheChanges:
        """All that the tree has, whatever was told before."""
        self.log.take()
        return self._message([(True, bytes(node.names)) for node in tree.nodes()], now, whole=True)

    def _message(self, changes: list[tuple[bool, bytes]], now: float, whole: bool) -> CacheChanges:
        number, self.sent, self._sent_at = self.sent, self.sent + 1, now
        return CacheChanges(engine=self._engine, epoch=self._epoch, number=number, changes=changes, whole=whole)
