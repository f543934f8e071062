"""A radix tree node's children, by their first block: exact look-up, and the one that begins most like some tokens."""

import bisect
from collections.abc import Iterator
from typing import Generic, TypeVar

_FEW = 8
"""So many keys are compared one by one; more are kept in order besides."""
_SHELF = 512

T = TypeVar("T")


class Children(Generic[T]):
    """A mapping from keys, all of one length, with a search for the key that has the longest prefix in common with a given one."""

    __slots__ = ("_by_key", "_ordered")

    def __init__(self) -> None:
        self._by_key: dict[bytes, T] = {}
        self._ordered: _Shelves | None = None

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: bytes) -> T | None:
        """The child of just this key."""
        return self._by_key.get(key)

    def put(self, key: bytes, child: T) -> None:
        """Add a child, or put it in the place of another."""
        if self._ordered is not None and key not in self._by_key:
            self._ordered.add(key)
        self._by_key[key] = child
        if self._ordered is None and len(self._by_key) > _FEW:
            self._ordered = _Shelves(sorted(self._by_key))

    def remove(self, key: bytes) -> None:
        """Raises KeyError where there is none."""
        del self._by_key[key]
        if self._ordered is not None:
            self._ordered.remove(key)
            if not self._by_key:
                self._ordered = None

    def values(self) -> Iterator[T]:
        """All children."""
        return iter(self._by_key.values())

    def most_like(self, key: bytes) -> tuple[T, int] | None:
        """The child whose key has the most leading bytes in common with `key`, and how many; None if there is no child."""
        if not self._by_key:
            return None
        # Of keys in order, none has more in common with `key` than the two between which it would stand.
        candidates = self._by_key if self._ordered is None else self._ordered.around(key)
        common, best = max((common_bytes(candidate, key), candidate) for candidate in candidates)
        return self._by_key[best], common


class _Shelves:
    """Keys in order, in lists of bounded length: adding and removing moves few of them however many there are."""

    __slots__ = ("_firsts", "_lists")

    def __init__(self, ordered: list[bytes]) -> None:
        self._lists = [ordered]
        self._firsts = [ordered[0]]

    def _shelf(self, key: bytes) -> int:
        return max(0, bisect.bisect_right(self._firsts, key) - 1)

    def add(self, key: bytes) -> None:
        at = self._shelf(key)
        shelf = self._lists[at]
        bisect.insort(shelf, key)
        self._firsts[at] = shelf[0]
        if len(shelf) > 2 * _SHELF:
            self._lists[at : at + 1] = [shelf[:_SHELF], shelf[_SHELF:]]
            self._firsts[at : at + 1] = [shelf[0], shelf[_SHELF]]

    def remove(self, key: bytes) -> None:
        at = self._shelf(key)
        shelf = self._lists[at]
        del shelf[bisect.bisect_left(shelf, key)]
        if shelf:
            self._firsts[at] = shelf[0]
        elif len(self._lists) > 1:
            del self._lists[at], self._firsts[at]

    def around(self, key: bytes) -> list[bytes]:
        """The keys before and after the place where `key` belongs; at least one, unless there is none at all."""
        at = self._shelf(key)
        shelf = self._lists[at]
        place = bisect.bisect_left(shelf, key)
        found = shelf[max(0, place - 1) : place + 1]
        if place == len(shelf) and at + 1 < len(self._lists):
            found.append(self._lists[at + 1][0])
        return found


def common_bytes(a: bytes, b: bytes) -> int:
    """How many leading bytes are equal."""
    count = min(len(a), len(b))
    if a[:count] == b[:count]:
        return count
    low = 0
    while low + 1 < count:  # a[:low] == b[:low] and a[:count] != b[:count]
        middle = (low + count) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            count = middle
    return low
