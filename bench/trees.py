"""What an engine's radix tree costs as it grows. No model, no processes, no network.

    python -m bench.trees [--blocks 1000000] [--out DIR]

Requests of 1,000 to 4,000 tokens, conversations that go on below a few system prompts, until the tree has --blocks blocks. At each
power of ten its operations are timed one at a time:

    match, known        a prompt that the tree has
    match, new          a new question below a known system prompt
    match, none         a prompt of which it has nothing
    lock and release    a lease on a known prompt
    insert              a new question's blocks
    evict               as many blocks as that took

Times are CPU times of the one thread, so that other load on the machine hardly enters; looking at the clock is taken off.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy

from bench import options
from bench.report import Report, command_line, draw_bars
from bench.times import COLUMNS, Times
from kv.blocks import BlockPool
from kv.names import TOKEN_BYTES
from kv.radix import RadixTree

BLOCK_SIZE = 16
STRIDE = BLOCK_SIZE * TOKEN_BYTES
SEED = 7
SAMPLES = 300
"""Of each operation."""
_LONGEST = 4096 // BLOCK_SIZE
"""Blocks of a prompt."""


class Traffic:
    """Prompts as packed tokens, of 1,000 to 4,000."""

    def __init__(self) -> None:
        self._random = numpy.random.default_rng(SEED)
        self._systems = [self._tokens(500, 900) for _ in range(8)]
        self._going_on: list[bytes] = [b""] * 64

    def _tokens(self, least: int, most: int) -> bytes:
        count = int(self._random.integers(least, most))
        return self._random.integers(0, 128_000, count, dtype=numpy.uint32).tobytes()

    def pick(self, count: int) -> int:
        """A number below `count`."""
        return int(self._random.integers(count))

    def unknown(self) -> bytes:
        """Nobody has seen any of it."""
        return self._tokens(1000, 4000)

    def question(self) -> bytes:
        """A system prompt and what has not been asked yet."""
        return self._systems[self.pick(len(self._systems))] + self._tokens(500, 3000)

    def turn(self) -> bytes:
        """The next request, with its answer: a new conversation, or one of those that go on."""
        place = self.pick(len(self._going_on))
        key = self._going_on[place]
        key = key + self._tokens(100, 500) if key else self.question()
        self._going_on[place] = b"" if len(key) > 3500 * TOKEN_BYTES else key
        return key


class Grown:
    """A tree under traffic, used as the KV manager uses it."""

    def __init__(self, num_blocks: int, longest: int) -> None:
        """`longest`: blocks of the longest prompt, for which there is always room besides."""
        self._pool = BlockPool(num_blocks + 2 * longest + 1)
        self.tree = RadixTree(self._pool, BLOCK_SIZE)

    def add(self, key: bytes, times: Times) -> None:
        """A request with these packed tokens comes and goes; its insertion is timed."""
        match = self.tree.match(key)
        lease = self.tree.lock(match)
        self._pool.share(match.blocks)
        blocks = [*match.blocks, *(self._pool.allocate(len(key) // STRIDE - len(match.blocks)) or [])]
        before = self.tree.num_blocks
        with times:
            self.tree.insert(lease, key, blocks)
        times.blocks += self.tree.num_blocks - before
        self.tree.release(lease, key, blocks)
        self._pool.release(blocks)

    def match(self, key: bytes, times: Times) -> None:
        """Look for the packed tokens."""
        with times:
            match = self.tree.match(key)
        times.blocks += len(match.blocks)

    def operations(self, known: Sequence[bytes], new: Callable[[], bytes], unknown: Callable[[], bytes]) -> dict[str, Times]:
        """Time each of them; in the end the tree has as many blocks as before. `known` are whole blocks that it has."""
        names = ("match, known", "match, new", "match, none", "lock and release", "insert", "evict")
        times = {name: Times() for name in names}
        for key in itertools.islice(itertools.cycle(known), SAMPLES):
            all_of_it = key + bytes(TOKEN_BYTES)  # as one token is always left to be computed
            self.match(all_of_it, times["match, known"])
            self.match(new(), times["match, new"])
            self.match(unknown(), times["match, none"])
            match = self.tree.match(all_of_it)
            if len(match.blocks) != len(key) // STRIDE:
                raise RuntimeError("a prompt that was kept is not found")
            with times["lock and release"]:
                self.tree.release(self.tree.lock(match))
            times["lock and release"].blocks += len(match.blocks)
        size = self.tree.num_blocks
        for _ in range(SAMPLES):  # which throws out what was known, where the tree is small
            self.add(new(), times["insert"])
            more = self.tree.num_blocks - size
            with times["evict"]:
                freed = self.tree.evict(more)
            times["evict"].blocks += freed
            if freed != more:
                raise RuntimeError("not as much was evicted as was inserted")
        return times


def measure_tree(num_blocks: int) -> dict[int, dict[str, Times]]:
    """The operations' times by size of the tree: at the powers of ten up to `num_blocks`, and there."""
    traffic = Traffic()
    grown = Grown(num_blocks, _LONGEST)
    found: dict[int, dict[str, Times]] = {}
    kept: list[bytes] = []
    growing = Times()
    for size in sorted({num_blocks, *(10**e for e in range(3, 10) if 10**e < num_blocks)}):
        while grown.tree.num_blocks < size:
            key = traffic.turn()
            grown.add(key, growing)
            place = traffic.pick(len(growing.us))  # each request so far is kept with the same chance
            if len(kept) < SAMPLES:
                kept.append(key)
            elif place < SAMPLES:
                kept[place] = key
        lengths = [grown.tree.match(key + bytes(TOKEN_BYTES)).num_tokens for key in kept]
        # Some were evicted, all or in part, when the smaller tree was measured.
        known = [key[: tokens * TOKEN_BYTES] for key, tokens in zip(kept, lengths, strict=True) if tokens]
        found[size] = grown.operations(known, traffic.question, traffic.unknown)
    return found


def measure_root(num_children: int) -> dict[str, Times]:
    """The same where so many prompts of one block have nothing in common."""
    random = numpy.random.default_rng(SEED)
    grown = Grown(num_children, 1)

    def prompt() -> bytes:
        return random.integers(0, 128_000, BLOCK_SIZE, dtype=numpy.uint32).tobytes()

    prompts = [prompt() for _ in range(num_children)]
    growing = Times()
    for key in prompts:
        grown.add(key, growing)
    return grown.operations(prompts[:: max(1, num_children // SAMPLES)], prompt, prompt)


def tell_tree(report: Report, num_blocks: int) -> dict[int, dict[str, Times]]:
    """Measure the tree, and say what was found."""
    sizes = measure_tree(num_blocks)
    operations = list(sizes[num_blocks])
    rows = [[name, size, *sizes[size][name].row()] for name in operations for size in sizes]
    report.table("radix tree, by its blocks", ["", "in the tree", *COLUMNS], rows)
    children = max(1, num_blocks // 10)
    rows = [[name, *times.row()] for name, times in measure_root(children).items()]
    report.table(f"a root with {children} children of one block", ["", *COLUMNS], rows)
    return sizes


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--blocks", type=options.positive, default=1_000_000, help="of the tree (default: %(default)s)")
    arguments = parser.parse_args(argv)
    report = Report("trees", command_line(argv))
    sizes = tell_tree(report, arguments.blocks)
    report.save(arguments.out)
    panels = {
        f"{name}, us": {f"{size} blocks": times[name].median for size, times in sizes.items()}
        for name in ("match, known", "insert", "evict")
    }
    draw_bars(arguments.out / "trees.png", "Radix tree: the median of an operation by size", panels)


if __name__ == "__main__":
    main()
