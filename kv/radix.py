"""RadixAttention's tree: KV that outlives its sequences, found again by its tokens (Zheng et al. 2024, SGLang, section 3).

An edge is a run of whole blocks. The root stands for the empty prefix; each salt has a tree of its own.

    root ──[ system prompt: blocks 7 3 9 ]──┬──[ question A: 4 8 ]──[ answer, next question: 2 ]
                                            └──[ question B: 5 ]

Tokens are compared, never hashes, so no collision can give a sequence the KV of other tokens. They are packed, four bytes each, so
that edges are compared as fast as memory is read. An operation costs as much as the tokens it is asked about and the edges on their
path, whatever the size of the tree; eviction costs the logarithm of the number of leaves for each edge that it ends.

    locks > 0     some lease ends here or below: kept
    locks == 0    nobody holds it nor anything below: its tail can be evicted, least recently used first
"""

import heapq
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kv.blocks import BlockPool, IntegrityError
from kv.children import Children, common_bytes
from kv.names import NAME_BYTES, TOKEN_BYTES

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
    """In whole blocks, those of `part` not counted."""
    blocks: tuple[int, ...] = ()
    """That hold their KV."""
    part: tuple[int, int] | None = None
    """(block, tokens): the next block begins with so many of the tokens that follow. To be copied, not shared."""
    idle: int = 0
    """How many of `blocks` nobody holds, so that they could still be evicted."""
    end: "tuple[_Node, int] | None" = None
    """Where in the tree it ends: after so many blocks of this edge."""
    version: int = 0
    """Of the tree."""


NO_MATCH = PrefixMatch()


class _Node:
    """An edge with the node at its end."""

    __slots__ = ("blocks", "children", "key", "locks", "names", "parent", "queued", "salt", "serial", "used")

    def __init__(self, serial: int, salt: str, parent: "_Node | None", key: Key, blocks: Sequence[int], used: int) -> None:
        self.serial = serial
        """Tells nodes of one last use apart."""
        self.salt = salt
        self.parent = parent
        """None for a root, and for what was evicted."""
        self.key = bytearray(key)
        self.blocks = array("I", blocks)
        self.names = bytearray()
        """Of its blocks, if anybody observes."""
        self.children: Children[_Node] = Children()
        self.locks = 0
        self.used = used
        self.queued = False
        """Whether the line for eviction has an entry of it."""


@dataclass(eq=False)
class Lease:
    """A hold on a path from the root. Grows with insert(), ends with release()."""

    node: _Node
    num_blocks: int
    """Length of the path."""


class RadixTree:
    """Blocks of `pool` that are kept for later, by the tokens whose KV they have."""

    def __init__(self, pool: BlockPool, block_size: int, observer: Observer | None = None) -> None:
        self.num_blocks = 0
        """In the tree."""
        self.num_idle = 0
        """Of these, blocks that no lease holds."""
        self._pool = pool
        self._stride = block_size * TOKEN_BYTES
        self._observer = observer
        self._roots: dict[str, _Node] = {}
        self._line: list[tuple[int, int, _Node]] = []
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
        at = idle = inside = 0
        while at + stride <= limit:
            child = node.children.get(bytes(key[at : at + stride]))
            if child is None:
                break
            inside = self._common(child, key, at, limit)
            node = child
            at += inside * stride
            blocks += node.blocks[:inside]
            idle += inside if node.locks == 0 else 0
            if inside < len(node.blocks):
                break
        part = self._part(node, inside, bytes(key[at : min(limit, at + stride)]))
        return PrefixMatch(at // TOKEN_BYTES, tuple(blocks), part, idle, (node, inside), self._version)

    def _common(self, node: _Node, key: Key, at: int, limit: int) -> int:
        """How many whole blocks of the edge are key[at:limit]'s."""
        stride = self._stride
        length = min(len(node.key), (limit - at) // stride * stride)
        if node.key[:length] == key[at : at + length]:
            return length // stride
        return common_bytes(bytes(node.key[:length]), bytes(key[at : at + length])) // stride

    def _part(self, node: _Node, inside: int, rest: bytes) -> tuple[int, int] | None:
        """The block that goes on from there with the most of the packed tokens `rest`, less than a block of them or just one."""
        if not rest:
            return None
        if inside < len(node.blocks):
            stride = self._stride
            block, common = node.blocks[inside], common_bytes(bytes(node.key[inside * stride : (inside + 1) * stride]), rest)
        else:
            found = node.children.most_like(rest)
            if found is None:
                return None
            block, common = found[0].blocks[0], found[1]
        tokens = common // TOKEN_BYTES
        return (block, tokens) if tokens else None

    # --- leases -----------------------------------------------------------------------------------------------------

    def lock(self, match: PrefixMatch, salt: str = "") -> Lease:
        """Hold the whole blocks of a match that was made since the tree last changed. May split an edge. NO_MATCH begins anew."""
        if match.end is not None and match.version != self._version:
            raise IntegrityError("the tree has changed since the match was made")
        node, inside = match.end or (self._root(salt), 0)
        if inside < len(node.blocks):
            node = self._split(node, inside)
        self._hold(node)
        return Lease(node, len(match.blocks))

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
        node, depth = lease.node, lease.num_blocks
        end = min(len(key) // stride, len(blocks))
        self._clock += 1
        while depth < end:
            child = node.children.get(bytes(key[depth * stride : (depth + 1) * stride]))
            if child is None:
                self._version += 1
                node, depth = self._append(node, key[depth * stride : end * stride], blocks[depth:end]), end
                break
            if not past_others:
                break
            count = self._common(child, key, depth * stride, end * stride)
            if count < len(child.blocks):
                child = self._split(child, count)
            if child.locks == 0:
                self.num_idle -= len(child.blocks)
            child.locks += 1
            child.used = self._clock
            node, depth = child, depth + count
        lease.node, lease.num_blocks = node, depth

    def _append(self, node: _Node, key: Key, blocks: Sequence[int]) -> _Node:
        """New blocks below `node`: at its own end, where nobody else would be bound by that, or in a child."""
        names = b"" if self._observer is None else self._observer.added(bytes(node.names[-NAME_BYTES:]), node.salt, key)
        self._pool.keep(blocks)
        self.num_blocks += len(blocks)
        if node.parent is not None and node.locks == 1 and not len(node.children):
            node.key += key
            node.blocks.extend(blocks)
        else:
            self._serial += 1
            child = _Node(self._serial, node.salt, node, key, blocks, self._clock)
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
        above: _Node | None = node
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

    def _hold(self, leaf: _Node) -> None:
        self._clock += 1
        node: _Node | None = leaf
        while node is not None:
            if node.locks == 0:
                self.num_idle -= len(node.blocks)
            node.locks += 1
            node.used = self._clock
            node = node.parent

    def _split(self, node: _Node, inside: int) -> _Node:
        """Cut an edge after `inside` blocks; returns the new node there. `node` stays the lower end, which leases point to."""
        self._version += 1
        assert node.parent is not None
        cut = inside * self._stride
        self._serial += 1
        upper = _Node(self._serial, node.salt, node.parent, node.key[:cut], node.blocks[:inside], node.used)
        upper.locks = node.locks
        upper.names, node.names = node.names[: inside * NAME_BYTES], node.names[inside * NAME_BYTES :]
        node.parent.children.put(bytes(node.key[: self._stride]), upper)
        node.key, node.blocks, node.parent = node.key[cut:], node.blocks[inside:], upper
        upper.children.put(bytes(node.key[: self._stride]), node)
        return upper

    # --- eviction ---------------------------------------------------------------------------------------------------

    def evict(self, count: int) -> int:
        """Free up to `count` blocks from the least recently used tails that nobody holds; returns how many."""
        freed = 0
        while freed < count and self._line:
            used, _, node = heapq.heappop(self._line)
            node.queued = False
            if node.parent is None or node.locks or len(node.children):
                continue  # it will stand in line again when it is an idle leaf again
            if node.used != used:
                self._stand_in_line(node)
                continue
            self._version += 1
            taken = min(count - freed, len(node.blocks))
            self._trim(node, taken)
            freed += taken
        return freed

    def _trim(self, node: _Node, count: int) -> None:
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

    def _stand_in_line(self, node: _Node) -> None:
        if node.parent is not None and node.locks == 0 and not len(node.children) and not node.queued:
            node.queued = True
            heapq.heappush(self._line, (node.used, node.serial, node))

    def _root(self, salt: str) -> _Node:
        root = self._roots.get(salt)
        if root is None:
            self._serial += 1
            root = self._roots[salt] = _Node(self._serial, salt, None, b"", (), self._clock)
        return root

    def _drop_if_empty(self, node: _Node) -> None:
        """A root that holds nothing: there may be many salts."""
        if node.locks == 0 and not len(node.children) and self._roots.get(node.salt) is node:
            self._version += 1
            del self._roots[node.salt]

    # --- checking ---------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[_Node]:
        """All of them but the roots."""
        waiting = [child for root in self._roots.values() for child in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())

    def check_integrity(self) -> None:
        """Raise IntegrityError unless counts, keys and the line for eviction agree. Slow."""
        count = idle = 0
        seen: set[int] = set()
        for node in self.nodes():
            count += len(node.blocks)
            idle += len(node.blocks) if node.locks == 0 else 0
            if not node.blocks or len(node.key) != len(node.blocks) * self._stride:
                raise IntegrityError("an edge has no blocks, or not as many tokens as its blocks hold")
            if node.parent is None or node.parent.children.get(bytes(node.key[: self._stride])) is not node:
                raise IntegrityError("a node is not its parent's child")
            if node.locks < sum(child.locks for child in node.children.values()):
                raise IntegrityError("a node is held less often than its children")
            if node.locks == 0 and not len(node.children) and not node.queued:
                raise IntegrityError("an idle leaf does not stand in line for eviction")
            if node.parent.parent is not None and node.parent.locks == 0 and node.used > node.parent.used:
                raise IntegrityError("a node was used after its parent")
            for block in node.blocks:
                if block in seen or not self._pool.is_kept(block) or (node.locks == 0 and self._pool.references(block)):
                    raise IntegrityError(f"block {block} is in the tree twice, not kept, or idle and yet in a table")
                seen.add(block)
        if len(seen) != sum(map(self._pool.is_kept, range(self._pool.num_blocks))):
            raise IntegrityError("a block is kept, but not in the tree")
        if (count, idle) != (self.num_blocks, self.num_idle):
            raise IntegrityError(f"{count} blocks of which {idle} idle, but counted {self.num_blocks} and {self.num_idle}")
