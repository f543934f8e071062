"""Who waits for a place in the running set, in which order, and for whom."""

import bisect
from collections.abc import Callable

from cluster.request import Sequence


class WaitingLine:
    """Sequences in order of arrival, and those held back until a sibling's prompt has been scheduled, to fork its KV."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        """In order of arrival."""
        self._held: dict[int, list[Sequence]] = {}
        """By the parent's `seq`."""
        self._parents: dict[int, Sequence] = {}
        self.aside: list[Sequence] = []
        """These wait for something else than a place."""

    def __len__(self) -> int:
        return len(self.waiting) + len(self.aside) + sum(map(len, self._held.values()))

    def everyone(self) -> list[Sequence]:
        """All that wait, held back or not."""
        return [*self.waiting, *self.aside, *(child for children in self._held.values() for child in children)]

    def join(self, sequence: Sequence) -> None:
        """Stand in line; where, says the time of arrival."""
        bisect.insort(self.waiting, sequence, key=_order)

    def hold(self, sequence: Sequence, parent: Sequence) -> None:
        """Wait until `parent` can be forked."""
        sequence.parent = parent
        self._held.setdefault(parent.seq, []).append(sequence)
        self._parents[parent.seq] = parent

    def set_aside(self, sequence: Sequence) -> None:
        """Out of the line, until bring_back()."""
        self.waiting.remove(sequence)
        self.aside.append(sequence)

    def bring_back(self, sequence: Sequence) -> bool:
        """Into the line again; False if it is not aside any more."""
        if sequence not in self.aside:
            return False
        self.aside.remove(sequence)
        self.join(sequence)
        return True

    def release(self, ready: Callable[[Sequence], bool]) -> None:
        """Children of parents that are `ready` to be forked join the line."""
        for parent in [p for p in self._parents.values() if ready(p)]:
            for child in self._take_held(parent):
                self.join(child)

    def recall(self, parent: Sequence) -> None:
        """`parent` has lost its KV: children that were in line for it are held back again."""
        for child in self._children_in_line(parent):
            self.waiting.remove(child)
            self.hold(child, parent)

    def orphan(self, parent: Sequence) -> None:
        """`parent` has ended: its first child computes the prompt for the others."""
        children = self._children_in_line(parent)
        for child in children:
            self.waiting.remove(child)
        children += self._take_held(parent)
        if children:
            heir, *others = children
            heir.parent, heir.expected = None, parent.expected
            self.join(heir)
            for child in others:
                self.hold(child, heir)

    def leave(self, sequence: Sequence) -> bool:
        """Wait no longer; False if it did not wait."""
        parent = sequence.parent
        held = self._held.get(parent.seq, []) if parent is not None else []
        if sequence in held:
            held.remove(sequence)
            if parent is not None and not held:
                self._take_held(parent)
            return True
        for waiting in (self.waiting, self.aside):
            if sequence in waiting:
                waiting.remove(sequence)
                return True
        return False

    def _take_held(self, parent: Sequence) -> list[Sequence]:
        self._parents.pop(parent.seq, None)
        return self._held.pop(parent.seq, [])

    def _children_in_line(self, parent: Sequence) -> list[Sequence]:
        if parent.request.params.n == 1:
            return []
        return [s for s in self.waiting if s.parent is parent]


def _order(sequence: Sequence) -> tuple[float, ...]:
    return sequence.order
