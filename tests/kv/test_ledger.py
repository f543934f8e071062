"""Where the slots go: what the manager says against counting them one by one; and the figure of waste worked out by hand."""

import random

from hypothesis import given
from hypothesis import strategies as st

from cluster.config import BatchConfig, PrefixCache
from kv.ledger import Ledger
from kv.manager import KVManager
from kv.names import pack


def counted(kv: KVManager, computed: dict[int, int]) -> Ledger:
    """Every slot looked at: the KV of a shared block is valid as far as its furthest table says."""
    size = kv.config.block_size
    valid = [kv.table(seq)[place // size] * size + place % size for seq, tokens in computed.items() for place in range(tokens)]
    held = {block for seq in computed for block in kv.table(seq)}
    return Ledger(len(held) * size, len(set(valid)), len(valid) - len(set(valid)))


@given(st.integers(0, 2**32), st.sampled_from([1, 3, 8]), st.sampled_from(["on", "off"]))
def test_every_slot_is_counted(seed: int, size: int, prefix_cache: PrefixCache) -> None:
    """Sequences that begin alike, fork, grow and leave."""
    chance = random.Random(seed)
    kv = KVManager(BatchConfig(num_blocks=40, max_model_len=100, block_size=size, prefix_cache=prefix_cache))
    stem = chance.choices(range(9), k=30)
    tokens: dict[int, bytes] = {}
    computed: dict[int, int] = {}
    for seq in range(chance.randrange(12)):
        kv.begin_plan()
        if computed and chance.random() < 0.4:
            parent = chance.choice(list(computed))
            if kv.fork(parent, seq, computed[parent]) is None:
                continue
            tokens[seq], computed[seq] = tokens[parent], computed[parent]
        else:
            tokens[seq] = pack([*stem[: chance.randrange(1, 31)], *chance.choices(range(9), k=60)])
            beginning = kv.admit(seq, kv.match(tokens[seq], ""), "", 90)
            assert beginning is not None
            computed[seq] = beginning.num_tokens
        grown = min(90, computed[seq] + chance.randrange(20))
        if kv.allocate(seq, grown) is not None:
            kv.record(seq, tokens[seq], grown)
            computed[seq] = grown
        if chance.random() < 0.3:
            gone = chance.choice(list(computed))
            kv.release(gone, tokens.pop(gone), computed.pop(gone))
        kv.check_integrity()
        assert kv.ledger(computed) == counted(kv, computed)


def test_waste_is_what_is_allocated_without_kv() -> None:
    # 10 tokens of prompt, blocks of 4: two whole blocks shared, each choice with a third block of 2 and 3 valid slots.
    ledger = Ledger(allocated=16, used=13, shared=8)
    assert ledger.wasted == 3
    assert ledger.waste == 3 / 16
    assert Ledger().waste == 0.0
