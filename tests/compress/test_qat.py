"""Quantization-aware training on the demo model, a few steps of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.model import DEMO_MODEL, ModelFiles, open_model
from cluster.schemes import parse_recipe
from compress import qat
from compress.distill import Mixture
from compress.qat import Tuning, control, linears, load, simulate, tune
from compress.quantize import Plan, quantize
from workers.checkpoint import Checkpoint
from workers.quantization.stored import read_linear

PLAN = Tuning(steps=6, batch_tokens=256, micro_tokens=256, context=64)
ROWS = torch.randint(0, 4096, (4, 65), generator=torch.Generator().manual_seed(0))
"""One fixed random text: to be learnt by heart."""
DEMO = open_model(str(DEMO_MODEL))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Rounded with ranges that are not those of the largest weights."""
    out = tmp_path_factory.mktemp("qat") / "int4"
    quantize(DEMO, Plan(parse_recipe("layers.3: int8-asym, rest: int4-g64"), "rtn", "mse"), ROWS[:0], out).finish()
    return open_model(str(out))


def expanded(files: ModelFiles) -> PreTrainedModel:
    """transformers' model with the weights that the files have."""
    model, checkpoint = load(DEMO).eval(), Checkpoint(files.path)
    for name, linear in linears(model):
        assert files.quantization is not None
        shape = linear.out_features, linear.in_features
        linear.weight.data = read_linear(checkpoint, files.quantization, name, *shape).dequantized()
    return model


@torch.inference_mode()
def told(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=ROWS[:, :64], use_cache=False).logits
    return logits.log_softmax(-1)


def kl(model: PreTrainedModel) -> float:
    wanted = told(load(DEMO).eval())
    return float(nn.functional.kl_div(told(model), wanted, log_target=True, reduction="none").sum(-1).mean())


def test_it_begins_as_what_calibration_made(calibrated: ModelFiles) -> None:
    student, before = load(DEMO).eval(), load(DEMO).state_dict()
    simulate(student, calibrated)
    assert torch.equal(told(student), told(expanded(calibrated)))
    trained = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    assert trained.keys() == {f"{name}.{qat.ORIGINAL}" for name, _ in linears(student)}
    for name, weight in trained.items():
        moved = weight != before[name.replace(qat.ORIGINAL, "weight")]
        assert moved.float().mean() < 0.1, "most weights are where they were"


def test_training_takes_back_some_of_what_rounding_lost(calibrated: ModelFiles, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    tune(DEMO, calibrated, PLAN, ROWS, out, checkpoint=tmp_path / "checkpoint.pt")
    tuned = open_model(str(out))
    assert tuned.quantization == calibrated.quantization
    assert kl(expanded(tuned)) < 0.8 * kl(expanded(calibrated))
    written, before = load_file(out / "model.safetensors"), load_file(calibrated.path / "model.safetensors")
    assert written.keys() == before.keys()
    changed = {name for name, x in written.items() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if name.endswith((".weight_packed", "3.mlp.down_proj.weight"))} | {
        name for name in before if name.startswith("model.layers.3.") and name.endswith("_proj.weight")
    }
    assert not (tmp_path / "checkpoint.pt").exists()


def test_dynamic_activations_are_rounded_too(tmp_path: Path) -> None:
    found = []
    for scheme in ("int4-g64", "int4-g64-dynamic"):
        quantize(DEMO, Plan(parse_recipe(scheme), "rtn", "minmax"), ROWS[:0], tmp_path / scheme).finish()
        student = load(DEMO).eval()
        simulate(student, open_model(str(tmp_path / scheme)))
        found.append(told(student))
    assert 1e-3 < (found[0] - found[1]).abs().max() < 2


def test_the_control_hardly_moves(tmp_path: Path) -> None:
    made = control(DEMO, PLAN, ROWS, tmp_path / "control")
    assert made.shape == DEMO.shape
    model = load(made).eval()
    assert 0 < kl(model) < 1e-3
    assert torch.equal(model.get_input_embeddings().weight, load(DEMO).get_input_embeddings().weight)


def test_a_run_goes_on_where_it_stopped(calibrated: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(DEMO, calibrated, PLAN, ROWS, tmp_path / "whole", checkpoint=tmp_path / "other.pt")
    often, taken = replace(PLAN, save_minutes=0.0), Mixture.batch

    def interrupted(self: Mixture, first: int, rows: int, length: int) -> Tensor:
        if first >= 12:
            raise KeyboardInterrupt
        return taken(self, first, rows, length)

    monkeypatch.setattr(Mixture, "batch", interrupted)
    again = {"checkpoint": tmp_path / "checkpoint.pt", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        tune(DEMO, calibrated, often, ROWS, tmp_path / "resumed", **again)  # type: ignore[arg-type]
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(Mixture, "batch", taken)
    tune(DEMO, calibrated, often, ROWS, tmp_path / "resumed", **again)  # type: ignore[arg-type]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())


def test_a_model_without_quantized_linears_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is quantized"):
        simulate(load(DEMO), DEMO)
