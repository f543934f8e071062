"""Whether a radix tree's bookkeeping agrees with itself."""

from collections.abc import Iterable

from kv.blocks import BlockPool, IntegrityError
from kv.nodes import Node


def check_tree(nodes: Iterable[Node], pool: BlockPool, stride: int, counted: tuple[int, int]) -> None:
    """Raise IntegrityError unless keys, blocks, the line for eviction, and the numbers of blocks and of idle ones that the tree has
    `counted` agree with its nodes, all but the roots. Slow."""
    count = idle = 0
    seen: set[int] = set()
    for node in nodes:
        if not node.blocks or len(node.key) != len(node.blocks) * stride:
            raise IntegrityError("an edge has no blocks, or not as many tokens as its blocks hold")
        if node.parent is None or node.parent.children.get(bytes(node.key[:stride])) is not node:
            raise IntegrityError("a node is not its parent's child")
        if node.locks < sum(child.locks for child in node.children.values()):
            raise IntegrityError("a node is held less often than its children")
        if node.parent.parent is not None and node.parent.locks == 0 and node.used > node.parent.used:
            raise IntegrityError("a node was used after its parent")
        if node.host:
            continue
        count += len(node.blocks)
        idle += len(node.blocks) if node.locks == 0 else 0
        if node.locks == 0 and len(node.children) == node.hosted and not node.queued:
            raise IntegrityError("an idle leaf does not stand in line for eviction")
        for block in node.blocks:
            if block in seen or not pool.is_kept(block) or (node.locks == 0 and pool.references(block)):
                raise IntegrityError(f"block {block} is in the tree twice, not kept, or idle and yet in a table")
            seen.add(block)
    if len(seen) != sum(map(pool.is_kept, range(pool.num_blocks))):
        raise IntegrityError("a block is kept, but not in the tree")
    if (count, idle) != counted:
        raise IntegrityError(f"{count} blocks of which {idle} idle, but counted {counted[0]} and {counted[1]}")
