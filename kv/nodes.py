"""The radix tree's edges, and how they are cut and joined. What they mean is told in kv/radix.py and kv/host.py."""

from array import array
from collections.abc import Sequence

from kv.children import Children
from kv.names import NAME_BYTES


class Node:
    """An edge with the node at its end."""

    __slots__ = ("blocks", "children", "host", "hosted", "key", "locks", "names", "parent", "queued", "salt", "serial", "used")

    def __init__(
        self, serial: int, salt: str, parent: "Node | None", key: bytes | bytearray, blocks: Sequence[int], used: int
    ) -> None:
        self.serial = serial
        """Tells nodes of one last use apart."""
        self.salt = salt
        self.parent = parent
        """None for a root, and for what was evicted or has become a part of another edge."""
        self.key = bytearray(key)
        self.blocks = array("I", blocks)
        """Slots of host memory, where it lies there."""
        self.names = bytearray()
        """Of its blocks, if anybody observes."""
        self.children: Children[Node] = Children()
        self.locks = 0
        self.used = used
        self.queued = False
        """Whether the line for eviction has an entry of it."""
        self.host = False
        """Whether it lies in host memory, as all below it then does."""
        self.hosted = 0
        """How many of its children do."""

    def split(self, inside: int, stride: int, serial: int) -> "Node":
        """Cut the edge after `inside` blocks of `stride` bytes; returns the new node there. This one stays the lower end."""
        assert self.parent is not None
        cut = inside * stride
        upper = Node(serial, self.salt, self.parent, self.key[:cut], self.blocks[:inside], self.used)
        upper.locks, upper.host, upper.hosted = self.locks, self.host, int(self.host)
        upper.names, self.names = self.names[: inside * NAME_BYTES], self.names[inside * NAME_BYTES :]
        self.parent.children.put(bytes(self.key[:stride]), upper)
        self.key, self.blocks, self.parent = self.key[cut:], self.blocks[inside:], upper
        upper.children.put(bytes(self.key[:stride]), self)
        return upper

    def shed(self, inside: int, stride: int, serial: int) -> "Node":
        """Cut the edge after `inside` blocks; returns the new node at the lower end. This one stays there. For idle ones only: a
        lease's node stays at its end."""
        cut = inside * stride
        lower = Node(serial, self.salt, self, self.key[cut:], self.blocks[inside:], self.used)
        lower.names = self.names[inside * NAME_BYTES :]
        del self.key[cut:], self.blocks[inside:], self.names[inside * NAME_BYTES :]
        lower.children, lower.hosted = self.children, self.hosted
        for child in lower.children.values():
            child.parent = lower
        self.children, self.hosted = Children(), 0
        self.children.put(bytes(lower.key[:stride]), lower)
        return lower

    def join(self, stride: int) -> None:
        """Take in the edges above, as far as they lead only here and are held and used by the same, in the same place."""
        while (upper := self.parent) is not None and (above := upper.parent) is not None:
            if len(upper.children) > 1 or (upper.host, upper.locks) != (self.host, self.locks):
                return
            if upper.locks == 0 and upper.used != self.used:
                return  # held ones have been used by the same when they are idle again
            self.key[:0], self.names[:0], self.blocks = upper.key, upper.names, upper.blocks + self.blocks
            self.used = max(upper.used, self.used)
            above.children.put(bytes(self.key[:stride]), self)
            self.parent, upper.parent = above, None
