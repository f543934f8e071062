"""Quantization-aware training: a model learns to live with its rounded weights (Jacob et al. 2018).

In the forward pass each linear's weight is what quantizing and expanding it again gives (and its input too, where activations will
be quantized); backwards, rounding counts as the identity (straight-through estimator, Bengio et al. 2013). The loss is the KL from
the full-precision model, so that the text at hand teaches nothing else.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.model import ModelFiles, open_model
from cluster.schemes import Recipe, Scheme
from compress.distill import Mixture, against, copy_tokenizer
from compress.gptq import round_to_nearest
from compress.training import Batches, Plan, Trainer
from workers.device import torch_dtype
from workers.quantization.activations import requantized


@dataclass(frozen=True)
class Tuning(Plan):
    """How to train: short, and with small steps, from weights that are good already."""

    batch_tokens: int = 4096
    context: int = 256
    long_share: float = 0.0
    warm_up: float = 0.1
    matrix_rate: float = 1e-3
    vector_rate: float = 1e-4
    decay: float = 0.0


class FakeQuantize(nn.Module):
    """A weight [out_features, in_features] as it will be when it is quantized; gradients pass as if nothing were done."""

    def __init__(self, scheme: Scheme, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.scale_dtype = scheme, scale_dtype

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            change = round_to_nearest(weight, self.scheme, "minmax", self.scale_dtype).dequantized() - weight
        return weight + change


def tuned(files: ModelFiles, recipe: Recipe, plan: Tuning, rows: Tensor, folder: Path, *, resume: bool = False) -> ModelFiles:
    """Train on `rows` [n, length] of token ids and write the model to folder/tuned; what is there already is taken, with `resume`.
    In memory are the model twice in fp32, gradients and momentum. Raises ValueError."""
    made = folder / "tuned"
    if not (resume and (made / "model.safetensors").exists()):
        folder.mkdir(parents=True, exist_ok=True)
        text = Mixture(rows.flatten(), torch.empty(0, 1), 0.0)
        export(train(files, recipe, plan, text, folder / "checkpoint.pt", resume=resume), files, made)
    return open_model(str(made))


def simulate(model: PreTrainedModel, recipe: Recipe, scale_dtype: torch.dtype) -> int:
    """Let the linears of `model` that the recipe quantizes compute as if they were; how many there are. Raises ValueError where
    there are none."""
    count = 0
    for name, linear in linears(model):
        scheme = recipe.of(name)
        if not isinstance(scheme, Scheme):
            continue
        parametrize.register_parametrization(linear, "weight", FakeQuantize(scheme, scale_dtype), unsafe=True)
        if scheme.dynamic:
            linear.register_forward_pre_hook(_rounding(scheme))
        count += 1
    if not count:
        raise ValueError(f"the recipe '{recipe}' quantizes no linear of the model")
    return count


def linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """By their names in the checkpoint, without an lm_head that is the embedding."""
    tied = bool(model.config.tie_word_embeddings)
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return [(name, part) for name, part in found if not (tied and name == "lm_head")]


def train(
    files: ModelFiles, recipe: Recipe, plan: Tuning, rows: Batches, checkpoint: Path | None = None, *, resume: bool = False
) -> PreTrainedModel:
    """A model of plain fp32 weights, tuned so that quantizing them by `recipe` costs little. checkpoint: a file to go on from with
    `resume`, gone at the end."""
    torch.manual_seed(plan.seed)
    teacher = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    if recipe.rules:  # none: the control, which trains as long without rounding
        simulate(student, recipe, torch_dtype(files.shape.dtype))
    student.get_input_embeddings().requires_grad_(False)
    trainer = Trainer(plan, rows, student, against(teacher))
    if resume and checkpoint is not None and checkpoint.exists():
        trainer.resume(checkpoint)
    trainer.run(lambda: trainer.save(checkpoint) if checkpoint is not None else None)
    for _, linear in linears(student):
        if parametrize.is_parametrized(linear):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        linear._forward_pre_hooks.clear()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    trained: PreTrainedModel = student.eval()
    return trained


def export(student: PreTrainedModel, files: ModelFiles, folder: Path) -> None:
    """As a model directory that differs from the original in its weights only: linears in fp32, to be quantized, the rest in its
    own dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = {f"{name}.weight" for name, _ in linears(student)}
    dtype = torch_dtype(files.shape.dtype)
    tied = files.shape.tied_embeddings
    state = {name: x for name, x in student.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(
        {name: x if name in wide else x.to(dtype) for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for name in ("config.json", "generation_config.json"):
        if (files.path / name).exists():
            shutil.copyfile(files.path / name, folder / name)
    copy_tokenizer(files.path, folder)


def _rounding(scheme: Scheme) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    def rounded(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        with torch.no_grad():
            change = requantized(x.flatten(0, -2), scheme.kind).view_as(x) - x
        return x + change

    return rounded
