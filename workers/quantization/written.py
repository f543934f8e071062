"""Writing linears of few bits as compressed-tensors lays them out; see workers/quantization/stored.py."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.schemes import Scheme
from workers.quantization.packing import packed
from workers.quantization.weight import QuantizedWeight


def tensors_of(name: str, weight: QuantizedWeight, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of the linear `name`. Raises ValueError where scale_dtype does not hold the scales."""
    scheme, scale, zero = weight.scheme, weight.scale.to(scale_dtype), weight.zero_point
    if not torch.equal(scale.float(), weight.scale):
        raise ValueError(f"the scales of {name} are not {str(scale_dtype)[6:]}")
    if scheme.granularity == "tensor":
        scale, zero = scale[0], None if zero is None else zero[0]
    tensors = {"weight_scale": scale.contiguous()}
    if _format(scheme) == "pack-quantized":
        tensors["weight_packed"] = packed(weight.values, scheme.bits)
        tensors["weight_shape"] = torch.tensor(weight.shape)
        if zero is not None and scheme.granularity != "tensor":
            zero = packed(zero.t(), scheme.bits).t()
    else:
        tensors["weight"] = weight.values.contiguous()
    if zero is not None:
        tensors["weight_zero_point"] = zero.contiguous()
    return {f"{name}.{own}": tensor for own, tensor in tensors.items()}


def config_of(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """config.json's `quantization_config` for linears by name, all of the model; None: those that stay as they are."""
    used = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    formats = {_format(scheme) for scheme in used}
    groups = {}
    for number, scheme in enumerate(used):
        names = [name for name, own in schemes.items() if own == scheme]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(used) == 1 else names,
            "weights": _weights(scheme),
            "input_activations": _activations(scheme) if scheme.dynamic else None,
            "output_activations": None,
            "format": _format(scheme),
        }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [name for name, own in schemes.items() if own is None],
        "kv_cache_scheme": None,
    }


def _format(scheme: Scheme) -> str:
    """As compressed-tensors chooses it."""
    if scheme.kind == "float":
        return "float-quantized"
    return "int-quantized" if scheme.bits == 8 and scheme.dynamic else "pack-quantized"


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size or None,
        "dynamic": False,
    }


def _activations(scheme: Scheme) -> dict[str, Any]:
    return {"num_bits": 8, "type": scheme.kind, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
