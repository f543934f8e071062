"""What is measured of a model, against transformers and against itself."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cluster.config import ConfigError
from compress import evaluate as module
from compress.evaluate import Comparison, Evaluation, Figure, evaluate, size_of
from tests.workers.models import TinyModel, make_model, prompt

ROWS = torch.tensor([prompt(40, seed) for seed in range(6)])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModel, TinyModel]:
    """Two of one vocabulary: the second's weights are the first's with some noise."""
    folder = tmp_path_factory.mktemp("evaluate")
    model, other = make_model(folder / "base", "llama"), make_model(folder / "model", "llama")
    with torch.no_grad():
        for parameter in other.oracle.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    other.oracle.save_pretrained(other.path)
    return model, other


def test_figures_are_those_of_transformers(models: tuple[TinyModel, TinyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 7)  # so that a row's logits come in pieces
    base, model = models
    found = evaluate(str(model.path), str(base.path), ROWS, dtype="float32", threads=1)
    before, after = (
        torch.stack([one.oracle_logits(row.tolist())[:-1] for row in ROWS]).double().log_softmax(-1) for one in (base, model)
    )
    nats = -after.gather(2, ROWS[:, 1:, None]).mean()
    assert found.tokens == 6 * 39
    assert found.perplexity.value == pytest.approx(float(nats.exp()), rel=1e-4)
    assert found.base_perplexity is not None
    assert found.base_perplexity.value == pytest.approx(float((-before.gather(2, ROWS[:, 1:, None]).mean()).exp()), rel=1e-4)
    assert found.divergence is not None
    assert found.divergence.value == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).double().mean()))
    assert found.parameters == base.oracle.num_parameters()
    assert found.bytes == size_of(model.path) == (model.path / "model.safetensors").stat().st_size
    assert found.gigabytes_per_billion == pytest.approx(4, rel=0.1)


def test_a_model_is_no_way_from_itself(models: tuple[TinyModel, TinyModel]) -> None:
    base = str(models[0].path)
    found = evaluate(base, base, ROWS, dtype="float32", threads=1)
    assert found.divergence is not None
    assert found.agreement is not None
    assert (found.divergence.value, found.agreement.value) == (0.0, 1.0)
    assert found.perplexity == found.base_perplexity
    alone = evaluate(base, None, ROWS, dtype="float32", threads=1)
    assert (alone.perplexity, alone.divergence) == (found.perplexity, None)
    assert "divergence" not in str(alone)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    drawn = np.random.default_rng(1).exponential(2.0, (400, 50))
    figures = [module._figure(row) for row in drawn]
    held = np.mean([figure.low <= 2.0 <= figure.high for figure in figures])
    assert 0.88 < held < 0.98
    width = np.mean([figure.high - figure.low for figure in figures])
    assert width == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(50), rel=0.1)


def of_rows(divergences: NDArray[np.float64]) -> Evaluation:
    nothing = Figure(0.0, 0.0, 0.0)
    found = module._figure(divergences)
    return Evaluation(100, nothing, 1, 1, nothing, found, nothing, tuple(divergences.tolist()))


def test_models_are_compared_row_by_row() -> None:
    """Rows differ far more than models do, whose own intervals overlap."""
    rows = np.random.default_rng(1).exponential(0.01, 50) + 0.001
    base, less, by_a_tenth = of_rows(rows), of_rows(rows - 0.0001), of_rows(0.9 * rows)
    for first in (less, by_a_tenth):
        assert first.divergence is not None
        assert base.divergence is not None
        assert first.divergence.high > base.divergence.low
    difference, ratio = Comparison.of(less, base).difference, Comparison.of(by_a_tenth, base).ratio
    assert [difference.value, difference.low, difference.high] == pytest.approx([-0.0001] * 3)
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([0.9] * 3)


def test_intervals_of_ratios_hold_the_ratio_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    held = []
    for _ in range(400):
        hard = generator.exponential(1.0, 50)
        ratio = Comparison.of(of_rows(hard * generator.uniform(0.6, 1.0, 50)), of_rows(hard)).ratio
        held.append(ratio.low <= 0.8 <= ratio.high)
    assert 0.88 < np.mean(held) < 0.98


def test_a_perplexity_beyond_all_floats_is_infinite() -> None:
    assert math.isinf(module._exp(module.Figure(800.0, 3.0, 900.0)).value)


def test_what_cannot_be_compared_is_said(models: tuple[TinyModel, TinyModel], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", vocab_size=99)
    with pytest.raises(ConfigError, match="vocabularies"):
        evaluate(str(models[0].path), str(other.path), ROWS)
    with pytest.raises(ConfigError, match="too few"):
        evaluate(str(models[0].path), None, ROWS[:1])
    alone = Evaluation(1, Figure(0, 0, 0), 1, 1)
    with pytest.raises(ValueError, match="same rows"):
        Comparison.of(alone, alone)
