"""What a tree gained and lost, noted for those who follow it from afar."""

from kv.names import BlockNames
from kv.radix import Key


class ChangeLog:
    """An observer of a radix tree (kv.radix.Observer)."""

    def __init__(self, names: BlockNames) -> None:
        self._names = names
        self._changes: list[tuple[bool, bytearray]] = []

    def added(self, before: bytes, salt: str, key: Key) -> bytes:
        """See Observer."""
        names = self._names.of(key, salt, before)
        self._note(True, names)
        return names

    def removed(self, names: bytes) -> None:
        """See Observer."""
        self._note(False, names)

    def _note(self, added: bool, names: bytes) -> None:
        if self._changes and self._changes[-1][0] == added:
            self._changes[-1][1].extend(names)
        else:
            self._changes.append((added, bytearray(names)))

    def __bool__(self) -> bool:
        """Whether there is something to take."""
        return bool(self._changes)

    def take(self) -> list[tuple[bool, bytes]]:
        """(added or removed, names joined) in order, since the last take."""
        changes, self._changes = self._changes, []
        return [(added, bytes(names)) for added, names in changes]
