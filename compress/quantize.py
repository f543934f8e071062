"""Post-training quantization: a model directory in, one of fewer bits out, a layer at a time.

In memory are one layer's weights, in fp32 too, and a few matrices of inputs x inputs; hidden states of the calibration text are in
files. What a layer is given is what the layers before it make of the text when they are quantized already, and the same goes for
the linears inside a layer.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from cluster.config import ConfigError
from cluster.model import ModelFiles
from cluster.schemes import CASTS, HEAD, Precision, Recipe, Scheme
from compress.calibration import HiddenStates
from compress.distill import copy_beside
from compress.gptq import Hessian, gptq, round_to_nearest
from compress.layers import EMBEDDING, FINAL_NORM, STAGES, LayerRun, Weights, all_linears, linears_of
from compress.parts import Parts
from workers.decoder import rms_norm
from workers.device import torch_dtype
from workers.quantization.weight import Ranging
from workers.quantization.written import config_of, tensors_of

Method = Literal["rtn", "gptq"]
_TOKENS = 4096
"""That run through a layer at once."""


@dataclass(frozen=True)
class Plan:
    """What to make of a model."""

    recipe: Recipe
    method: Method | None = None
    """Round to nearest, or GPTQ. None: GPTQ where there are 4 bits."""
    ranging: Ranging | None = None
    """None: mse where there are 4 bits, else minmax."""

    @property
    def cast(self) -> torch.dtype | None:
        """The dtype that all of the model is cast to, where the recipe is nothing but that."""
        match self.recipe.rules:
            case (("layers", str(name)),):
                return torch_dtype(CASTS[name])
        return None

    def ranging_of(self, scheme: Scheme) -> Ranging:
        """How the ranges of its weights are found."""
        return self.ranging or ("mse" if scheme.bits == 4 else "minmax")

    def uses_gptq(self, precision: Precision | None) -> bool:
        """Whether a linear of this precision needs calibration."""
        return isinstance(precision, Scheme) and (self.method or ("gptq" if precision.bits == 4 else "rtn")) == "gptq"


def quantize(files: ModelFiles, plan: Plan, rows: Tensor, out: Path, *, resume: bool = False, progress: bool = False) -> Parts:
    """Make the model, which the result's `finish` puts in its place.

    rows: [n, length] ids of calibration text. resume: go on from the last layer that was finished. Raises ConfigError.
    """
    assigned = assign(files, plan)
    calibrated = [number for number, name in _units(files, assigned) if plan.uses_gptq(assigned[name])]
    rows = rows if calibrated else torch.empty(0, 1, dtype=torch.int64)
    parts = Parts(out, _settings(files, plan, rows), resume=resume)
    hidden = HiddenStates(parts.folder, rows, files.shape.hidden_size)
    work = _Work(files, plan, assigned, Weights(files), rows, hidden, max(calibrated, default=-1))
    count, done = files.shape.num_layers + 1, parts.finished
    with torch.inference_mode(), tqdm(total=count, initial=done, desc="quantizing", file=sys.stderr, disable=not progress) as bar:
        for number in range(done, count):
            parts.write(number, work.layer(number) if number < files.shape.num_layers else work.rest())
            hidden.drop(number)
            bar.update()
    if done < count:
        work.weights.finish()
    parts.assemble(count)
    _write_config(files, plan, assigned, parts.model)
    copy_beside(files.path, parts.model)
    return parts


def assign(files: ModelFiles, plan: Plan) -> dict[str, Precision | None]:
    """The precision of each linear; None: as it is. A tied head is as the embedding is. Raises ConfigError for what cannot be."""
    plan.recipe.check(files.shape.num_layers)
    assigned = {name: plan.recipe.of(name) for name in all_linears(files.shape)}
    if files.shape.tied_embeddings:
        if isinstance(assigned[HEAD], Scheme) and any(pattern == HEAD for pattern, _ in plan.recipe.rules):
            raise ConfigError("the lm_head is the embedding in this model, and cannot be quantized apart from it")
        assigned[HEAD] = None
    if any(isinstance(precision, Scheme) for precision in assigned.values()):
        refuse_quantized(files)
    linears = linears_of(files.shape)
    for name, precision in assigned.items():
        inputs = files.shape.hidden_size if name == HEAD else linears[name.split(".", 3)[3]].inputs
        if isinstance(precision, Scheme) and precision.group_size and inputs % precision.group_size:
            raise ConfigError(f"{name} cannot be {precision}: its {inputs} inputs do not divide into groups of so many")
    if all(precision is None for precision in assigned.values()):
        raise ConfigError(f"'{plan.recipe}' means no linear of this model")
    return assigned


def refuse_quantized(files: ModelFiles) -> None:
    """ConfigError where the model is quantized."""
    if files.quantization is not None:
        raise ConfigError(f"{files.path} is quantized already; cast it first (--scheme bf16)")


def _units(files: ModelFiles, assigned: dict[str, Precision | None]) -> Iterator[tuple[int, str]]:
    """(number of the layer, name of a linear); the head comes behind the last layer."""
    for name in assigned:
        yield (files.shape.num_layers if name == HEAD else int(name.split(".")[2])), name


def _settings(files: ModelFiles, plan: Plan, rows: Tensor) -> dict[str, Any]:
    """What all parts of a model have to have in common."""
    return {
        "model": str(files.path.resolve()),
        "shape": str(files.shape),
        "scheme": str(plan.recipe),
        "method": plan.method,
        "range": plan.ranging,
        "text": digest(rows),
        "samples": list(rows.shape),
    }


def digest(rows: Tensor) -> str:
    """Of token ids [n, length]: others have another."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Work:
    files: ModelFiles
    plan: Plan
    assigned: dict[str, Precision | None]
    weights: Weights
    rows: Tensor
    """[samples, length] ids"""
    hidden: HiddenStates
    calibrated: int
    """The last layer that needs inputs; the head is num_layers, -1: none does."""

    def layer(self, number: int) -> dict[str, Tensor]:
        """The tensors of a layer to be written. Leaves the next one's inputs, where they are needed."""
        weights = self.weights.layer(number)
        if number == 0 and self.calibrated >= 0:
            self._embed()
        prefix = f"model.layers.{number}."
        written: dict[str, Tensor] = {}
        for stage, names in enumerate(STAGES):
            hessian = self._hessian(number, weights, stage) if self._needs(f"{prefix}{name}" for name in names) else None
            for name in names:
                weight = weights.pop(f"{name}.weight")
                made, weights[f"{name}.weight"] = self._linear(prefix + name, weight, hessian)
                written |= made
        if number < self.calibrated:
            run = LayerRun(self.files.shape, number, weights, self.rows.shape[1])
            coming = self.hidden.create(number + 1)
            for part, after in zip(self._batches(self.hidden.read(number)), self._batches(coming), strict=True):
                after.copy_(_whole(run(part)))
        linears = {f"{name}.weight" for names in STAGES for name in names}
        return written | {prefix + name: self._cast(tensor) for name, tensor in weights.items() if name not in linears}

    def rest(self) -> dict[str, Tensor]:
        """Embedding, last norm and head."""
        norm, head = self.weights.final_norm(), self.weights.head()
        written = {f"{EMBEDDING}.weight": self._cast(self.weights.embedding()), f"{FINAL_NORM}.weight": self._cast(norm)}
        if head is not None:
            hessian = None
            if self._needs([HEAD]):
                hessian = Hessian(self.files.shape.hidden_size)
                for part in self._batches(self.hidden.read(self.files.shape.num_layers)):
                    hessian.add(rms_norm(part.flatten(0, 1), norm.float(), self.files.shape.rms_norm_eps))
            written |= self._linear(HEAD, head, hessian)[0]
        return written

    def _needs(self, names: Iterator[str] | list[str]) -> bool:
        return any(self.plan.uses_gptq(self.assigned[name]) for name in names)

    def _embed(self) -> None:
        embedding, first = self.weights.embedding(), self.hidden.create(0)
        for ids, part in zip(self._batches(self.rows), self._batches(first), strict=True):
            part.copy_(embedding[ids].float())

    def _hessian(self, number: int, weights: dict[str, Tensor], stage: int) -> Hessian:
        """Of the input that the stage has in common."""
        hessian = Hessian(weights[f"{STAGES[stage][0]}.weight"].shape[1])

        def observe(at: int, rows: Tensor) -> None:
            if at == stage:
                hessian.add(rows)

        run = LayerRun(self.files.shape, number, weights, self.rows.shape[1], observe, last=stage)
        for part in self._batches(self.hidden.read(number)):
            run(part)
        return hessian

    def _linear(self, name: str, weight: Tensor, hessian: Hessian | None) -> tuple[dict[str, Tensor], Tensor]:
        """What is written of a linear, and its weight as it will be."""
        precision = self.assigned[name]
        if not isinstance(precision, Scheme):
            cast = self._cast(weight) if precision is None else weight.to(torch_dtype(CASTS[precision]))
            return {f"{name}.weight": cast}, cast
        dtype = torch_dtype(self.files.shape.dtype)
        ranging = self.plan.ranging_of(precision)
        if hessian is not None and self.plan.uses_gptq(precision):
            try:
                made = gptq(weight, hessian, precision, ranging, dtype)
            except ValueError as error:
                raise ConfigError(f"{name} cannot be {precision}: {error}") from None
        else:
            made = round_to_nearest(weight, precision, ranging, dtype)
        return tensors_of(name, made, dtype), made.dequantized()

    def _cast(self, tensor: Tensor) -> Tensor:
        """What stays as it is, unless all of the model is cast."""
        return tensor if self.plan.cast is None else tensor.to(self.plan.cast)

    def _batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, max(1, _TOKENS // self.rows.shape[1]))


def _whole(hidden: Tensor | None) -> Tensor:
    assert hidden is not None
    return hidden


def _write_config(files: ModelFiles, plan: Plan, assigned: dict[str, Precision | None], folder: Path) -> None:
    config = json.loads((files.path / "config.json").read_text(encoding="utf-8"))
    for name in ("quantization_config", "compression_config"):
        config.pop(name, None)
    schemes = {name: precision if isinstance(precision, Scheme) else None for name, precision in assigned.items()}
    if any(schemes.values()):
        config["quantization_config"] = config_of(schemes)
    if plan.cast is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(plan.cast)[6:]
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
