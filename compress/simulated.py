"""A model in training that computes as what will be written of it: the forward passes of quantization-aware training.

Quantized weights are trained in units of their scales, so that steps are as large for all, and their scales with them (LSQ, Esser
et al. 2020: the gradient of a scale is that of the integers it multiplies). Backwards, rounding counts as the identity
(straight-through estimator, Bengio et al. 2013), except beyond the ends of the range.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.model import ModelFiles
from cluster.schemes import Kind
from workers.checkpoint import Checkpoint
from workers.device import torch_dtype
from workers.quantization.activations import requantized
from workers.quantization.stored import read_linear
from workers.quantization.weight import FP8_LARGEST, QuantizedWeight, rounded
from workers.quantization.written import tensors_of

_FP8_STEP = 16.0
"""From one value of e4m3 to the next between 128 and 256 of 448, in units of the scale."""


class FakeQuantize(nn.Module):
    """Of a weight [out_features, in_features] in steps from one integer to the next, what rounding and expanding it gives.

    rounding: without it, the weight as it would be in full precision, which the control trains.
    """

    def __init__(self, kept: QuantizedWeight, dtype: torch.dtype, *, rounding: bool) -> None:
        """kept: what it begins as. dtype: of the scales that will be written."""
        super().__init__()
        self._kept, self._dtype, self._rounding = kept, dtype, rounding
        self._step = _FP8_STEP if kept.scheme.kind == "float" else 1.0
        whole = kept.scheme.granularity == "tensor"
        self.growth = nn.Parameter(torch.zeros(1, 1) if whole else torch.zeros_like(kept.scale))
        """[out_features, groups] or, of a scale for all, [1, 1]: logarithms of the scales over those that calibration found."""

    def begin(self, weight: Tensor) -> Tensor:
        """The steps to begin with: the middle of what rounds to the integers of `kept`; without rounding, `weight` itself."""
        return (self._kept.dequantized() if self._rounding else weight) / self._spread(self._kept.scale) / self._step

    def quantized(self, steps: Tensor) -> QuantizedWeight:
        """What will be written."""
        kept = self._kept
        values = rounded(steps * self._step, kept.scheme, torch.ones_like(kept.scale), kept.zero_point)
        return QuantizedWeight(kept.scheme, values, self._scale().detach(), kept.zero_point)

    def forward(self, steps: Tensor) -> Tensor:
        """Its value is that of what will be written, to the bit."""
        scale = self._spread(self._scale() * self._step)
        if not self._rounding:
            return steps * scale
        values = self.quantized(steps.detach()).values.float()
        lowest, highest = self._range()
        if self._kept.zero_point is not None:
            values = values - self._spread(self._kept.zero_point)
        return _instead(torch.clamp(steps, lowest, highest), values / self._step) * scale

    def _scale(self) -> Tensor:
        """[out_features, groups]"""
        scale = self._kept.scale * self.growth.exp()
        return _instead(scale, scale.detach().to(self._dtype).float()) if self._rounding else scale

    def _range(self) -> tuple[Tensor, Tensor]:
        """In steps, [out_features, in_features] or one for all: beyond, no integer is within half a step."""
        scheme, zero = self._kept.scheme, self._kept.zero_point
        if scheme.kind == "float":
            return torch.tensor(-FP8_LARGEST / self._step), torch.tensor(FP8_LARGEST / self._step)
        center = torch.tensor(0.0) if zero is None else self._spread(zero).float()
        return scheme.lowest - 0.5 - center, scheme.highest + 0.5 - center

    def _spread(self, of_groups: Tensor) -> Tensor:
        """[out_features, groups] -> [out_features, in_features]"""
        return of_groups.repeat_interleave(self._kept.group_size, dim=1)


class Cast(nn.Module):
    """What a dtype holds of a tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """fp32"""
        return _instead(x, x.detach().to(self._dtype).float())


@dataclass(frozen=True)
class Trained:
    """What is trained of a simulated model."""

    model: PreTrainedModel
    quantized: dict[str, FakeQuantize]
    """By the names of linears."""
    others: dict[str, torch.dtype]
    """The dtypes of all other tensors, by their names in the checkpoint."""

    def weights(self) -> list[Tensor]:
        """In steps."""
        return [_original(self.model, f"{name}.weight") for name in self.quantized]

    def scales(self) -> list[Tensor]:
        """As logarithms."""
        return [simulation.growth for simulation in self.quantized.values()]

    def rest(self) -> list[Tensor]:
        """As they are."""
        return [_original(self.model, name) for name in self.others]

    @torch.no_grad()
    def written(self, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of the checkpoint."""
        made = {name: _computed(self.model, name).to(dtype) for name, dtype in self.others.items()}
        for name, simulation in self.quantized.items():
            made |= tensors_of(name, simulation.quantized(_original(self.model, f"{name}.weight")), scale_dtype)
        return made

    @torch.no_grad()
    def expanded(self) -> dict[str, Tensor]:
        """All in fp32, without anything quantized."""
        return {name: _computed(self.model, name).contiguous() for name in [*self.others, *(f"{n}.weight" for n in self.quantized)]}


def simulate(model: PreTrainedModel, calibrated: ModelFiles, *, rounding: bool = True) -> Trained:
    """Let `model` compute as `calibrated` does, which was made of it, ready to be trained; without rounding it computes as before,
    and the same things are trained. Raises ValueError where nothing is quantized."""
    checkpoint, quantization = Checkpoint(calibrated.path), calibrated.quantization
    if quantization is None:
        raise ValueError(f"nothing is quantized in {calibrated.path}")
    schemes = {name: scheme for name, _ in linears(model) if (scheme := quantization.scheme_of(name)) is not None}
    others, modules = dict[str, torch.dtype](), dict(model.named_modules())
    for name, tensor in list(model.named_parameters(remove_duplicate=False)):
        if name.removesuffix(".weight") in schemes:
            continue
        # What is not in the checkpoint is the head, where it is the embedding: one parameter that two modules cast.
        dtype = checkpoint.peek(name).dtype if name in checkpoint else torch_dtype(calibrated.shape.dtype)
        if name in checkpoint:
            others[name] = dtype
        module, _, own = name.rpartition(".")
        tensor.requires_grad_(True)
        if rounding:
            parametrize.register_parametrization(modules[module], own, Cast(dtype), unsafe=True)
    quantized = {}
    for name, scheme in schemes.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        kept = read_linear(checkpoint, quantization, name, linear.out_features, linear.in_features)
        quantized[name] = simulation = FakeQuantize(kept, torch_dtype(calibrated.shape.dtype), rounding=rounding)
        linear.weight.data = simulation.begin(linear.weight.data)
        parametrize.register_parametrization(linear, "weight", simulation, unsafe=True)
        if scheme.dynamic and rounding:
            linear.register_forward_pre_hook(_rounding(scheme.kind))
    return Trained(model, quantized, others)


def load(files: ModelFiles) -> PreTrainedModel:
    """transformers' model in fp32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    return model


def linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """By their names in the checkpoint, without an lm_head that is the embedding."""
    tied = bool(model.config.tie_word_embeddings)
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return [(name, part) for name, part in found if not (tied and name == "lm_head")]


class _Instead(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, trained: Tensor, used: Tensor) -> Tensor:
        return used.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _instead(trained: Tensor, used: Tensor) -> Tensor:
    """`used`, whose gradient goes to `trained` of the same shape."""
    result: Tensor = _Instead.apply(trained, used)  # type: ignore[no-untyped-call]
    return result


def _computed(model: PreTrainedModel, name: str) -> Tensor:
    """A tensor of the model as it computes with it."""
    module, _, own = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(module), own)
    return found.detach()


def _original(model: PreTrainedModel, name: str) -> Tensor:
    """What is trained of it."""
    module, _, own = name.rpartition(".")
    holder: nn.Module = model.get_submodule(module)
    return holder.get_parameter(f"parametrizations.{own}.original" if parametrize.is_parametrized(holder, own) else own)


def _rounding(kind: Kind) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    def rounding(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        return _instead(x, requantized(x.detach().flatten(0, -2), kind).view_as(x))

    return rounding
