"""The rule by which requests are placed."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import SEQUENCE_TOKENS, WORK, Turnover, cheapest, cost, delay


@pytest.mark.parametrize(
    ("here", "there", "better"),  # (overlap, backlog, sequences) of a prompt of 1000 tokens
    [
        ((0, 0, 0), (0, 0, 1), "here"),
        ((900, 0, 0), (0, 0, 0), "here"),
        ((900, 800, 4), (0, 0, 4), "here"),
        ((900, 9000, 4), (0, 0, 4), "there"),
        ((900, 9000, 64), (0, 9000, 64), "here"),
        ((1000, 10**6, 64), (0, 10**6, 64), "here"),
    ],
)
def test_costs_from_idle_to_saturated(here: tuple[int, int, int], there: tuple[int, int, int], better: str) -> None:
    ours, theirs = (cost(1000, overlap, delay(backlog, sequences)) for overlap, backlog, sequences in (here, there))
    assert (ours < theirs) == (better == "here")


def test_known_tokens_are_worth_a_wait() -> None:
    away = cost(1000, 0, 0.0)
    assert cost(1000, 900, delay(2000, 0)) < away
    assert away < cost(1000, 900, delay(round(900 * (WORK + 1)) + 1, 0))
    assert away < cost(1000, 0, delay(0, 1)) <= away + SEQUENCE_TOKENS


def test_a_few_known_tokens_do_not_gather_all_requests_where_much_was_computed() -> None:
    assert cost(1000, 0, 0.0, turnover=0.0) < cost(1000, 50, 0.0, turnover=2.0)
    assert cost(60, 0, 0.0, turnover=0.0) > cost(60, 50, 0.0, turnover=2.0)


def test_turnover_is_by_pool_and_fades_with_newer_work() -> None:
    turnover = Turnover()
    assert turnover.per_token(3000) == 0.0
    turnover.bound("a", 100, 3000)
    turnover.bound("b", 100, 3000)

    def of(engine: str, pool: int) -> float:
        return turnover.per_token(3000) * turnover.work.get(engine, 0.0) / pool

    assert of("a", 1000) < of("b", 1000) < of("b", 500)
    assert sum(of(engine, 1000) for engine in "abc") == pytest.approx(3)  # a mean of 1 over three pools
    for _ in range(10**5):  # without end, and no number overflows
        turnover.bound("c", 1000, 3000)
    assert of("c", 1000) == pytest.approx(3)
    turnover.forget("c")
    assert of("c", 1000) == 0.0


@dataclass
class Engine:
    name: str
    delay: float
    pool_tokens: float


# Of few values, so that there are equals.
ENGINES = st.lists(
    st.builds(Engine, st.text("abc", max_size=3), st.sampled_from([0.0, 64.0, 320.0]), st.sampled_from([1.0, 99.0, 500.0]))
)
BLOCKS = st.dictionaries(st.text("abc", max_size=3), st.integers(1, 4))
WORKED = st.lists(st.tuples(st.text("abc", max_size=3), st.integers(0, 300)), max_size=5)


@given(ENGINES.filter(bool), st.integers(0, 80), BLOCKS, WORKED)
def test_the_cheapest_is_the_one_with_the_least_cost(
    engines: list[Engine], num_tokens: int, overlap: dict[str, int], worked: list[tuple[str, int]]
) -> None:
    turnover = Turnover()
    for name, work in worked:
        turnover.bound(name, work, 1000)

    def key(engine: Engine) -> tuple[float, int, str]:
        per_token, known = turnover.per_token(1000), overlap.get(engine.name, 0)
        ours = per_token * turnover.work.get(engine.name, 0.0) / engine.pool_tokens if per_token else 1.0
        return cost(num_tokens, 16 * known, engine.delay, ours), -known, engine.name

    assert cheapest(engines, num_tokens, overlap, 16, turnover, 1000) is min(engines, key=key)
