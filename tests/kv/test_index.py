"""The prefix index against one set of names for each engine."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.index import PrefixIndex, unpack
from kv.names import NAME_BYTES, BlockNames, pack

ENGINES = ["a", "b", "c", "d"]


def chain(tokens: list[int]) -> bytes:
    return BlockNames("secret", 1).of(pack(tokens))


def brute(trees: dict[str, set[tuple[int, ...]]], tokens: list[int]) -> dict[str, int]:
    found = {}
    for engine, tree in trees.items():
        depth = 0
        while depth < len(tokens) and tuple(tokens[: depth + 1]) in tree:
            depth += 1
        if depth:
            found[engine] = depth
    return found


@given(st.data())
def test_overlap_is_what_each_tree_has(data: st.DataObject) -> None:
    """Trees that grow by prompts and lose tails, engines that die and come back, asked at any time."""
    index = PrefixIndex()
    trees: dict[str, set[tuple[int, ...]]] = {}
    tokens = st.lists(st.integers(0, 1), max_size=9)
    for now in range(data.draw(st.integers(0, 25))):
        engine = data.draw(st.sampled_from(ENGINES))
        action = data.draw(st.sampled_from(["grow", "grow", "shrink", "die", "tick", "ask"]))
        if action == "grow":
            prompt = data.draw(tokens)
            tree = trees.setdefault(engine, set())
            known = brute({"": tree}, prompt).get("", 0)
            index.added(engine, chain(prompt)[known * NAME_BYTES :])
            tree |= {tuple(prompt[:end]) for end in range(1, len(prompt) + 1)}
        elif action == "shrink" and trees.get(engine):
            leaves = [p for p in sorted(trees[engine]) if not any(q[:-1] == p for q in trees[engine])]
            leaf = data.draw(st.sampled_from(leaves))
            index.removed(engine, chain(list(leaf))[-NAME_BYTES:])
            trees[engine].remove(leaf)
        elif action == "die":
            index.forget(engine)
            trees.pop(engine, None)
        elif action == "tick":
            for _ in range(data.draw(st.sampled_from([1, 300]))):
                index.tick(float(now))
        prompt = data.draw(tokens)
        assert index.overlap(unpack(chain(prompt))) == brute(trees, prompt)
    for _ in range(300):
        index.tick(0.0)
    assert len(index) == len({p for tree in trees.values() for p in tree}), "nothing is left of the dead"


@pytest.mark.parametrize("expected", [False, True])
def test_a_dead_engines_place_is_not_taken_before_all_is_swept(monkeypatch: pytest.MonkeyPatch, expected: bool) -> None:
    monkeypatch.setattr("kv.index._LOOKED", 100)
    index = PrefixIndex()
    theirs = struct.pack("<8192Q", *range(8192))  # two in each shard
    names = unpack(theirs)
    index.added("other", theirs)
    index.added("dead", theirs)
    if expected:
        index.expect("dead", names[:64], 0.0)
    place = index._slots["dead"]
    index.forget("dead")
    for tick in range(2000):
        index.added(f"new {tick}", struct.pack("<Q", 1 << 20))
        if index._slots[f"new {tick}"] == place:
            break
        assert all(index.overlap([name]) == {"other": 1} for name in names[tick % 64 :: 64])
        before = index._swept
        index.tick(20.0 if tick > 1000 else 0.0)
        assert index._swept - before <= 100 // 16 + 1, "a few at a time"
    assert index._swept == 4096
    assert tick > 1000 if expected else tick < 1000
    assert all(index.overlap([name]) == {"other": 1} for name in names), "nothing that the dead one had is the new one's"


def test_what_is_expected_counts_for_a_while() -> None:
    index = PrefixIndex(expected_s=5.0)
    names = unpack(chain([1, 2, 3]))
    index.expect("a", names, 100.0)
    assert index.overlap(names) == {"a": 3}
    index.added("a", chain([1]))
    index.tick(104.0)
    assert index.overlap(names) == {"a": 3}
    index.tick(105.0)
    index.tick(110.0)
    assert index.overlap(names) == {"a": 1}


def test_of_many_expectations_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv.index._PORTION", 10)
    monkeypatch.setattr("kv.index._PORTIONS", 3)
    index = PrefixIndex()
    prompts = [unpack(chain(list(range(n, n + 4)))) for n in range(0, 40, 4)]
    for number, names in enumerate(prompts):
        index.expect("a", names, 0.0)
        assert index.overlap(names) == {"a": 4}
        assert index.overlap(prompts[max(0, number - 4)]) == {"a": 4}
        assert sum(map(len, index._expected.portions)) <= 30
    assert index.overlap(prompts[0]) == {}
    long = unpack(chain(list(range(100, 150))))
    index.expect("b", long, 0.0)
    assert index.overlap(long) == {"b": 10}, "what there is room for"


def test_several_engines_are_expected_to_have_the_same() -> None:
    index = PrefixIndex()
    names = unpack(chain([1, 2, 3, 4]))
    index.expect("a", names[:2], 0.0)
    index.expect("b", names, 0.0)
    index.expect("a", names[2:3], 0.0)
    assert index.overlap(names) == {"a": 3, "b": 4}


def test_an_expectation_dies_with_its_engine() -> None:
    index = PrefixIndex()
    names = unpack(chain([1]))
    index.expect("a", names, 0.0)
    index.forget("a")
    assert index.overlap(names) == {}


def test_the_longest_unused_names_go_first_and_beginnings_last() -> None:
    index = PrefixIndex(max_blocks=4096 * 4)
    used, others = list(range(1000)), [list(range(n, n + 1000)) for n in range(1000, 60000, 1000)]
    index.added("a", chain(used))
    for prompt in others:
        index.added("a", chain(prompt))
        assert index.overlap(unpack(chain(used)))["a"] > 990, "but for the last ones, where a shard is crowded"
    assert len(index) <= 4096 * 4
    assert sum(index.overlap(unpack(chain(prompt))).get("a", 0) for prompt in others[:10]) < 1000


def test_a_beginning_that_was_thinned_out_is_found_by_what_follows_it() -> None:
    index = PrefixIndex(max_blocks=4096 * 16)
    prompt = chain(list(range(2000)))
    names = unpack(prompt)
    index.added("a", prompt[: 1000 * NAME_BYTES])
    number = 10_000
    while names[0] in index._shards[names[0] % 4096]:
        index.added("b", chain(list(range(number, number + 1000))))
        number += 1000
    index.added("a", prompt[1000 * NAME_BYTES :])
    assert index.overlap(names[:1]) == {}
    assert index.overlap(names) == {"a": 2000}
    assert index.overlap(names[:1]) == {"a": 1}, "it is known again"
    assert len(index) == sum(map(len, index._shards))
    assert len(index) <= 4096 * 16


def test_what_is_found_again_and_again_stays() -> None:
    index = PrefixIndex(max_blocks=4096 * 16)
    used = chain(list(range(1000)))
    names = unpack(used)
    index.added("a", used)
    for number in range(1000, 200_000, 1000):
        index.added("a", chain(list(range(number, number + 1000))))
        assert sum(name in index._shards[name % 4096] for name in names) > 950
        assert index.overlap(names)["a"] == 1000
    assert 4096 * 12 < len(index) <= 4096 * 16


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_what_was_found_is_passed_over_when_its_shard_is_thinned(steps: list[tuple[bool, int]]) -> None:
    """One shard of four names beside others that are full enough for an upkeep. Marks are shared by names with equal last bits."""
    index = PrefixIndex(max_blocks=4096 * 4)
    index.added("a", b"".join(struct.pack("<2Q", shard, shard + 4096) for shard in range(1, 4096)))
    index.added("a", struct.pack("<4Q", *range((1 << 20) + 1, (1 << 20) + 5)))
    kept: list[int] = []
    """The oldest first."""
    marks: set[int] = set()
    for found, number in steps:
        name = number << 12
        if found:
            assert index.overlap([name]) == ({"a": 1} if name in kept else {})
            marks |= {number % 4} if name in kept else set()
        elif name not in kept:
            index.added("a", struct.pack("<Q", name))
            kept.append(name)
        if len(kept) > 4:
            gone = next((name for name in kept if (name >> 12) % 4 not in marks), None)
            passed = kept if gone is None else kept[: kept.index(gone)]
            marks -= {(name >> 12) % 4 for name in passed}
            kept = [name for name in [*kept[len(passed) :], *passed] if name != (kept[0] if gone is None else gone)]
        assert len(index) == sum(map(len, index._shards))
        assert list(index._shards[0]) == kept


@pytest.mark.parametrize("salt", ["", "x"])
def test_names_follow_from_the_whole_prefix(salt: str) -> None:
    names, key = BlockNames("secret", 2), pack([1, 2, 3, 4, 5])
    whole = names.of(key, salt)
    assert len(whole) == 2 * NAME_BYTES
    assert names.of(key[8:], salt, whole[:NAME_BYTES]) == whole[NAME_BYTES:]
    assert names.of(pack([1, 2]), salt) == whole[:NAME_BYTES]
    others = [BlockNames("other", 2).of(key, salt), names.of(key, salt + "y"), names.of(pack([9, 2, 3, 4]), salt)]
    assert len({whole[-NAME_BYTES:], *(other[-NAME_BYTES:] for other in others)}) == 4
