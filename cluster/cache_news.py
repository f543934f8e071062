"""What an engine tells the scheduler of its radix tree, for the prefix index: at most so often, in order, or the whole anew."""

from cluster.protocol import CacheChanges
from kv.changes import ChangeLog
from kv.names import BlockNames
from kv.radix import RadixTree

_EVERY_S = 0.02
_PIECE_BYTES = 8 * 4096
"""Of names: a few milliseconds of the scheduler's time."""


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

    def whole(self, tree: RadixTree, now: float) -> list[CacheChanges]:
        """All that the tree has, whatever was told before: in pieces, so that the scheduler can do other things in between."""
        self.log.take()
        pieces: list[list[tuple[bool, bytes]]] = [[]]
        size = 0
        for node in tree.nodes():
            if size > _PIECE_BYTES:
                pieces.append([])
                size = 0
            pieces[-1].append((True, bytes(node.names)))
            size += len(node.names)
        return [self._message(piece, now, whole=number == 0) for number, piece in enumerate(pieces)]

    def _message(self, changes: list[tuple[bool, bytes]], now: float, whole: bool) -> CacheChanges:
        number, self.sent, self._sent_at = self.sent, self.sent + 1, now
        return CacheChanges(engine=self._engine, epoch=self._epoch, number=number, changes=changes, whole=whole)
