"""How good a model is on a text, and how far from another one whose vocabulary it shares: perplexity, divergence, agreement, size.

Models run in this project's own runner, in the dtype they would be served in: what is measured is what is served.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cluster.config import Config, ConfigError, Dtype
from cluster.model import ModelFiles, open_model
from cluster.protocol import NewSequence, SamplingParams
from compress.divergence import divergence
from compress.layers import num_parameters
from workers.draws import DrawSetup
from workers.runner import ModelRunner, load_runner
from workers.sequences import SequenceState, Span

_RESAMPLES = 2000
_MOST = 709
"""Nats, of which exp is a float."""
_ROWS = 256
"""Positions whose logits are there at once."""


@dataclass(frozen=True)
class Figure:
    """A mean over all tokens, and where it is in 95 % of resamplings of the rows (Efron's bootstrap, percentiles)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Evaluation:
    """Of a model on rows of text."""

    tokens: int
    """That were predicted."""
    perplexity: Figure
    bytes: int
    """Of its tensors' files."""
    parameters: int
    """Of the model before it was quantized."""
    base_perplexity: Figure | None = None
    divergence: Figure | None = None
    """KL(base || model) in nats per token."""
    agreement: Figure | None = None
    """Share of positions where both find the same token likeliest."""
    divergences: tuple[float, ...] = ()
    """The divergence on each row."""

    @property
    def gigabytes_per_billion(self) -> float:
        """GB (10^9 bytes) per 10^9 parameters."""
        return self.bytes / self.parameters

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"gigabytes_per_billion_parameters": self.gigabytes_per_billion}

    def __str__(self) -> str:
        lines = [f"perplexity  {self.perplexity}, on {self.tokens} tokens"]
        if self.base_perplexity is not None:
            lines[0] += f"; base {self.base_perplexity}"
            lines.append(f"divergence  {self.divergence} nats per token from the base")
            lines.append(f"agreement   {self.agreement} of the likeliest tokens are the base's")
        size = f"{self.bytes / 1e6:.1f} MB, {self.gigabytes_per_billion:.2f} GB per 10^9 parameters"
        return "\n".join([*lines, f"size        {size}"])


@dataclass(frozen=True)
class Comparison:
    """Of the divergences of two models from one base on the same rows, which are resampled together: what is hard about a row is so
    for both, so this tells models apart whose own intervals overlap."""

    difference: Figure
    """Of the first less that of the second, in nats per token."""
    ratio: Figure

    @classmethod
    def of(cls, first: Evaluation, second: Evaluation) -> "Comparison":
        """Raises ValueError where they were not measured against a base, on as many rows."""
        ours, theirs = np.array(first.divergences), np.array(second.divergences)
        if not len(ours) or len(ours) != len(theirs):
            raise ValueError("only models that were measured on the same rows, against a base, can be compared")
        return cls(_figure(ours - theirs), _ratio(ours, theirs))

    def __str__(self) -> str:
        return f"difference  {self.difference} nats per token\nratio       {self.ratio}"


def evaluate(
    model: str, base: str | None, rows: Tensor, *, dtype: Dtype = "auto", threads: int | None = None, progress: bool = False
) -> Evaluation:
    """Measure `model` (a directory or hub id), where a base is named against that. rows [n, length] ids. Raises ConfigError where
    one cannot be loaded, or their vocabularies differ.

    Both are in memory at the same time.
    """
    names = [model] if base is None else [model, base]
    files = [open_model(name) for name in names]
    if len({one.shape.vocab_size for one in files}) > 1:
        raise ConfigError(f"the vocabularies of {model} and {base} are of different sizes")
    if len(rows) < 2 or rows.shape[1] < 2:
        raise ConfigError(f"{len(rows)} rows of {rows.shape[1]} tokens are too few to measure on")
    runners = [load_scorer(one, rows.shape[1], dtype, threads) for one in files]
    found = []
    for row in tqdm(rows.numpy(), desc="measuring", disable=not progress, leave=False):
        found.append(_score(runners, row))
    # [rows, 4]: nats of the model, of the base, of the divergence; positions where they agree. Per token, of length - 1 each.
    scores = np.array(found) / (rows.shape[1] - 1)
    of = {name: _figure(scores[:, column]) for column, name in enumerate(("nats", "base", "divergence", "agreement"))}
    return Evaluation(
        tokens=len(rows) * (rows.shape[1] - 1),
        perplexity=_exp(of["nats"]),
        bytes=size_of(files[0].path),
        parameters=num_parameters(files[0].shape),
        base_perplexity=None if base is None else _exp(of["base"]),
        divergence=None if base is None else of["divergence"],
        agreement=None if base is None else of["agreement"],
        divergences=() if base is None else tuple(scores[:, 2].tolist()),
    )


def load_scorer(files: ModelFiles, length: int, dtype: Dtype, threads: int | None) -> ModelRunner:
    """A runner with room for one row."""
    config = Config(model=str(files.path), dtype=dtype, max_model_len=length, threads=threads)
    num_blocks = -(-length // config.block_size) + 1
    return load_runner(files, config, num_blocks=num_blocks)


def size_of(folder: Path) -> int:
    """Bytes of the files of tensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.inference_mode()
def _score(runners: Sequence[ModelRunner], ids: NDArray[np.int64]) -> tuple[float, float, float, int]:
    """ids [length]. Sums over all positions but the last: nats of the first model and of the last, KL(last || first), agreement."""
    nats, base_nats, lost, agreement = 0.0, 0.0, 0.0, 0
    hidden = [torch.split(_hidden(runner, ids), _ROWS) for runner in runners]
    for number, targets in enumerate(torch.split(torch.from_numpy(ids[1:, None]), _ROWS)):
        told = [_log_probs(runner, parts[number]) for runner, parts in zip(runners, hidden, strict=True)]
        first, last = told[0], told[-1]
        nats -= float(first.gather(1, targets).sum(dtype=torch.float64))
        base_nats -= float(last.gather(1, targets).sum(dtype=torch.float64))
        if len(told) > 1:
            lost += float(divergence(last, first).sum(dtype=torch.float64))
            agreement += int((first.argmax(1) == last.argmax(1)).sum())
    return nats, base_nats, lost, agreement


def _hidden(runner: ModelRunner, ids: NDArray[np.int64]) -> Tensor:
    """[length - 1, hidden]: of all positions but the last."""
    length = len(ids)
    blocks = np.arange(1, -(-length // runner.pool.block_size) + 1, dtype=np.int32)  # block 0 is the null block
    new = NewSequence(choice=0, prompt=[], emitted=[], params=SamplingParams(seed=0, max_tokens=1))
    state = SequenceState(0, 0, DrawSetup.of(new), length, ids.astype(np.int32), length, blocks, len(blocks))
    with runner.decoder.kernels.awake():
        return runner.forward([Span(state, 0, length, sample=False)])[:-1]


def _log_probs(runner: ModelRunner, hidden: Tensor) -> Tensor:
    """[n, vocab] fp32 on the CPU."""
    with runner.decoder.kernels.awake():
        return runner.decoder.logits(hidden).log_softmax(-1).cpu()


def _figure(means: NDArray[np.float64]) -> Figure:
    """means [rows], each of as many tokens."""
    return _interval(means.mean(), means[_drawn(len(means))].mean(axis=1))


def _ratio(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Figure:
    """Of the means of two [rows]; not finite where the second is 0."""
    drawn = _drawn(len(ours))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(ours.mean() / theirs.mean(), ours[drawn].mean(axis=1) / theirs[drawn].mean(axis=1))


def _drawn(rows: int) -> NDArray[np.int64]:
    """[resamples, rows]: which rows, the same for as many."""
    return np.random.default_rng(0).integers(0, rows, (_RESAMPLES, rows))


def _interval(value: float, resampled: NDArray[np.float64]) -> Figure:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Figure(float(value), float(low), float(high))


def _exp(figure: Figure) -> Figure:
    return Figure(*(math.exp(x) if x < _MOST else math.inf for x in (figure.value, figure.low, figure.high)))
