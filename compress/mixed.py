"""Mixed precision: which linears get by with fewer bits, by what each of them loses when it alone is quantized.

What is computed together (q, k and v; gate and up) has one precision. The loss of an assignment is taken for the sum of the losses
of its parts, each measured alone (as HAWQ-V2 does, Dong et al. 2020, with measured losses in place of second derivatives), so the
least loss for a size is a multiple-choice knapsack, solved by the greedy walk along the lower convex hulls (Sinha & Zoltners 1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from cluster.model import ModelFiles
from cluster.schemes import Precision, Recipe, Scheme
from compress.divergence import divergence
from compress.simulated import linears, load
from workers.device import torch_dtype
from workers.quantization.weight import quantize

_PAIRS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


@dataclass(frozen=True)
class Option:
    """A precision of a unit."""

    precision: Precision | None
    """None: as it is."""
    bytes: float
    loss: float
    """KL from the full-precision model in nats per token, when this unit alone is quantized so."""


@dataclass(frozen=True)
class Unit:
    """Linears that have one precision, by their names, and what they could be."""

    names: tuple[str, ...]
    options: tuple[Option, ...]


DEFAULT = ("int8", "int4-g128")
"""Precisions to choose from, besides the one that is."""
_WINDOWS, _LENGTH = 16, 256


def search(
    files: ModelFiles,
    rows: Tensor,
    precisions: Sequence[Precision],
    *,
    target_bytes: int | None = None,
    most_loss: float | None = None,
) -> tuple[Recipe, float, float]:
    """A recipe for at most target_bytes of tensors, or for a loss of at most most_loss, measured on some of `rows` [n, length] of
    token ids; its bytes in all and the loss to be expected. Raises ValueError where the model cannot be so small."""
    model = load(files).eval()
    width = torch_dtype(files.shape.dtype).itemsize
    units = sensitivities(model, rows[:_WINDOWS, :_LENGTH], precisions, 8 * width)
    chosen = sum(unit.options[0].bytes for unit in units)
    others = sum(weight.numel() for weight in model.parameters()) * width - chosen  # parameters() has what is tied once
    least = others + sum(min(option.bytes for option in unit.options) for unit in units)
    if target_bytes is not None and target_bytes < least:
        raise ValueError(f"of these precisions the model takes {least / 1e6:.1f} MB at least, not {target_bytes / 1e6:.1f}")
    recipe, size, loss = assign(units, largest=None if target_bytes is None else target_bytes - others, most_loss=most_loss)
    return recipe, size + others, loss


def sensitivities(model: PreTrainedModel, windows: Tensor, precisions: Sequence[Precision], bits: int) -> list[Unit]:
    """What each unit of `model` (fp32) loses on token ids `windows` [n, length], for each of the precisions. bits: of a weight that
    stays as it is."""
    modules = dict(linears(model))
    groups: dict[str, list[str]] = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        groups.setdefault(f"{parent}.{_PAIRS.get(last, last)}", []).append(name)
    wanted = _log_probabilities(model, windows)
    units = []
    for names in tqdm(groups.values(), desc="measuring what each linear loses", mininterval=5):
        count = sum(modules[name].weight.numel() for name in names)
        options = [Option(None, count * bits / 8, 0.0)]
        for precision in precisions:
            if not isinstance(precision, Scheme) or any(modules[name].in_features % (precision.group_size or 1) for name in names):
                continue
            kept = {name: modules[name].weight.data for name in names}
            for name in names:
                modules[name].weight.data = quantize(kept[name], precision, "mse").dequantized()
            told = _log_probabilities(model, windows)
            for name in names:
                modules[name].weight.data = kept[name]
            options.append(Option(precision, count * precision.bits_per_weight / 8, float(divergence(wanted, told).mean())))
        units.append(Unit(tuple(names), tuple(options)))
    return units


def assign(units: Sequence[Unit], *, largest: float | None = None, most_loss: float | None = None) -> tuple[Recipe, float, float]:
    """The recipe with the least loss of at most `largest` bytes, or the smallest that loses at most `most_loss`; its bytes and its
    expected loss. Raises ValueError where not even the fewest bits are few enough."""
    hulls = [_hull(unit.options) for unit in units]
    at = [0] * len(units)
    size, loss = sum(hull[0].bytes for hull in hulls), sum(hull[0].loss for hull in hulls)
    steps = [(number, place) for number, hull in enumerate(hulls) for place in range(1, len(hull))]
    for number, place in sorted(steps, key=lambda s: (_slope(*hulls[s[0]][s[1] - 1 : s[1] + 1]), s)):
        before, after = hulls[number][place - 1 : place + 1]
        if largest is not None and size <= largest:
            break
        too_much = most_loss is not None and loss + after.loss - before.loss > most_loss
        if too_much or at[number] != place - 1:  # without this step those behind it are none either
            continue
        at[number] = place
        size, loss = size + after.bytes - before.bytes, loss + after.loss - before.loss
    if largest is not None and size > largest:
        raise ValueError(f"the linears take {size:.0f} bytes at least, but may take {largest:.0f}")
    return _recipe(units, [hull[i] for hull, i in zip(hulls, at, strict=True)]), size, loss


def _hull(options: Sequence[Option]) -> list[Option]:
    """From the largest to the smallest, those that no mixture of two others beats."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.bytes, o.loss)):
        while hull and option.loss <= hull[-1].loss:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-1], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        if not hull or option.bytes < hull[-1].bytes:
            hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    """Nats for each byte that is saved."""
    return (after.loss - before.loss) / (before.bytes - after.bytes)


def _recipe(units: Sequence[Unit], chosen: Sequence[Option]) -> Recipe:
    rules = []
    for unit, option in zip(units, chosen, strict=True):
        if option.precision is not None:
            rules += [(name.removeprefix("model."), option.precision) for name in unit.names]
    return Recipe(tuple(rules))


@torch.inference_mode()
def _log_probabilities(model: PreTrainedModel, windows: Tensor) -> Tensor:
    return torch.stack([model(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1) for row in windows])
