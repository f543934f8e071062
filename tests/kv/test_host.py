"""The host tier against a model of both memories: plans move prefixes about, and what a table says is there must be there."""

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from cluster.config import BatchConfig
from cluster.protocol import StepPlan, Transfer
from kv.manager import Beginning, KVManager
from kv.names import NAME_BYTES, TOKEN_BYTES, BlockNames, pack
from kv.nodes import Node
from kv.radix import NO_MATCH
from tests.conftest import examples
from tests.kv.test_radix import Names
from workers.sequences import moves

SIZE = 3
Prefix = tuple[str, tuple[int, ...]]
"""Salt and tokens up to a position: what its KV depends on."""


@dataclass(eq=False)
class Running:
    """A sequence with a table."""

    seq: int
    salt: str
    tokens: list[int]
    computed: int
    """Tokens whose KV is there when the plan being made has run ..."""
    before: int
    """... and those of which it was there when that was begun."""
    in_plan: bool = False

    @property
    def key(self) -> bytes:
        return pack(self.tokens)


class Tiers:
    """Sequences are admitted, forked, continued and released; now and then the plan is run."""

    def __init__(self, seed: int, blocks: int, slots: int) -> None:
        self.random = random.Random(seed)
        self.stems = [self.random.choices([0, 1], k=17) for _ in range(3)]
        self.running: list[Running] = []
        self.writes: list[tuple[int, Prefix]] = []
        self.count = 0
        self.names = Names()
        config = BatchConfig(num_blocks=blocks, max_model_len=99, block_size=SIZE, host_blocks=slots)
        self.kv = KVManager(config, self.names)
        self.pool: list[Prefix | None] = [None] * (blocks * SIZE)
        self.host: list[list[Prefix | None]] = [[] for _ in range(slots)]
        self.begin_plan()

    # --- the workers' side ------------------------------------------------------------------------------------------

    def begin_plan(self) -> None:
        self.plan = StepPlan(epoch=0, step=0, admitted=[], chunks=[], copies=[], finished=[])
        self.kv.begin_plan(self.plan.copies)

    def slot(self, running: Running, position: int) -> int:
        return self.kv.table(running.seq)[position // SIZE] * SIZE + position % SIZE

    def place(self, block: int) -> slice:
        return slice(block * SIZE, (block + 1) * SIZE)

    def move(self, move: list[tuple[int, int]] | Transfer) -> None:
        if not isinstance(move, Transfer):
            for source, target in move:
                self.pool[self.place(target)] = self.pool[self.place(source)]
            return
        targets = move.slots if move.kind == "store" else move.blocks
        assert len(set(targets)) == len(targets), "moved at once, nobody knows which would be last"
        if move.kind == "store":
            rows = [self.pool[self.place(block)] for block in move.blocks]
            assert all(row is not None for found in rows for row in found), "nothing was written there"
            for slot, row in zip(move.slots, rows, strict=True):
                self.host[slot] = row
        else:
            for block, slot in zip(move.blocks, move.slots, strict=True):
                self.pool[self.place(block)] = self.host[slot]

    def run(self) -> None:
        """Run the plan, as workers do, and look at both memories. Then make the next one."""
        self.plan.transfers = self.kv.take_transfers()
        for move in moves(self.plan):
            self.move(move)
        for slot, prefix in self.writes:
            self.pool[slot] = prefix
        for running in self.running:
            for position in range(running.computed):
                assert self.pool[self.slot(running, position)] == (running.salt, tuple(running.tokens[: position + 1]))
            running.before, running.in_plan = running.computed, False
        self.writes.clear()
        for node, tokens in self.edges():
            for index, block in enumerate(node.blocks):
                row = self.host[block] if node.host else self.pool[self.place(block)]
                begin = len(tokens) - (len(node.blocks) - index) * SIZE
                assert row == [(node.salt, tokens[: begin + i + 1]) for i in range(SIZE)]
        self.begin_plan()

    def edges(self) -> list[tuple[Node, tuple[int, ...]]]:
        """Each with all tokens from the root to its end."""
        assert self.kv.tree is not None
        found = []
        for node in self.kv.tree.nodes():
            key, above = bytes(node.key), node.parent
            while above is not None:
                key, above = bytes(above.key) + key, above.parent
            found.append((node, tuple(key[::TOKEN_BYTES])))
        return found

    # --- the engine's side ------------------------------------------------------------------------------------------

    def prompt(self) -> list[int]:
        """Many begin alike."""
        stem = self.random.choice(self.stems)
        return [*stem[: self.random.randint(0, 17)], self.random.randint(0, 1)]

    def compute(self, running: Running) -> None:
        """A few tokens or all in the plan, if there is room."""
        end = min(len(running.tokens), running.computed + self.random.choice([0, 1, 4, 99, 99]))
        if running.in_plan or end == running.computed or self.kv.allocate(running.seq, end) is None:
            return
        for position in range(running.computed, end):
            self.writes.append((self.slot(running, position), (running.salt, tuple(running.tokens[: position + 1]))))
        running.computed, running.in_plan = end, True
        self.kv.record(running.seq, running.key, end)

    def begun(self, running: Running, beginning: Beginning) -> None:
        running.computed = beginning.num_tokens
        self.running.append(running)
        if beginning.copy is not None:
            self.plan.copies.append(beginning.copy)

    def admit(self) -> None:
        running = Running(self.count, self.random.choice(["", "", "", "x"]), self.prompt(), 0, 0)
        self.count += 1
        match, free = self.kv.match(running.key, running.salt), self.kv.num_free
        beginning = self.kv.admit(running.seq, match, running.salt, 99)
        assert beginning is not None
        taken = match.idle + len(self.kv.table(running.seq)) - len(match.blocks)
        assert self.kv.num_free == free - taken
        if match.host and free - match.idle >= len(match.host):
            assert beginning.num_tokens == self.kv.known_tokens(match)
        self.begun(running, beginning)
        self.compute(running)

    def go_on(self) -> None:
        running = self.random.choice(self.running)
        if running.computed == len(running.tokens):
            running.tokens += self.random.choices([0, 1], k=self.random.choice([1, 1, 4]))
        self.compute(running)

    def fork(self) -> None:
        parent = self.random.choice(self.running)
        shared = self.random.randint(0, parent.before)
        child = Running(self.count, parent.salt, [*parent.tokens[:shared], self.random.randint(0, 1)], 0, 0)
        self.count += 1
        beginning = self.kv.fork(parent.seq, child.seq, shared)
        if beginning is not None:
            self.begun(child, beginning)

    def release(self) -> None:
        """One that the plan does not compute; also such that it has admitted or forked."""
        idle = [running for running in self.running if not running.in_plan]
        if idle:
            running = self.random.choice(idle)
            self.running.remove(running)
            self.kv.release(running.seq, running.key, running.computed if self.random.random() < 0.7 else 0)

    def look(self) -> None:
        """A match has all known blocks, wherever they are."""
        tokens, salt = self.prompt(), self.random.choice(["", "x"])
        known = {(node.salt, prefix[: len(prefix) - i * SIZE]) for node, prefix in self.edges() for i in range(len(node.blocks))}
        expected = 0
        while expected + SIZE < len(tokens) and (salt, tuple(tokens[: expected + SIZE])) in known:
            expected += SIZE
        match = self.kv.match(pack(tokens), salt)
        assert self.kv.known_tokens(match) == expected
        assert match.num_tokens == len(match.blocks) * SIZE
        assert match.part is None or not match.host

    def step(self) -> None:
        can = [self.admit, self.admit, self.look, self.run, self.run]
        if self.running:
            can += [self.go_on, self.go_on, self.go_on, self.fork, self.release, self.release, self.release]
        self.random.choice(can)()
        self.kv.check_integrity()
        names = BlockNames("secret", SIZE)
        known = {
            names.of(pack(prefix[: len(prefix) - i * SIZE]), node.salt)[-NAME_BYTES:]
            for node, prefix in self.edges()
            for i in range(len(node.blocks))
        }
        assert self.names.known == known, "on the device or on the host: it can be had here"


@examples(150)
@given(st.integers(0, 2**32), st.integers(3, 12), st.sampled_from([1, 2, 4, 9, 30]))
def test_every_table_has_its_kv_whatever_sinks_and_comes_back(seed: int, blocks: int, slots: int) -> None:
    tiers = Tiers(seed, blocks, slots)
    for _ in range(120):
        tiers.step()
    tiers.run()
    for running in tiers.running:
        tiers.kv.release(running.seq, running.key, running.computed)
    tiers.running.clear()
    tiers.run()
    assert tiers.kv.pool.num_held == 0
    assert tiers.kv.num_free == blocks - 1


def tree_of(blocks: int, slots: int) -> KVManager:
    return KVManager(BatchConfig(num_blocks=blocks + 1, max_model_len=99, block_size=2, host_blocks=slots))


def compute(kv: KVManager, seq: int, tokens: list[int]) -> int:
    """A sequence that comes, is computed and leaves; how many tokens were known."""
    beginning = kv.admit(seq, kv.match(pack(tokens), ""), "", 99)
    assert beginning is not None
    assert kv.allocate(seq, len(tokens)) is not None
    kv.release(seq, pack(tokens), len(tokens))
    kv.check_integrity()
    return beginning.num_tokens


def test_what_is_evicted_comes_back() -> None:
    kv = tree_of(blocks=4, slots=4)
    assert kv.host is not None
    compute(kv, 1, [1] * 8)
    compute(kv, 2, [2] * 8)
    (stored,) = kv.take_transfers()
    assert (stored.kind, len(stored.blocks), kv.host.num_used) == ("store", 4, 4)
    kv.begin_plan()
    assert compute(kv, 3, [1] * 8) == 6
    assert [transfer.kind for transfer in kv.take_transfers()] == ["store", "load", "store"]
    assert kv.match(pack([1] * 9), "").num_tokens == 8


def test_what_was_decided_for_a_plan_that_was_not_made_goes_with_the_next() -> None:
    kv = tree_of(blocks=4, slots=4)
    kv.begin_plan([])
    compute(kv, 1, [1] * 8)
    compute(kv, 2, [2] * 4)
    copies: list[tuple[int, int]] = []
    kv.begin_plan(copies)
    copies.append((1, 1))
    compute(kv, 3, [3] * 4)
    assert [(len(transfer.blocks), transfer.copies) for transfer in kv.take_transfers()] == [(2, 0), (2, 1)]
    assert kv.take_transfers() == []


def test_the_host_forgets_what_came_first_when_it_is_full() -> None:
    kv = tree_of(blocks=2, slots=4)
    for seq in range(4):
        compute(kv, seq, [seq] * 4)
    assert [kv.known_tokens(kv.match(pack([seq] * 5), "")) for seq in range(4)] == [0, 4, 4, 4]
    compute(kv, 9, [9, 9])  # a block of the oldest gives way to one that was used after it
    assert [kv.known_tokens(kv.match(pack([seq] * 5), "")) for seq in range(4)] == [0, 2, 4, 4]


def test_what_the_host_could_never_hold_is_lost_from_its_end() -> None:
    kv = tree_of(blocks=6, slots=2)
    compute(kv, 1, [1] * 12)
    compute(kv, 2, [2] * 12)
    match = kv.match(pack([1] * 13), "")
    assert (match.num_tokens, len(match.host)) == (0, 2)


def test_what_sinks_block_by_block_is_one_edge() -> None:
    kv = tree_of(blocks=9, slots=20)
    assert kv.tree is not None
    compute(kv, 1, [1] * 18)
    for seq in range(7):
        compute(kv, 2 + seq, [2 + seq] * 2)
    edges = [node for node in kv.tree.nodes() if node.key[0] == 1]
    assert sorted((node.host, len(node.blocks)) for node in edges) == [(False, 2), (True, 7)]
    assert kv.tree.evict(2) == 2
    (edge,) = (node for node in kv.tree.nodes() if node.key[0] == 1)
    assert edge.host
    kv.begin_plan()
    assert compute(kv, 20, [1] * 17) == 16
    assert len([node for node in kv.tree.nodes() if node.key[0] == 1]) == 2


def test_what_was_computed_again_takes_the_place_of_the_slots() -> None:
    """A prompt whose positions are all told of is computed, whatever is known of it."""
    kv = tree_of(blocks=8, slots=8)
    assert kv.tree is not None
    assert kv.host is not None
    tokens = pack([1] * 8)
    compute(kv, 1, [1] * 8)
    assert kv.tree.evict(4) == 4
    kv.admit(2, NO_MATCH, "", 99)
    kv.allocate(2, 8)
    kv.record(2, tokens, 6)
    assert (kv.host.num_used, kv.match(tokens, "").blocks) == (1, tuple(kv.table(2)[:3]))
    kv.release(2, tokens, 8)
    assert (kv.host.num_used, kv.tree.num_blocks) == (0, 4)
    assert [transfer.kind for transfer in kv.take_transfers()] == ["store"]
    kv.check_integrity()
