"""Quantization-aware training: a model learns to live with its rounded weights (Jacob et al. 2018).

It begins where calibration ended, each weight in the middle of what rounds to the integer that calibration chose for it, so that
another integer takes many gradients that agree. (Where weights were before they were rounded is often at the edge: the first steps,
whatever they are, then undo what calibration gained.) Trained are weights, scales and all that is not quantized (see simulated.py).
The loss is the KL from the full-precision model, so that the text at hand teaches nothing else.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.model import ModelFiles, open_model
from compress.distill import Mixture, against, copy_beside
from compress.parts import write_tensors
from compress.simulated import Trained, load, simulate
from compress.training import Plan, Trainer
from workers.device import torch_dtype


@dataclass(frozen=True)
class Tuning(Plan):
    """How to train: short, from weights that are good already, by AdamW."""

    minutes: float | None = None
    steps: int | None = 150
    batch_tokens: int = 4096
    context: int = 256
    long_share: float = 0.0
    warm_up: float = 0.1
    matrix_rate: float = 0.03
    """Of quantized weights, in steps from one integer to the next."""
    scale_rate: float = 2e-3
    """Of their scales, relative to themselves."""
    vector_rate: float = 2e-3
    """Of what is not quantized, relative to each tensor's root mean square."""
    decay: float = 0.0
    compiled: bool = False


def tune(
    files: ModelFiles, calibrated: ModelFiles, plan: Tuning, rows: Tensor, out: Path, *, checkpoint: Path, resume: bool = False
) -> None:
    """Train `calibrated`, which was made of `files`, on `rows` [n, length] of token ids, and write it to the directory `out`.

    checkpoint: a file to go on from with `resume`; it is gone at the end. In memory are the model twice in fp32, gradients and two
    moments. Raises ValueError where nothing is quantized.
    """
    trained = simulate(load(files), calibrated)
    train(files, trained, plan, rows, checkpoint, resume=resume)
    made = trained.written(torch_dtype(files.shape.dtype))
    shutil.copytree(calibrated.path, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted(calibrated.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as old:
            tensors = {name: made.get(name, old.get_tensor(name)) for name in old.keys()}  # noqa: SIM118
        write_tensors(tensors, out / file.name)
    checkpoint.unlink(missing_ok=True)


def control(files: ModelFiles, calibrated: ModelFiles, plan: Tuning, rows: Tensor, out: Path) -> ModelFiles:
    """The same training of the same things without any rounding, to compare with: what comes of it is written in fp32."""
    trained = simulate(load(files), calibrated, rounding=False)
    train(files, trained, plan, rows, None)
    out.mkdir(parents=True)
    write_tensors(trained.expanded(), out / "model.safetensors")
    shutil.copyfile(files.path / "config.json", out / "config.json")
    copy_beside(files.path, out)
    return open_model(str(out))


def train(
    files: ModelFiles, trained: Trained, plan: Tuning, rows: Tensor, checkpoint: Path | None, *, resume: bool = False
) -> None:
    """Let it say what `files` says."""
    torch.manual_seed(plan.seed)
    groups = [
        {"params": trained.weights(), "lr": plan.matrix_rate},
        {"params": trained.scales(), "lr": plan.scale_rate},
        *({"params": [x], "lr": plan.vector_rate * float(x.detach().square().mean().sqrt())} for x in trained.rest()),
    ]
    # Gradients are smaller the larger a model is, and no part of it is to be held back for that.
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=plan.decay, eps=1e-15)
    text = Mixture(rows.flatten(), torch.empty(0, 1), 0.0)
    trainer = Trainer(plan, text, trained.model, against(load(files).eval()), [optimizer])
    if resume and checkpoint is not None and checkpoint.exists():
        trainer.resume(checkpoint)
    trainer.run(lambda: trainer.save(checkpoint) if checkpoint is not None else None)
