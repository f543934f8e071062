"""Where the slots go, against counting them one by one; and the figure of waste worked out by hand."""

from hypothesis import given
from hypothesis import strategies as st

from kv.ledger import Ledger, measure


@st.composite
def tables(draw: st.DrawFn, block_size: int) -> list[tuple[list[int], int]]:
    """Tables as a pool makes them: no block twice in one table, shared blocks as a common prefix."""
    ids = iter(range(1, 1000))
    made: list[tuple[list[int], int]] = []
    for _ in range(draw(st.integers(0, 6))):
        shared: list[int] = []
        if made:
            parent, valid = draw(st.sampled_from(made))
            shared = parent[: draw(st.integers(0, valid // block_size))]
        table = [*shared, *(next(ids) for _ in range(draw(st.integers(0, 4))))]
        made.append((table, draw(st.integers(len(shared) * block_size, len(table) * block_size))))
    return made


@given(st.data(), st.sampled_from([1, 4, 16]))
def test_ledger_counts_slots(data: st.DataObject, block_size: int) -> None:
    held = data.draw(tables(block_size))
    valid = [
        (block * block_size + i)
        for table, n in held
        for k, block in enumerate(table)
        for i in range(min(block_size, max(0, n - k * block_size)))
    ]
    ledger = measure(held, block_size)
    assert ledger.allocated == len({block for table, _ in held for block in table}) * block_size
    assert ledger.used == len(set(valid))
    assert ledger.shared == len(valid) - len(set(valid))
    assert ledger.wasted == ledger.allocated - len(set(valid))
    assert 0 <= ledger.waste <= 1


def test_an_empty_pool_wastes_nothing() -> None:
    assert measure([], 16) == Ledger()
    assert Ledger().waste == 0.0


def test_two_choices_of_one_prompt() -> None:
    # 10 tokens of prompt, blocks of 4: two whole blocks shared, each choice with a third block of 2 and 3 valid slots.
    ledger = measure([([1, 2, 3], 10), ([1, 2, 4], 11)], 4)
    assert ledger == Ledger(allocated=16, used=13, shared=8)
    assert ledger.wasted == 3
    assert ledger.waste == 3 / 16
