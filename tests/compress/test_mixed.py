"""Mixed precision: the search against all assignments, and what the measurement says of a real model."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cluster.model import DEMO_MODEL
from cluster.schemes import Scheme, parse_precision
from compress.mixed import Option, Unit, assign, sensitivities

INT8, INT4 = parse_precision("int8"), parse_precision("int4-g64")
LOSSES = st.floats(0.0, 1.0, allow_subnormal=False)


@st.composite
def some_units(draw: st.DrawFn) -> list[Unit]:
    units = []
    for number in range(draw(st.integers(1, 5))):
        size = draw(st.sampled_from([16, 64, 100]))
        low, high = draw(LOSSES), draw(LOSSES)
        options = (Option(None, 2.0 * size, 0.0), Option(INT8, float(size), low), Option(INT4, size / 2, high))
        units.append(Unit((f"model.layers.{number}.mlp.down_proj",), options))
    return units


def total(units: list[Unit], places: tuple[int, ...]) -> tuple[float, float]:
    chosen = [unit.options[place] for unit, place in zip(units, places, strict=True)]
    return sum(o.bytes for o in chosen), sum(o.loss for o in chosen)


@given(some_units(), st.floats(0.25, 1.0))
def test_an_assignment_fits_and_loses_little_more_than_the_best(units: list[Unit], share: float) -> None:
    every = [total(units, places) for places in itertools.product(range(3), repeat=len(units))]
    largest = share * sum(unit.options[0].bytes for unit in units)
    recipe, size, loss = assign(units, largest=largest)
    best = min(lost for bytes_, lost in every if bytes_ <= largest)
    assert size <= largest
    assert (size, loss) == pytest.approx(_told(units, recipe.of))
    # The last step overshoots by one unit at most: what it costs bounds the distance.
    assert loss <= best + max(max(o.loss for o in unit.options) for unit in units) + 1e-9


@given(some_units(), st.floats(0.0, 2.0))
def test_a_bound_on_the_loss_holds(units: list[Unit], most: float) -> None:
    recipe, size, loss = assign(units, most_loss=most)
    assert loss <= most + 1e-9
    assert (size, loss) == pytest.approx(_told(units, recipe.of))
    if most >= sum(max(o.loss for o in unit.options) for unit in units):
        assert size == min(total(units, places)[0] for places in itertools.product(range(3), repeat=len(units)))


def _told(units: list[Unit], of: object) -> tuple[float, float]:
    places = []
    for unit in units:
        precision = of(unit.names[0])  # type: ignore[operator]
        places.append(next(i for i, option in enumerate(unit.options) if option.precision == precision))
    return total(units, tuple(places))


def test_what_cannot_fit_is_said() -> None:
    units = [Unit(("lm_head",), (Option(None, 100.0, 0.0), Option(INT8, 50.0, 0.1)))]
    with pytest.raises(ValueError, match="take 50 bytes at least, but may take 49"):
        assign(units, largest=49)


def test_fewer_bits_lose_more_and_the_model_stays_as_it_was() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    windows = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    units = sensitivities(model, windows, [INT8, INT4], 16)
    assert [len(unit.names) for unit in units] == [3, 1, 2, 1] * 4
    for unit in units:
        _, eight, four = unit.options
        assert 0 < eight.loss < four.loss / 20
        assert isinstance(four.precision, Scheme)
        assert eight.bytes == pytest.approx(four.bytes * 8 / four.precision.bits_per_weight)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
