"""The tree against what brute force finds: every prefix it should know, no other, and nothing given away that somebody holds."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv.blocks import BlockPool, IntegrityError
from kv.children import Children, common_bytes
from kv.names import NAME_BYTES, BlockNames, pack
from kv.radix import Key, Lease, RadixTree

SIZE = 3
TOKENS = st.lists(st.integers(0, 1), max_size=14)


class Names:
    """An observer that keeps what a remote index would have."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self._names = BlockNames("secret", SIZE)

    def added(self, before: bytes, salt: str, key: Key) -> bytes:
        names = self._names.of(key, salt, before)
        for name in split(names):
            assert name not in self.known
            self.known.add(name)
        return names

    def removed(self, names: bytes) -> None:
        for name in split(names):
            self.known.remove(name)


def split(names: bytes) -> list[bytes]:
    return [names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES)]


@dataclass(eq=False)
class Held:
    """A sequence: its lease, table and tokens, of which `done` have KV."""

    salt: str
    lease: Lease
    table: list[int]
    tokens: list[int]


class Tree(RuleBasedStateMachine):
    """Sequences come with a prompt, go on, and leave; blocks are evicted at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(24)
        self.names = Names()
        self.tree = RadixTree(self.pool, SIZE, self.names)
        self.held: list[Held] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}
        """By block: salt and the whole prefix that it ends. Written when the block is."""

    def known(self, salt: str) -> dict[tuple[int, ...], int]:
        """Every prefix that the tree holds, with its last block."""
        blocks = [block for node in self.tree.nodes() for block in node.blocks]
        return {self.content[block][1]: block for block in blocks if self.content[block][0] == salt}

    def check(self, tokens: list[int], salt: str) -> None:
        """A match has the longest known prefix, and the longest part of a block that goes on from there."""
        match, known = self.tree.match(pack(tokens), salt), self.known(salt)
        usable = tokens[:-1]
        expected: list[int] = []
        while (end := (len(expected) + 1) * SIZE) <= len(usable) and tuple(usable[:end]) in known:
            expected.append(known[tuple(usable[:end])])
        assert match.blocks == tuple(expected)
        assert match.num_tokens == len(expected) * SIZE
        rest = usable[match.num_tokens : match.num_tokens + SIZE]
        after = [
            p for p in known if len(p) == match.num_tokens + SIZE and p[: match.num_tokens] == tuple(usable[: match.num_tokens])
        ]
        parts = [common_bytes(pack(p[match.num_tokens :]), pack(rest)) // 4 for p in after]
        assert (match.part[1] if match.part else 0) == max(parts, default=0)
        if match.part:
            block, count = match.part
            assert self.content[block][1][: match.num_tokens + count] == tuple(usable[: match.num_tokens + count])

    def write(self, held: Held) -> bool:
        """Give `held` blocks for all of its tokens, and tell the tree."""
        missing = -(-len(held.tokens) // SIZE) - len(held.table)
        if missing > self.pool.num_free:
            self.tree.evict(missing - self.pool.num_free)
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        for block in blocks:
            held.table.append(block)
        for index in range(len(held.tokens) // SIZE):
            end = (index + 1) * SIZE
            mine = (held.salt, tuple(held.tokens[:end]))
            assert (
                self.content.get(held.table[index], mine) == mine
                or held.table[index] in blocks
                or end > held.lease.num_blocks * SIZE
            )
            self.content[held.table[index]] = mine
        self.tree.insert(held.lease, pack(held.tokens), held.table)
        return True

    @rule(tokens=TOKENS, salt=st.sampled_from(["", "x"]))
    def begin(self, tokens: list[int], salt: str) -> None:
        if not tokens:
            return
        match = self.tree.match(pack(tokens), salt)
        before = self.tree.num_idle
        lease = self.tree.lock(match, salt)
        assert before - self.tree.num_idle == match.idle
        self.pool.share(match.blocks)
        held = Held(salt, lease, list(match.blocks), list(tokens))
        if self.write(held):
            self.held.append(held)
        else:
            self.tree.release(lease)
            self.pool.release(held.table)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=TOKENS)
    def go_on(self, data: st.DataObject, more: list[int]) -> None:
        held = data.draw(st.sampled_from(self.held))
        before = len(held.tokens)
        held.tokens += more
        if not self.write(held):
            del held.tokens[before:]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.held))
        shared = data.draw(st.integers(0, parent.lease.num_blocks))
        lease = self.tree.share(parent.lease, shared)
        self.pool.share(parent.table[:shared])
        self.held.append(Held(parent.salt, lease, parent.table[:shared], parent.tokens[: shared * SIZE]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.held))
        self.held.remove(held)
        if data.draw(st.booleans()):
            self.tree.release(held.lease, pack(held.tokens), held.table)
            assert self.tree.match(pack([*held.tokens, 0]), held.salt).num_tokens == len(held.tokens) // SIZE * SIZE
        else:
            self.tree.release(held.lease)
        self.pool.release(held.table)

    @rule(count=st.integers(0, 6))
    def evict(self, count: int) -> None:
        expected = min(count, self.tree.num_idle)
        free = self.pool.num_free
        assert self.tree.evict(count) == expected
        assert self.pool.num_free == free + expected

    @rule(tokens=TOKENS, salt=st.sampled_from(["", "x", "y"]))
    def look(self, tokens: list[int], salt: str) -> None:
        before = self.tree.num_idle, self.tree.num_blocks, [bytes(node.key) for node in self.tree.nodes()]
        self.check(tokens, salt)
        assert before == (self.tree.num_idle, self.tree.num_blocks, [bytes(node.key) for node in self.tree.nodes()])

    @invariant()
    def whole(self) -> None:
        self.tree.check_integrity()
        self.pool.check_integrity()
        in_tree = [block for node in self.tree.nodes() for block in node.blocks]
        assert {block for block in range(24) if self.pool.is_kept(block)} == set(in_tree)
        blocks = BlockNames("secret", SIZE)
        assert self.names.known == {
            blocks.of(pack(prefix), salt)[-NAME_BYTES:] for salt in ("", "x") for prefix in self.known(salt)
        }
        for held in self.held:  # what is leased is there, and in its table
            match = self.tree.match(pack([*held.tokens, 0]), held.salt)
            assert list(match.blocks[: held.lease.num_blocks]) == held.table[: held.lease.num_blocks]
            assert match.num_tokens == len(held.tokens) // SIZE * SIZE or held.lease.num_blocks < len(held.tokens) // SIZE


TestTree = Tree.TestCase


@given(st.lists(st.tuples(st.booleans(), st.binary(min_size=3, max_size=3)), max_size=60), st.binary(max_size=3))
def test_children_find_the_key_that_begins_most_alike(changes: list[tuple[bool, bytes]], wanted: bytes) -> None:
    children: Children[bytes] = Children()
    model: dict[bytes, bytes] = {}
    for put, key in changes:
        if put:
            children.put(key, key)
            model[key] = key
        elif key in model:
            children.remove(key)
            del model[key]
    found = children.most_like(wanted)
    assert (found is None) == (not model)
    if found is not None:
        assert found[1] == max(common_bytes(key, wanted) for key in model) == common_bytes(found[0], wanted)


def test_many_children_stay_in_order() -> None:
    children: Children[int] = Children()
    keys = [(number * 7919 % 5000).to_bytes(4, "big") for number in range(5000)]
    for number, key in enumerate(keys):
        children.put(key, number)
    for key in keys[:4900]:
        children.remove(key)
    for key in keys[4900:]:
        assert children.most_like(key) == (children.get(key), 4)
    assert len(children) == 100


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_common_bytes(a: bytes, b: bytes) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_bytes(a, b) == expected


def test_the_least_recently_used_tail_goes_first() -> None:
    pool = BlockPool(20)
    tree = RadixTree(pool, 2)
    for tokens in ([1, 1, 2, 2, 3, 3], [1, 1, 4, 4], [5, 5, 6, 6]):
        lease = tree.lock(tree.match(pack(tokens)))
        table = pool.allocate(len(tokens) // 2)
        assert table is not None
        tree.insert(lease, pack(tokens), table)
        tree.release(lease)
        pool.release(table)
    tree.release(tree.lock(tree.match(pack([1, 1, 2, 2, 9]))))  # [1 1 2 2] is used again, [3 3] below it is not
    assert tree.num_blocks == tree.num_idle == 6
    for left in ([1, 1, 2, 2, 9], 4), ([1, 1, 4, 4, 9], 2), ([5, 5, 6, 6, 9], 4):
        assert tree.match(pack(left[0])).num_tokens >= 2
    assert tree.evict(1) == 1
    assert tree.match(pack([1, 1, 2, 2, 3, 3, 9])).num_tokens == 4
    assert tree.evict(1) == 1
    assert tree.match(pack([1, 1, 4, 4, 9])).num_tokens == 2
    assert tree.evict(2) == 2
    assert tree.match(pack([5, 5, 9])).num_tokens == 0
    assert tree.evict(9) == 2
    assert tree.num_blocks == 0


def test_a_stale_match_and_a_second_release_are_errors() -> None:
    pool = BlockPool(9)
    tree = RadixTree(pool, 2)
    lease = tree.lock(tree.match(pack([1, 2, 3, 4, 5])))
    table = pool.allocate(2)
    assert table is not None
    tree.insert(lease, pack([1, 2]), table)
    match = tree.match(pack([1, 2, 3, 4, 5]))
    tree.insert(lease, pack([1, 2, 3, 4]), table)
    with pytest.raises(IntegrityError, match="changed"):
        tree.lock(match)
    tree.release(lease)
    with pytest.raises(IntegrityError, match="twice"):
        tree.release(lease)


def test_long_edges_cost_no_more_nodes_for_being_written_in_chunks() -> None:
    pool = BlockPool(200)
    tree = RadixTree(pool, 4)
    tokens = list(range(400))
    lease = tree.lock(tree.match(pack(tokens)))
    table: list[int] = []
    for end in range(10, 401, 10):
        table += pool.allocate(-(-end // 4) - len(table)) or []
        tree.insert(lease, pack(tokens[:end]), table)
    assert len(list(tree.nodes())) == 1
    assert tree.match(pack([*tokens, 1])).num_tokens == 400


def test_a_use_that_changes_no_edge_counts_too() -> None:
    pool = BlockPool(20)
    tree = RadixTree(pool, 2)
    for tokens in ([1, 1], [2, 2]):
        lease = tree.lock(tree.match(pack(tokens)))
        table = pool.allocate(1)
        assert table is not None
        tree.insert(lease, pack(tokens), table)
        tree.release(lease)
        pool.release(table)
    tree.release(tree.lock(tree.match(pack([1, 1, 9]))))
    assert tree.evict(1) == 1
    assert tree.match(pack([1, 1, 9])).num_tokens == 2
    assert tree.match(pack([2, 2, 9])).num_tokens == 0
