"""The cluster's prefix index: which engines have which blocks, as the union of their radix trees (names as in kv/names.py).

A block's name stands for its whole prefix, and a tree that has a block has all blocks before it. So the radix tree over names needs
no edges: one table from a name to the set of engines that have it, a set being the bits of an integer. Along a prompt the sets only
shrink, so the places where they do are found by galloping; no step grows with the index.

The table is cut into shards: none is large enough for its growth, or for the sweeping out of a dead engine's bits, to be felt.
Answers may be stale; that costs speed, never correctness, since engines compare tokens. When the table is full, the names that
were told the longest ago go, unless they were found since. Of a prompt told piece by piece that is the beginning; it is put back
when what follows it is asked for.
"""

import itertools
import struct
from collections import deque
from collections.abc import Iterator, Sequence

from kv.names import NAME_BYTES

_SHARDS = 1 << 12
_LOOKED = 1 << 12
"""After so many names one call of tick() looks through no more shards ..."""
_SHARD = 16
"""... each of which takes as long as so many names besides."""
_PORTION = 1 << 15
"""Names in a portion of what is expected: few enough for one to be made and dropped without being felt."""
_PORTIONS = 8
_DIGITS = bytes.maketrans(b"01", b"\0\1")


def unpack(names: bytes) -> tuple[int, ...]:
    """Names, joined, as numbers."""
    return struct.unpack(f"<{len(names) // NAME_BYTES}Q", names)


class _Expected:
    """Names that engines will have soon, in portions that are dropped when they are old, or when there are too many."""

    def __init__(self, lasts_s: float) -> None:
        """`lasts_s`: how long at least one counts, unless there are very many."""
        self.portions: deque[dict[int, int]] = deque()
        """From a name to a set of engines; the oldest first, none is empty."""
        self._began: deque[float] = deque()
        self._lasts_s = lasts_s
        self.dropped = 0
        """Portions, so far."""

    def add(self, names: Sequence[int], bit: int, now: float) -> None:
        """This engine will have them."""
        if not names:
            return
        if not self.portions or now - self._began[-1] > self._lasts_s / 2 or len(self.portions[-1]) + len(names) > _PORTION:
            self.portions.append({})
            self._began.append(now)
            if len(self.portions) > _PORTIONS:
                self._drop()
        portion = self.portions[-1]
        for name in names[:_PORTION]:
            known = portion.get(name)
            portion[name] = bit if known is None else known | bit

    def tick(self, now: float) -> None:
        """Drop what is old."""
        while self.portions and now - self._began[0] >= 1.5 * self._lasts_s:
            self._drop()

    def _drop(self) -> None:
        self.portions.popleft()
        self._began.popleft()
        self.dropped += 1


class PrefixIndex:
    """Feed it with added(), removed(), forget(), expect() and tick(); ask overlap()."""

    def __init__(self, max_blocks: int = 1 << 24, expected_s: float = 5.0) -> None:
        """`max_blocks`: names kept, the least recently used go first. `expected_s`: how long at least an expectation counts,
        unless there are very many."""
        self._shards: list[dict[int, int]] = [{} for _ in range(_SHARDS)]
        self._count = 0
        """Names in the shards."""
        self._most = max(2, max_blocks // _SHARDS)
        """Names of a shard."""
        self._used = bytearray()
        """1: a name with these last bits was found, and is passed over when its shard is thinned. Empty while there is room."""
        self._slots: dict[str, int] = {}
        """The bit of each engine."""
        self._engines: list[str] = []
        """By bit; "": nobody's."""
        self._masks: list[int] = []
        """1 << slot, each made once: most names are one engine's, and share it."""
        self._alive = 0
        self._dirty: dict[int, tuple[int, int]] = {}
        """Bits that are nobody's, but may still stand somewhere: until so many shards are swept, and so many portions of what is
        expected dropped, since the beginning."""
        self._swept = 0
        """Shards since the beginning, one after the other and then from the first again."""
        self._expected = _Expected(expected_s)

    def __len__(self) -> int:
        """Names in the table."""
        return self._count

    # --- what engines have ------------------------------------------------------------------------------------------

    def forget(self, engine: str) -> None:
        """The engine has nothing any more. Its bit goes to another one when no name has it."""
        slot = self._slots.pop(engine, None)
        if slot is not None:
            self._engines[slot] = ""
            self._alive &= ~self._masks[slot]
            self._dirty[slot] = self._swept + _SHARDS, self._expected.dropped + len(self._expected.portions)

    def added(self, engine: str, names: bytes) -> None:
        """The engine has these blocks, joined in the order of a prompt."""
        self._put(unpack(names), self._masks[self._slot(engine)])

    def removed(self, engine: str, names: bytes) -> None:
        """The engine has these blocks no more."""
        slot = self._slots.get(engine)
        if slot is None:
            return
        bit, shards = self._masks[slot], self._shards
        for name in unpack(names):
            shard = shards[name & (_SHARDS - 1)]
            known = shard.get(name, 0)
            if left := known & ~bit:
                shard[name] = self._interned(left)
            elif known:
                del shard[name]
                self._count -= 1

    def expect(self, engine: str, names: Sequence[int], now: float) -> None:
        """A request with these blocks is on its way to the engine: it will have them, unless it does not tell so soon."""
        self._expected.add(names, self._masks[self._slot(engine)], now)

    def tick(self, now: float) -> None:
        """Forget old expectations, and sweep some more of the dead engines' bits out."""
        self._expected.tick(now)
        if not self._dirty:
            return
        dead = sum(self._masks[slot] for slot in self._dirty)
        last = max(swept for swept, _ in self._dirty.values())
        looked = 0
        while self._swept < last and looked < _LOOKED:
            number = self._swept % _SHARDS
            looked += len(self._shards[number]) + _SHARD
            self._sweep(number, dead)
            self._swept += 1
        done = self._swept, self._expected.dropped
        self._dirty = {slot: until for slot, until in self._dirty.items() if until[0] > done[0] or until[1] > done[1]}

    def _put(self, names: Sequence[int], holders: int) -> None:
        shards, most, mask = self._shards, self._most, _SHARDS - 1
        fresh = 0
        for name in reversed(names):  # so that of one prompt the beginning goes last
            shard = shards[name & mask]
            known = shard.get(name)
            if known is None:
                shard[name] = holders
                fresh += 1
                if len(shard) > most:
                    self._thin(name & mask)
            elif known & holders != holders:
                shard[name] = known | holders
        self._count += fresh

    def _slot(self, engine: str) -> int:
        slot = self._slots.get(engine)
        if slot is None:
            free = (s for s, name in enumerate(self._engines) if not name and s not in self._dirty)
            slot = next(free, len(self._engines))
            if slot == len(self._engines):
                self._engines.append("")
                self._masks.append(1 << slot)
            self._slots[engine], self._engines[slot] = slot, engine
            self._alive |= self._masks[slot]
        return slot

    def _interned(self, mask: int) -> int:
        return self._masks[mask.bit_length() - 1] if mask & (mask - 1) == 0 else mask

    def _sweep(self, number: int, dead: int) -> None:
        shard = self._shards[number]
        for name, mask in [(name, mask) for name, mask in shard.items() if mask & dead]:
            if left := mask & ~dead:
                shard[name] = self._interned(left)
            else:
                del shard[name]
                self._count -= 1

    def _thin(self, number: int) -> None:
        """Drop a quarter of the shard: the oldest, but for those that were found since, which are passed over once."""
        shard = self._shards[number]
        drop = max(1, len(shard) // 4)
        self._count -= drop
        used, rest, passed = self._marks(), iter(shard.items()), {}
        mask = len(used) - 1
        for name, holders in rest:
            if used[name & mask]:
                passed[name] = holders
            else:
                drop -= 1
                if not drop:
                    break
        for name in passed:
            used[name & mask] = 0
        kept = dict(rest)
        kept.update(passed)  # which so are as good as new
        self._shards[number] = dict(itertools.islice(kept.items(), drop, None)) if drop else kept

    def _marks(self) -> bytearray:
        if not self._used:
            self._used = bytearray(1 << (self._most * _SHARDS - 1).bit_length())
        return self._used

    # --- asking -----------------------------------------------------------------------------------------------------

    def overlap(self, names: Sequence[int]) -> dict[str, int]:
        """How many of a prompt's first blocks each engine has, or is expected to have soon. Engines without the first: left out."""
        found: dict[str, int] = {}
        depth = 0
        holders = self._mended(names, 0)
        while holders:
            depth = self._reach(names, depth, holders)
            left = self._mended(names, depth) & holders
            found.update(dict.fromkeys(self._with_bits(holders & ~left), depth))
            holders = left
        self._touch(names[:depth])
        return found

    def _with_bits(self, mask: int) -> Iterator[str]:
        """The engines whose bits these are, all of them alive."""
        # As digits, which is much faster than one bit after the other where a thousand engines have the same beginning.
        digits = f"{mask:b}"[::-1].encode().translate(_DIGITS)  # the lowest bit first
        return itertools.compress(self._engines, digits)

    def _mended(self, names: Sequence[int], depth: int) -> int:
        """Who has the block at `depth`, nobody behind the last one. If it was thinned out, it is put back with what is known of
        those behind it: who has one of them has all before it."""
        count = len(names)
        if depth == count:
            return 0
        if self._used and names[depth] not in self._shards[names[depth] & (_SHARDS - 1)]:
            step = 1
            while depth + step < count:
                behind = names[depth + step]
                known = self._shards[behind & (_SHARDS - 1)].get(behind, 0) & self._alive
                if known:
                    self._put(names[depth : depth + step], self._interned(known))
                    break
                step *= 2
        return self._holders(names[depth])

    def _holders(self, name: int) -> int:
        known = self._shards[name & (_SHARDS - 1)].get(name, 0)
        for portion in self._expected.portions:
            if name in portion:
                known |= portion[name]
        return known & self._alive

    def _reach(self, names: Sequence[int], depth: int, holders: int) -> int:
        """The first place after `depth` whose block not all `holders`, who have the one at `depth`, have."""
        step, count = 1, len(names)
        low = depth
        while low + step < count and self._holders(names[low + step]) & holders == holders:
            low += step
            step *= 2
        high = min(low + step, count)
        while low + 1 < high:
            middle = (low + high) // 2
            if self._holders(names[middle]) & holders == holders:
                low = middle
            else:
                high = middle
        return high

    def _touch(self, names: Sequence[int]) -> None:
        """These were found: they go later than others, where there may soon be need."""
        if not self._used and self._count < self._most * _SHARDS // 2:
            return
        used = self._marks()
        mask = len(used) - 1
        for name in names:
            used[name & mask] = 1
