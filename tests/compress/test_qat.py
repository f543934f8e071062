"""Quantization-aware training on the demo model, a few steps of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster.model import DEMO_MODEL, ModelFiles, open_model
from cluster.schemes import parse_recipe
from compress.distill import Mixture
from compress.qat import Tuning, control, tune
from compress.quantize import Plan, quantize
from compress.simulated import linears, load, simulate
from tests import threads
from workers.checkpoint import Checkpoint
from workers.quantization.stored import read_linear

PLAN = Tuning(steps=6, batch_tokens=128, micro_tokens=128, context=64)
ROWS = torch.randint(0, 4096, (4, 65), generator=torch.Generator().manual_seed(0))
"""One fixed random text: to be learnt by heart."""
DEMO = open_model(str(DEMO_MODEL))


one_thread = pytest.fixture(scope="module", autouse=True)(threads.one_thread)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Rounded with ranges that are not those of the largest weights."""
    out = tmp_path_factory.mktemp("qat") / "int4"
    quantize(DEMO, Plan(parse_recipe("layers.3: int8-asym, rest: int4-g64"), "rtn", "mse"), ROWS[:0], out).finish()
    return open_model(str(out))


def expanded(files: ModelFiles) -> PreTrainedModel:
    """transformers' model with the weights that the files have."""
    model, checkpoint = load(DEMO).eval(), Checkpoint(files.path)
    modules = dict(linears(model))
    for name, tensor in model.named_parameters():
        linear = modules.get(name.removesuffix(".weight"))
        if linear is None:
            tensor.data = checkpoint.peek(name).float()
            continue
        assert files.quantization is not None
        shape = linear.out_features, linear.in_features
        linear.weight.data = read_linear(checkpoint, files.quantization, name.removesuffix(".weight"), *shape).dequantized()
    return model


@torch.inference_mode()
def told(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=ROWS[:, :64], use_cache=False).logits
    return logits.log_softmax(-1)


def kl(model: PreTrainedModel) -> float:
    wanted = told(load(DEMO).eval())
    return float(nn.functional.kl_div(told(model), wanted, log_target=True, reduction="none").sum(-1).mean())


def test_it_begins_as_what_calibration_made(calibrated: ModelFiles) -> None:
    student = load(DEMO).eval()
    trained = simulate(student, calibrated)
    assert torch.equal(told(student), told(expanded(calibrated)))
    assert trained.quantized.keys() == {name for name, _ in linears(student)}
    of_all = {id(x) for x in [*trained.weights(), *trained.scales(), *trained.rest()]}
    assert of_all == {id(x) for x in student.parameters()}, "nothing is left out, and the embedding is the head still"
    written, before = trained.written(torch.bfloat16), load_file(calibrated.path / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in written.items())


def test_what_is_written_is_what_was_trained(calibrated: ModelFiles, tmp_path: Path) -> None:
    """After steps as large as it takes to change everything, to the bit."""
    student = load(DEMO).eval()
    trained = simulate(student, calibrated)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (trained.weights(), trained.scales(), trained.rest()):
            for x in part:
                x.add_(torch.randn(x.shape, generator=noise) * (0.05 * x.abs().mean() + 0.01))
    written = trained.written(torch.bfloat16)
    before = load_file(calibrated.path / "model.safetensors")
    assert {name for name, x in written.items() if torch.equal(x, before[name])} == {
        name for name in before if name.endswith(("weight_shape", "weight_zero_point"))
    }
    shutil.copytree(calibrated.path, tmp_path / "written")
    save_file(written, tmp_path / "written" / "model.safetensors")
    assert torch.equal(told(student), told(expanded(open_model(str(tmp_path / "written")))))


def test_gradients_pass_rounding_but_not_the_ends_of_the_range(calibrated: ModelFiles) -> None:
    student = load(DEMO)
    trained = simulate(student, calibrated)
    simulation = next(iter(trained.quantized.values()))
    steps = trained.weights()[0]
    with torch.no_grad():
        steps[0, :4] = torch.tensor([2.3, -3.9, 7.6, -8.6])
    weight = simulation(steps)
    weight.backward(torch.ones_like(weight))
    scale = simulation.quantized(steps).scale
    assert torch.equal(weight[0, :4], torch.tensor([2.0, -4.0, 7.0, -8.0]) * scale[0, 0])
    assert steps.grad is not None
    assert torch.equal(steps.grad[0, :4], torch.tensor([1.0, 1.0, 0.0, 0.0]) * scale[0, 0])
    assert simulation.growth.grad is not None
    of_groups = simulation.quantized(steps).dequantized().view(len(scale), -1, 64).sum(2)
    assert torch.allclose(simulation.growth.grad, of_groups, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("scheme", ["fp8", "int8-tensor", "int4-asym-g64"])
def test_other_schemes_begin_as_calibrated_too(scheme: str, tmp_path: Path) -> None:
    quantize(DEMO, Plan(parse_recipe(scheme), "rtn", "minmax"), ROWS[:0], tmp_path / "rounded").finish()
    before = load_file(tmp_path / "rounded" / "model.safetensors")
    trained = simulate(load(DEMO), open_model(str(tmp_path / "rounded")))
    written = trained.written(torch.bfloat16)
    assert all(torch.equal(x.float(), written[name].float()) for name, x in before.items())


def test_training_takes_back_some_of_what_rounding_lost(calibrated: ModelFiles, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    tune(DEMO, calibrated, PLAN, ROWS, out, checkpoint=tmp_path / "checkpoint.pt")
    tuned = open_model(str(out))
    assert tuned.quantization == calibrated.quantization
    assert kl(expanded(tuned)) < 0.8 * kl(expanded(calibrated))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_dynamic_activations_are_rounded_too(tmp_path: Path) -> None:
    found = []
    for scheme in ("int4-g64", "int4-g64-dynamic"):
        quantize(DEMO, Plan(parse_recipe(scheme), "rtn", "minmax"), ROWS[:0], tmp_path / scheme).finish()
        student = load(DEMO).eval()
        simulate(student, open_model(str(tmp_path / scheme)))
        found.append(told(student))
    assert 1e-3 < (found[0] - found[1]).abs().max() < 2


def test_the_control_hardly_moves(calibrated: ModelFiles, tmp_path: Path) -> None:
    slow = replace(PLAN, matrix_rate=1e-4, scale_rate=1e-5, vector_rate=1e-5)
    made = control(DEMO, calibrated, slow, ROWS, tmp_path / "control")
    assert made.shape == DEMO.shape
    model = load(made).eval()
    assert 0 < kl(model) < 1e-3


def test_a_run_goes_on_where_it_stopped(calibrated: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(DEMO, calibrated, PLAN, ROWS, tmp_path / "whole", checkpoint=tmp_path / "other.pt")
    often, taken = replace(PLAN, save_minutes=0.0), Mixture.batch

    def interrupted(self: Mixture, first: int, rows: int, length: int) -> Tensor:
        if first >= 6:
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
