"""The second tier of the KV cache: edges of the radix tree that lie in host memory.

    root ──[ device: 7 3 9 ]──┬──[ device: 4 8 ]──[ host: 0 1 ]
                              └──[ host: 2 5 6 ]──[ host: 3 ]

Below an edge on the host all is on the host, so that a match is first on the device, then there. What is evicted from the device
sinks (store); what a sequence is about to need is brought back (load); what it has computed in the meantime takes the place of the
slots (release); and what has been here longest is forgotten when there is no room. A block is in one tier at a time. Nobody holds a
slot for longer than its load takes to be planned.

Nothing is copied here: transfers are handed over with the plan that is being made, in the order in which they were decided, copies
of blocks among them. Workers execute them in this order, so a block or a slot that is given up by one can be taken by the next.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from cluster.protocol import Transfer
from kv.blocks import IntegrityError
from kv.names import NAME_BYTES
from kv.nodes import Node


class HostTier:
    """Slots of host memory, as many on each rank, and the edges that lie in them."""

    def __init__(self, num_slots: int, stride: int, removed: Callable[[bytes], None] | None = None) -> None:
        """stride: bytes of a block's packed tokens. removed: is told the names of the blocks that are forgotten, joined."""
        self.num_slots = num_slots
        self._stride = stride
        self._removed = removed
        self._free = deque(range(num_slots))
        """First in, first out: what is stored together then mostly lies together, and a slot is seldom written twice in a plan."""
        self._edges: OrderedDict[Node, None] = OrderedDict()
        """Those that nobody holds, in the order in which they came: all that is below one came before it."""
        self._transfers: list[Transfer] = []
        self._targets: set[int] = set()
        """Of the last transfer."""
        self._copies: Sequence[tuple[int, int]] = ()

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots that hold a block."""
        return self.num_slots - len(self._free)

    # --- transfers --------------------------------------------------------------------------------------------------

    def begin_plan(self, copies: Sequence[tuple[int, int]]) -> None:
        """`copies`: of the plan being made, which grow while it is."""
        self._copies = copies

    @property
    def has_transfers(self) -> bool:
        """Whether some are decided and not yet taken."""
        return bool(self._transfers)

    def take_transfers(self) -> list[Transfer]:
        """For the plan being made: all that was decided since the last take, in order."""
        taken, self._transfers, self._copies = self._transfers, [], ()
        return taken

    def _note(self, kind: Literal["store", "load"], blocks: Iterable[int], slots: Iterable[int], targets: Sequence[int]) -> None:
        last = self._transfers[-1] if self._transfers else None
        if last is None or (last.kind, last.copies) != (kind, len(self._copies)) or not self._targets.isdisjoint(targets):
            last = Transfer(kind, [], [], len(self._copies))
            self._transfers.append(last)
            self._targets = set()
        last.blocks += blocks
        last.slots += slots
        self._targets.update(targets)

    # --- edges ------------------------------------------------------------------------------------------------------

    def store(self, node: Node, inside: int, serial: int) -> None:
        """The blocks of an idle edge behind the first `inside` go to free slots, of which there are as many; below it nothing is on
        the device. `serial`: for a new node."""
        blocks = node.blocks[inside:]
        slots = array("I", [self._free.popleft() for _ in blocks])
        self._note("store", blocks, slots, slots)
        lower = node.shed(inside, self._stride, serial) if inside else node
        lower.blocks, lower.host = slots, True
        assert lower.parent is not None
        lower.parent.hosted += 1
        (below,) = lower.children.values() if len(lower.children) == 1 else (None,)
        if below is not None:
            below.join(self._stride)  # what sinks block by block is one edge all the same
        if lower.parent is not None:
            self._edges[lower] = None

    def hold(self, leaf: Node) -> None:
        """The edges from `leaf` up are not to be forgotten: they will be loaded."""
        node = leaf
        while node.host and node.parent is not None:
            self._edges.pop(node, None)
            node = node.parent

    def load(self, node: Node, blocks: Sequence[int]) -> None:
        """An edge, with all above it, comes to the device, into `blocks`."""
        self._note("load", blocks, node.blocks, blocks)
        self.release(node, blocks)

    def release(self, node: Node, blocks: Sequence[int]) -> None:
        """An edge below one on the device is in `blocks` from now on; its slots are free."""
        assert node.parent is not None
        self._free.extend(node.blocks)
        self._edges.pop(node, None)
        node.blocks, node.host = array("I", blocks), False
        node.parent.hosted -= 1

    def forget(self, count: int) -> list[Node]:
        """Free `count` slots, or all there are, beginning with the tail of what came first. Returns the nodes that lost a child."""
        bereft: list[Node] = []
        while count > 0 and self._edges:
            node = next(iter(self._edges))
            left = max(0, len(node.blocks) - count)
            count -= len(node.blocks) - left
            self._free.extend(node.blocks[left:])
            if self._removed is not None:
                self._removed(bytes(node.names[left * NAME_BYTES :]))
            if left:
                del node.key[left * self._stride :], node.blocks[left:], node.names[left * NAME_BYTES :]
                break
            assert node.parent is not None
            del self._edges[node]
            node.parent.children.remove(bytes(node.key[: self._stride]))
            node.parent.hosted -= 1
            bereft.append(node.parent)
            node.parent = None
        return bereft

    def check_integrity(self, nodes: Iterable[Node]) -> None:
        """Raise IntegrityError unless edges and slots agree with the tree's nodes. Slow."""
        order = {node: place for place, node in enumerate(self._edges)}
        seen: list[int] = list(self._free)
        count = 0
        for node in nodes:
            if node.hosted != sum(child.host for child in node.children.values()):
                raise IntegrityError("a node miscounts its children on the host")
            if not node.host:
                continue
            count += 1
            seen += node.blocks
            if node.locks or node not in order or node.hosted != len(node.children):
                raise IntegrityError("an edge on the host is held, or none of the tier's, or has something on the device below")
            if any(order[child] > order[node] for child in node.children.values()):
                raise IntegrityError("an edge on the host came before one below it")
        if count != len(order) or sorted(seen) != list(range(self.num_slots)):
            raise IntegrityError("a slot is lost, or in use twice, or an edge on the host is not in the tree")
