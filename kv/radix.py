"""RadixAttention's tree: KV that outlives its sequences, found again by its tokens (Zheng et al. 2024, SGLang, section 3).

An edge is a run of whole blocks. The root stands for the empty prefix; each salt has a tree of its own.

    root ──[ system prompt: blocks 7 3 9 ]──┬──[ question A: 4 8 ]──[ answer, next question: 2 ]
                                            └──[ question B: 5 ]

Tokens are compared, never hashes, so no collision can give a sequence the KV of other tokens. They are packed, four bytes each, so
that edges are compared as fast as memory is read. An operation costs as much as the tokens it is asked about and the edges on their
path, whatever the size of the tree; eviction costs the logarithm of the number of leaves for each edge that it ends.

    locks > 0     some lease ends here or below: kept
    locks == 0    nobody holds it nor anything below: its tail can be evicted, least recently used first

With a host tier (kv/host.py) a path is on the device from the root on, and in host memory behind: what is evicted sinks there, and
whoever is about to compute what lies there brings it back, or puts the computed blocks in its place.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kv.blocks import BlockPool, IntegrityError
from kv.children import common_bytes
from kv.host import HostTier
from kv.names import NAME_BYTES, TOKEN_BYTES
from kv.nodes import Node
from kv.tree_checks import check_tree

Key = bytes | bytearray
"""Packed tokens (kv.names.pack)."""


class Observer(Protocol):
    """Is told what the tree has."""

    def added(self, before: bytes, salt: str, key: Key) -> bytes:
        """Whole blocks of the packed tokens `key` are there now, after the block named `before` (b"": at the root of `salt`).
        Returns their names, joined."""

    def removed(self, names: bytes) -> None:
        """Blocks with these names, joined, are there no more."""


@dataclass(frozen=True)
class PrefixMatch:
    """The longest known prefix of some tokens."""

    num_tokens: int = 0
    """In whole blocks on the device, those of `part` and `host` not counted."""
    blocks: tuple[int, ...] = ()
    """That hold their KV."""
    host: tuple[int, ...] = ()
    """Slots of host memory with the whole blocks that follow."""
    part: tuple[int, int] | None = None
    """(block, tokens): the next block begins with so many of the tokens that follow. To be copied, not shared."""
    idle: int = 0
    """How many of `blocks` nobody holds, so that they could still be evicted."""
    end: tuple[Node, int] | None = None
    """Where in the tree it ends, `host` included: after so many blocks of this edge."""
    version: int = 0
    """Of the tree."""


NO_MATCH = PrefixMatch()


@dataclass(eq=False)
class Lease:
    """A hold on a path from the root. Grows with insert(), ends with release()."""

    node: Node
    num_blocks: int
    """Length of the path."""


class RadixTree:
    """Blocks of `pool` that are kept for later, by the tokens whose KV they have."""

    def __init__(self, pool: BlockPool, block_size: int, observer: Observer | None = None, host_slots: int = 0) -> None:
        """host_slots: of host memory, for what is evicted."""
        self.num_blocks = 0
        """In the tree, on the device."""
        self.num_idle = 0
        """Of these, blocks that no lease holds."""
        self._pool = pool
        self._stride = block_size * TOKEN_BYTES
        self._observer = observer
        removed = None if observer is None else observer.removed
        self.host = HostTier(host_slots, self._stride, removed) if host_slots else None
        self._roots: dict[str, Node] = {}
        self._line: list[tuple[int, int, Node]] = []
        """A heap of (last use, serial, leaf); last uses may have grown since."""
        self._clock = 0
        self._serial = 0
        self._version = 0

    # --- looking ----------------------------------------------------------------------------------------------------

    def match(self, key: Key, salt: str = "") -> PrefixMatch:
        """The longest known prefix of packed tokens, at most all but the last of them. Changes nothing."""
        node = self._roots.get(salt)
        if node is None:
            return NO_MATCH
        stride = self._stride
        limit = max(0, len(key) - TOKEN_BYTES)
        blocks: list[int] = []
        host: list[int] = []
        at = idle = inside = 0
        while at + stride <= limit:
            child = node.children.get(bytes(key[at : at + stride]))
            if child is None:
                break
            inside = self._common(child, key, at, limit)
            node = child
            at += inside * stride
            if node.host:
                host += node.blocks[:inside]
            else:
                blocks += node.blocks[:inside]
                idle += inside if node.locks == 0 else 0
            if inside < len(node.blocks):
                break
        part = None if node.host else self._part(node, inside, bytes(key[at : min(limit, at + stride)]))
        num_tokens = (at - len(host) * stride) // TOKEN_BYTES
        return PrefixMatch(num_tokens, tuple(blocks), tuple(host), part, idle, (node, inside), self._version)

    def _common(self, node: Node, key: Key, at: int, limit: int) -> int:
        """How many whole blocks of the edge are key[at:limit]'s."""
        stride = self._stride
        length = min(len(node.key), (limit - at) // stride * stride)
        if node.key[:length] == key[at : at + length]:
            return length // stride
        return common_bytes(bytes(node.key[:length]), bytes(key[at : at + length])) // stride

    def _part(self, node: Node, inside: int, rest: bytes) -> tuple[int, int] | None:
        """The block that goes on from there with the most of the packed tokens `rest`, less than a block of them or just one. None
        where that is on the host: half a block is not worth the way."""
        if not rest:
            return None
        if inside < len(node.blocks):
            stride = self._stride
            block, common = node.blocks[inside], common_bytes(bytes(node.key[inside * stride : (inside + 1) * stride]), rest)
        else:
            found = node.children.most_like(rest)
            if found is None or found[0].host:
                return None
            block, common = found[0].blocks[0], found[1]
        tokens = common // TOKEN_BYTES
        return (block, tokens) if tokens else None

    # --- leases -----------------------------------------------------------------------------------------------------

    def lock(self, match: PrefixMatch, salt: str = "", num_host: int = 0) -> Lease:
        """Hold the whole blocks of a match that was made since the tree last changed. May split an edge. NO_MATCH begins anew.

        num_host: how many of its blocks on the host are held too, for bring_back(), which must follow.
        """
        if match.end is not None and match.version != self._version:
            raise IntegrityError("the tree has changed since the match was made")
        node, inside = match.end or (self._root(salt), 0)
        left = len(match.host) - num_host
        while left and left >= inside:
            assert node.parent is not None
            left, node = left - inside, node.parent
            inside = len(node.blocks)
        inside -= left
        if inside < len(node.blocks):
            node = self._split(node, inside)
        self._hold(node)
        if self.host is not None:
            self.host.hold(node)
        return Lease(node, len(match.blocks) + num_host)

    def bring_back(self, lease: Lease, blocks: Sequence[int]) -> None:
        """What a new lease holds on the host is in `blocks` from now on, which a table holds."""
        assert self.host is not None
        self._version += 1
        node, end = lease.node, len(blocks)
        while node.host:
            assert node.parent is not None
            begin = end - len(node.blocks)
            self.host.load(node, blocks[begin:end])
            node, end = node.parent, begin
        self._pool.keep(blocks)
        self.num_blocks += len(blocks)
        lease.node.join(self._stride)

    def share(self, lease: Lease, num_blocks: int) -> Lease:
        """Another lease, of the first `num_blocks` of one's path."""
        node, above = lease.node, lease.num_blocks
        while above - len(node.blocks) >= num_blocks and node.parent is not None:
            above -= len(node.blocks)
            node = node.parent
        if above > num_blocks:
            node = self._split(node, len(node.blocks) - (above - num_blocks))
        self._hold(node)
        return Lease(node, num_blocks)

    def insert(self, lease: Lease, key: Key, blocks: Sequence[int]) -> None:
        """The KV of the packed tokens `key`, which begin with the lease's path, is in `blocks` (only whole ones count), or will be
        before any later plan runs. They are kept, and the lease reaches so far, up to where somebody else's block has the same
        tokens already: that one stays the canonical one, and is not held for the sake of a table that does not use it."""
        self._insert(lease, key, blocks, past_others=False)

    def _insert(self, lease: Lease, key: Key, blocks: Sequence[int], past_others: bool) -> None:
        stride = self._stride
        node, depth, risen = lease.node, lease.num_blocks, False
        end = min(len(key) // stride, len(blocks))
        self._clock += 1
        while depth < end:
            child = node.children.get(bytes(key[depth * stride : (depth + 1) * stride]))
            if child is None:
                self._version += 1
                node, depth = self._append(node, key[depth * stride : end * stride], blocks[depth:end]), end
                break
            if not past_others and not child.host:
                break
            count = self._common(child, key, depth * stride, end * stride)
            if count < len(child.blocks):
                child = self._split(child, count)
            if child.host:
                self._rise(child, blocks[depth : depth + count])
                risen = True
            elif child.locks == 0:
                self.num_idle -= len(child.blocks)
            child.locks += 1
            child.used = self._clock
            node, depth = child, depth + count
        if risen:
            node.join(stride)
        lease.node, lease.num_blocks = node, depth

    def _rise(self, node: Node, blocks: Sequence[int]) -> None:
        """What was on the host was computed again: `blocks` have it, which a table holds."""
        assert self.host is not None
        self._version += 1
        self.host.release(node, blocks)
        self._pool.keep(blocks)
        self.num_blocks += len(blocks)

    def _append(self, node: Node, key: Key, blocks: Sequence[int]) -> Node:
        """New blocks below `node`: at its own end, where nobody else would be bound by that, or in a child."""
        names = b"" if self._observer is None else self._observer.added(bytes(node.names[-NAME_BYTES:]), node.salt, key)
        self._pool.keep(blocks)
        self.num_blocks += len(blocks)
        if node.parent is not None and node.locks == 1 and not len(node.children):
            node.key += key
            node.blocks.extend(blocks)
        else:
            self._serial += 1
            child = Node(self._serial, node.salt, node, key, blocks, self._clock)
            child.locks = 1
            node.children.put(bytes(key[: self._stride]), child)
            node = child
        node.names += names
        return node

    def release(self, lease: Lease, key: Key = b"", blocks: Sequence[int] = ()) -> None:
        """End a lease. Of `blocks`, with the KV of `key`, what the tree lacks is kept, also behind other's canonical blocks."""
        self._insert(lease, key, blocks, past_others=True)
        self._clock += 1
        leaf = node = lease.node
        above: Node | None = node
        while above is not None:
            node, above = above, above.parent
            node.locks -= 1
            node.used = self._clock
            if node.locks == 0:
                self.num_idle += len(node.blocks)
            elif node.locks < 0:
                raise IntegrityError("a lease is released twice")
        self._stand_in_line(leaf)
        self._drop_if_empty(node)

    def _hold(self, leaf: Node) -> None:
        self._clock += 1
        node: Node | None = leaf
        while node is not None:
            if node.locks == 0 and not node.host:
                self.num_idle -= len(node.blocks)
            node.locks += 1
            node.used = self._clock
            node = node.parent

    def _split(self, node: Node, inside: int) -> Node:
        """Cut an edge after `inside` blocks; returns the new node there. `node` stays the lower end, which leases point to."""
        self._version += 1
        self._serial += 1
        return node.split(inside, self._stride, self._serial)

    # --- eviction ---------------------------------------------------------------------------------------------------

    def evict(self, count: int) -> int:
        """Free up to `count` blocks from the least recently used tails that nobody holds; returns how many. With a host tier their
        KV goes there."""
        freed = 0
        while freed < count and self._line:
            used, _, node = heapq.heappop(self._line)
            node.queued = False
            if node.parent is None or node.locks or node.host or len(node.children) != node.hosted:
                continue  # it will stand in line again when it is an idle leaf again
            if node.used != used:
                self._stand_in_line(node)
                continue
            self._version += 1
            taken = min(count - freed, len(node.blocks))
            if self.host is None:
                self._trim(node, taken)
            else:
                self._sink(self.host, node, taken)
            freed += taken
        return freed

    def _sink(self, host: HostTier, node: Node, count: int) -> None:
        """Send the last `count` blocks of an idle edge, below which none is on the device, to the host. What was there longest
        gives way; what the host could not hold if it were empty is given up."""
        for bereft in host.forget(count - host.num_free):
            self._drop_if_empty(bereft)
        kept = min(count, host.num_free)
        if kept < count:  # all that was below is forgotten
            self._trim(node, count - kept)
        if not kept:
            return
        left, parent = len(node.blocks) - kept, node.parent
        self._pool.drop(node.blocks[left:])
        self.num_blocks -= kept
        self.num_idle -= kept
        self._serial += 1
        host.store(node, left, self._serial)
        assert parent is not None
        self._stand_in_line(node if left else parent)

    def _trim(self, node: Node, count: int) -> None:
        """Give back the last `count` blocks of an idle leaf."""
        left = len(node.blocks) - count
        if self._observer is not None:
            self._observer.removed(bytes(node.names[left * NAME_BYTES :]))
            del node.names[left * NAME_BYTES :]
        self._pool.drop(node.blocks[left:])
        self.num_blocks -= count
        self.num_idle -= count
        if left:
            del node.blocks[left:], node.key[left * self._stride :]
            self._stand_in_line(node)
            return
        parent = node.parent
        assert parent is not None
        parent.children.remove(bytes(node.key[: self._stride]))
        node.parent = None
        self._stand_in_line(parent)
        self._drop_if_empty(parent)

    def _stand_in_line(self, node: Node) -> None:
        if node.parent is not None and node.locks == 0 and not node.queued and len(node.children) == node.hosted:
            node.queued = True
            heapq.heappush(self._line, (node.used, node.serial, node))

    def _root(self, salt: str) -> Node:
        root = self._roots.get(salt)
        if root is None:
            self._serial += 1
            root = self._roots[salt] = Node(self._serial, salt, None, b"", (), self._clock)
        return root

    def _drop_if_empty(self, node: Node) -> None:
        """A root that holds nothing: there may be many salts."""
        if node.locks == 0 and not len(node.children) and self._roots.get(node.salt) is node:
            self._version += 1
            del self._roots[node.salt]

    # --- checking ---------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """All of them but the roots."""
        waiting = [child for root in self._roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def check_integrity(self) -> None:
        """Raise IntegrityError unless counts, keys and the line for eviction agree. Slow."""
        check_tree(self.nodes(), self._pool, self._stride, (self.num_blocks, self.num_idle))
        if self.host is not None:
            self.host.check_integrity(self.nodes())
