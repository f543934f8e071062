"""`rayline quantize`: make a model of fewer bits, measure what was lost, and keep it if that is little enough."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.config import ConfigError
from cluster.model import ModelFiles, open_model
from cluster.schemes import Recipe, parse_precision
from compress.calibration import calibration_text, held_out_text, rows_of
from compress.evaluate import Evaluation, evaluate
from compress.mixed import DEFAULT, search
from compress.parts import Parts, refuse_taken
from compress.qat import Tuning, tune
from compress.quantize import Plan, digest, quantize, refuse_quantized

MAX_LOSS = 0.1
"""Nats per token of KL(base || model) that are taken for a model that is broken."""
MEASURED = 64
"""Rows to measure on."""
MOST_ROWS = 4096
"""Rows to train on."""
FIGURES = "quantization.json"

log = logging.getLogger(__name__)


def make(
    files: ModelFiles,
    plan: Plan,
    out: Path,
    *,
    text: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    samples: int = 128,
    context: int = 512,
    target_bytes: int | None = None,
    tuning: Tuning | None = None,
    max_loss: float = MAX_LOSS,
    measure: bool = True,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Evaluation | None:
    """Write the model to `out`, with the figures beside it; None where it is not measured.

    text, held_out: files or folders for calibration and measurement. Without held_out rows of `text` are kept for it, without
    either the bundled sample serves both, in different files. Where the plan's recipe is empty one is searched: for target_bytes of
    tensors, else for max_loss. tuning: training after calibration, on more of the text. max_loss: a model further from the base is
    refused, unless `force`. Raises ConfigError; what was made by then can be gone on with by `resume`.
    """
    refuse_taken(out)  # before the long search
    if not plan.recipe.rules:
        refuse_quantized(files)
    length = min(context, files.shape.max_position_embeddings)
    kept = MEASURED if text and not held_out else 0
    more = 0 if tuning is None else MOST_ROWS
    rows = rows_of(files, calibration_text(text), max(samples, more) + kept, length)
    if kept:
        kept = min(kept, len(rows) // 2)
        rows, measured = rows[: len(rows) - kept], rows[len(rows) - kept :]
    else:
        measured = rows_of(files, held_out_text(held_out), MEASURED, length) if measure else rows
    if not len(rows) or (measure and len(measured) < 2):
        raise ConfigError(f"the text is too short: for calibration and measurement 4 rows of {length} tokens are the least")
    if not plan.recipe.rules:
        plan = replace(plan, recipe=_searched(files, rows[:samples], target_bytes, max_loss))
    parts = quantize(files, plan, rows[:samples], out, resume=resume, progress=progress)
    if tuning is not None:
        _tune(files, parts, tuning, rows, resume=resume)
    found = None
    if measure:
        found = evaluate(str(parts.model), str(files.path), measured, threads=torch.get_num_threads(), progress=progress)
        assert found.divergence is not None
        if not (found.divergence.value <= max_loss or force):
            raise ConfigError(
                f"{out} would be {found.divergence.value:.3g} nats per token from {files.path}, which is more than {max_loss:g} "
                f"(--max-loss); it is kept in {parts.model}, and --resume --force takes it"
            )
        figures: dict[str, Any] = {"scheme": str(plan.recipe), "method": plan.method or "auto", "range": plan.ranging or "auto"}
        figures |= {} if tuning is None else {"training": asdict(tuning)}
        (parts.model / FIGURES).write_text(json.dumps(figures | found.as_dict(), indent=1) + "\n", encoding="utf-8")
    parts.finish()
    return found


def _searched(files: ModelFiles, rows: Tensor, target_bytes: int | None, max_loss: float) -> Recipe:
    precisions = [parse_precision(name) for name in DEFAULT]
    most_loss = max_loss if target_bytes is None else None
    recipe, size, loss = search(files, rows, precisions, target_bytes=target_bytes, most_loss=most_loss)
    log.info("%.1f MB, expected to lose %.4f nats per token: %s", size / 1e6, loss, recipe)
    if not recipe.rules:
        raise ConfigError("nothing can be quantized within these bounds; allow a larger --max-loss or another --target-size")
    return recipe


def _tune(files: ModelFiles, parts: Parts, tuning: Tuning, rows: Tensor, *, resume: bool) -> None:
    """Put the tuned model in the place of the calibrated one. What was tuned before, by the same settings, is taken."""
    settings = asdict(tuning) | {"text": digest(rows)}
    parts.settle("tuning.json", {f"training {name}": value for name, value in settings.items()})
    tuned, made = parts.folder / "tuned", parts.folder / "tuning"
    if not tuned.exists():
        shutil.rmtree(made, ignore_errors=True)
        tune(files, open_model(str(parts.model)), tuning, rows, made, checkpoint=parts.folder / "tuning.pt", resume=resume)
        made.rename(tuned)
    shutil.rmtree(parts.model)
    shutil.copytree(tuned, parts.model)
