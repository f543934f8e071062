"""The search for sustained rates."""

import math
import statistics

import pytest

from bench.rates import Curve, champion, explore


def test_a_rate_is_sustained_if_all_lower_ones_are_and_every_seed_holds() -> None:
    curve = Curve({1.0: [1.0, 1.1], 2.0: [2.0, 2.6], 3.0: [1.9, 2.0], 4.0: [5.0, math.inf]})
    assert curve.sustained(2.0) == 1.0
    assert curve.sustained(2.3, statistics.median) == 3.0
    assert curve.sustained(2.6) == 3.0
    assert curve.sustained(1.0) is None
    assert (curve.first_failing(2.0), curve.first_failing(2.6), curve.first_failing(math.inf)) == (2.0, 4.0, None)


@pytest.mark.parametrize("start", [0.01, 3.0, 500.0])
def test_explore_brackets_every_limit(start: float) -> None:
    asked: list[float] = []

    def measure(rate: float) -> list[float]:
        asked.append(rate)
        return [1 + rate, 1 + 0.5 * rate]  # limits 2, 4, 8 are reached at 1, 3, 7

    curve = explore(measure, [2.0, 4.0, 8.0], start, 0.05)
    for limit in (2.0, 4.0, 8.0):
        low, high = curve.sustained(limit), curve.first_failing(limit)
        assert low is not None
        assert high is not None
        assert low <= limit - 1 < high <= 1.05 * low
    assert len(asked) == len(set(asked)) < 40


def test_explore_ends_where_nothing_fails_and_where_nothing_holds() -> None:
    assert explore(lambda rate: [0.0], [1.0], 1.0, 0.1).first_failing(1.0) is None
    assert explore(lambda rate: [math.inf], [1.0], 1.0, 0.1).sustained(1.0) is None


def test_champion_holds_highest() -> None:
    limits = {"a": 3.0, "b": 10.0, "c": 9.9, "d": 0.5}
    tries: list[str] = []

    def holds(name: str, rate: float) -> bool:
        tries.append(name)
        return rate <= limits[name]

    found = champion(limits, holds, 1.0, 1.1)
    assert found is not None
    assert found[0] == "b"
    assert 10.0 / 1.1 < found[1] <= 10.0
    assert (tries.count("c"), tries.count("d")) == (1, 1)
    assert champion(["d"], holds, 1.0, 1.1) is None
    assert champion([], holds, 1.0, 1.1) is None
