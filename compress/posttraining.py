"""`rayline quantize`: make a model of fewer bits, measure what was lost, and keep it if that is little enough."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.config import ConfigError
from cluster.model import ModelFiles
from compress.calibration import calibration_text, held_out_text, rows_of
from compress.evaluate import Evaluation, evaluate
from compress.quantize import Plan, quantize

MAX_LOSS = 0.1
"""Nats per token of KL(base || model) that are taken for a model that is broken."""
MEASURED = 64
"""Rows to measure on."""
FIGURES = "quantization.json"


def make(
    files: ModelFiles,
    plan: Plan,
    out: Path,
    *,
    text: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    samples: int = 128,
    context: int = 512,
    max_loss: float = MAX_LOSS,
    measure: bool = True,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Evaluation | None:
    """Write the model to `out`, with the figures beside it; None where it is not measured.

    text, held_out: files or folders for calibration and measurement. Without held_out rows of `text` are kept for it, without
    either the bundled sample serves both, in different files. max_loss: a model further from the base is refused, unless `force`.
    Raises ConfigError; what was made by then can be gone on with by `resume`.
    """
    length = min(context, files.shape.max_position_embeddings)
    kept = MEASURED if text and not held_out else 0
    rows = rows_of(files, calibration_text(text), samples + kept, length)
    if kept:
        kept = min(kept, len(rows) // 2)
        rows, measured = rows[: len(rows) - kept], rows[len(rows) - kept :]
    else:
        measured = rows_of(files, held_out_text(held_out), MEASURED, length) if measure else rows
    if not len(rows) or (measure and len(measured) < 2):
        raise ConfigError(f"the text is too short: for calibration and measurement 4 rows of {length} tokens are the least")
    parts = quantize(files, plan, rows, out, resume=resume, progress=progress)
    found = None
    if measure:
        found = evaluate(str(parts.model), str(files.path), measured, threads=torch.get_num_threads(), progress=progress)
        assert found.divergence is not None
        if not (found.divergence.value <= max_loss or force):
            raise ConfigError(
                f"{out} would be {found.divergence.value:.3g} nats per token from {files.path}, which is more than {max_loss:g} "
                f"(--max-loss); it is kept in {parts.model}, and --resume --force takes it"
            )
        figures = {"scheme": str(plan.recipe), "method": plan.method or "auto", "range": plan.ranging or "auto"}
        (parts.model / FIGURES).write_text(json.dumps(figures | found.as_dict(), indent=1) + "\n", encoding="utf-8")
    parts.finish()
    return found
