"""Quantization-aware training: a model learns to live with its rounded weights (Jacob et al. 2018).

It begins where calibration ended: with that one's scales and zero-points, and each weight where it was before, or as near as the
integer that calibration chose for it allows. In the forward pass each weight is what rounding and expanding it gives (so is each
input, where activations will be quantized); backwards, rounding counts as the identity (straight-through estimator, Bengio et al.
2013). The loss is the KL from the full-precision model, so that the text at hand teaches nothing else.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.model import ModelFiles, open_model
from cluster.schemes import Kind
from compress.distill import Mixture, against, copy_tokenizer
from compress.parts import write_tensors
from compress.training import Batches, Plan, Trainer
from workers.checkpoint import Checkpoint
from workers.device import torch_dtype
from workers.quantization.activations import requantized
from workers.quantization.stored import read_linear
from workers.quantization.weight import QuantizedWeight, rounded
from workers.quantization.written import tensors_of

ORIGINAL = "parametrizations.weight.original"
_INSIDE = 0.49
"""Of a step: how far from its integer a weight may begin."""


@dataclass(frozen=True)
class Tuning(Plan):
    """How to train: short, and with small steps, from weights that are good already."""

    minutes: float | None = None
    steps: int | None = 300
    batch_tokens: int = 4096
    context: int = 256
    long_share: float = 0.0
    warm_up: float = 0.1
    matrix_rate: float = 1e-3
    vector_rate: float = 1e-4
    decay: float = 0.0
    compiled: bool = False


class FakeQuantize(nn.Module):
    """A weight [out_features, in_features] rounded with given scales; gradients pass as if nothing were done."""

    def __init__(self, kept: QuantizedWeight) -> None:
        super().__init__()
        self._kept = kept

    def begin(self, weight: Tensor) -> Tensor:
        """Of all weights that are rounded to what `kept` has, the nearest to `weight`."""
        reach = _INSIDE * self._kept.scale.repeat_interleave(self._kept.group_size, dim=1)
        center = self._kept.dequantized()
        return torch.clamp(weight, center - reach, center + reach)

    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """What will be written."""
        kept = self._kept
        return QuantizedWeight(kept.scheme, rounded(weight, kept.scheme, kept.scale, kept.zero_point), kept.scale, kept.zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            change = self.quantized(weight).dequantized() - weight
        return weight + change


def tune(
    files: ModelFiles, calibrated: ModelFiles, plan: Tuning, rows: Tensor, out: Path, *, checkpoint: Path, resume: bool = False
) -> None:
    """Train the quantized linears of `calibrated`, which was made of `files`, on `rows` [n, length] of token ids, and write them,
    with all else as it is there, to the directory `out`.

    checkpoint: a file to go on from with `resume`; it is gone at the end. In memory are the model twice in fp32, gradients and
    momentum. Raises ValueError where nothing is quantized.
    """
    student = load(files)
    simulations = simulate(student, calibrated)
    train(files, student, plan, _text(rows), checkpoint, resume=resume)
    weights, made = student.state_dict(), dict[str, Tensor]()
    for name, simulation in simulations.items():
        made |= tensors_of(name, simulation.quantized(weights[f"{name}.{ORIGINAL}"]), torch_dtype(files.shape.dtype))
    shutil.copytree(calibrated.path, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted(calibrated.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as old:
            tensors = {name: made.get(name, old.get_tensor(name)) for name in old.keys()}  # noqa: SIM118
        write_tensors(tensors, out / file.name)
    checkpoint.unlink(missing_ok=True)


def control(files: ModelFiles, plan: Tuning, rows: Tensor, out: Path) -> ModelFiles:
    """The same training without any rounding, to compare with: what comes of it is written in fp32."""
    student = load(files)
    student.requires_grad_(False)
    for _, linear in linears(student):
        linear.weight.requires_grad_(True)
    train(files, student, plan, _text(rows), None)
    out.mkdir(parents=True)
    tied = files.shape.tied_embeddings
    state = {name: x.contiguous() for name, x in student.state_dict().items() if not (tied and name == "lm_head.weight")}
    write_tensors(state, out / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        if (files.path / name).exists():
            shutil.copyfile(files.path / name, out / name)
    copy_tokenizer(files.path, out)
    return open_model(str(out))


def load(files: ModelFiles) -> PreTrainedModel:
    """transformers' model in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    return model


def simulate(model: PreTrainedModel, calibrated: ModelFiles) -> dict[str, FakeQuantize]:
    """Let the linears of `model` that are quantized in `calibrated` compute as those do, and train them and nothing else; by their
    names what does it. The weights that are trained are then named ORIGINAL. Raises ValueError where there are none."""
    model.requires_grad_(False)
    checkpoint, quantization = Checkpoint(calibrated.path), calibrated.quantization
    if quantization is None:
        raise ValueError(f"nothing is quantized in {calibrated.path}")
    simulations = {}
    for name, linear in linears(model):
        scheme = quantization.scheme_of(name)
        if scheme is None:
            continue
        simulations[name] = simulation = FakeQuantize(
            read_linear(checkpoint, quantization, name, linear.out_features, linear.in_features)
        )
        linear.weight.data = simulation.begin(linear.weight.data)
        linear.weight.requires_grad_(True)
        parametrize.register_parametrization(linear, "weight", simulation, unsafe=True)
        if scheme.dynamic:
            linear.register_forward_pre_hook(_rounding(scheme.kind))
    return simulations


def linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """By their names in the checkpoint, without an lm_head that is the embedding."""
    tied = bool(model.config.tie_word_embeddings)
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return [(name, part) for name, part in found if not (tied and name == "lm_head")]


def train(
    files: ModelFiles, student: PreTrainedModel, plan: Tuning, rows: Batches, checkpoint: Path | None, *, resume: bool = False
) -> None:
    """Train what of `student` takes gradients to say what `files` says."""
    torch.manual_seed(plan.seed)
    trainer = Trainer(plan, rows, student, against(load(files).eval()))
    if resume and checkpoint is not None and checkpoint.exists():
        trainer.resume(checkpoint)
    trainer.run(lambda: trainer.save(checkpoint) if checkpoint is not None else None)


def _text(rows: Tensor) -> Mixture:
    return Mixture(rows.flatten(), torch.empty(0, 1), 0.0)


def _rounding(kind: Kind) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    def rounding(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        with torch.no_grad():
            change = requantized(x.flatten(0, -2), kind).view_as(x) - x
        return x + change

    return rounding
