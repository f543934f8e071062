"""What config.json says of a checkpoint that is quantized already: by compressed-tensors, GPTQ or AWQ. No tensors: reading those is
workers/quantization/stored.py."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.config import ConfigError
from cluster.schemes import Scheme

Layout = Literal["plain", "packed", "gptq", "awq"]
"""How the tensors of a linear lie in the files: compressed-tensors' with a value in a byte, or some in an int32; AutoGPTQ's;
AutoAWQ's."""

_LAYOUTS: dict[str, Layout] = {
    "pack-quantized": "packed",
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
}
_CLASSES = ("Linear", "LinearBase", "Module")
"""Names by which compressed-tensors means all linears."""


@dataclass(frozen=True)
class StoredLinear:
    """How one linear is stored."""

    scheme: Scheme
    layout: Layout
    zero_less_one: bool = False
    """Of GPTQ: zero-points are written less one, as AutoGPTQ began."""


@dataclass(frozen=True)
class Rule:
    """Linears that are stored alike."""

    targets: tuple[str, ...]
    """Names, class names, or `re:` and a regular expression for the beginning of a name."""
    stored: StoredLinear | None
    """None: as it is."""


@dataclass(frozen=True)
class StoredQuantization:
    """How the linears of a checkpoint are stored."""

    method: Literal["compressed-tensors", "gptq", "awq"]
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    """What stays as it is, in the words of Rule.targets."""

    def of(self, name: str) -> StoredLinear | None:
        """How a linear ("model.layers.3.mlp.down_proj", "lm_head") is stored; None: unquantized. A name decides before a regular
        expression, and that before a class."""
        if _matches(name, self.ignore) is not None:
            return None
        ranked = [(rank, rule) for rule in self.rules if (rank := _matches(name, rule.targets)) is not None]
        return min(ranked, key=lambda found: found[0])[1].stored if ranked else None

    def scheme_of(self, name: str) -> Scheme | None:
        """See `of`."""
        stored = self.of(name)
        return None if stored is None else stored.scheme


def parse_quantization(config: dict[str, Any], where: str) -> StoredQuantization | None:
    """Of a config.json; None where nothing is quantized. `where` is named in errors. Raises ConfigError for what is broken, or not
    served."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    try:
        method = str(found.get("quant_method", "compressed-tensors" if "config_groups" in found else "of no name"))
        parse = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}.get(method)
        if parse is None:
            raise _Unserved(f"method {method}; served are compressed-tensors, gptq and awq")
        return parse(found)
    except _Unserved as error:
        raise ConfigError(f"{where}: quantization that is not served: {error}") from None
    except KeyError as error:
        raise ConfigError(f"{where}: quantization_config lacks {error}") from None
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ConfigError(f"{where}: quantization_config has a value that can't be used: {error}") from None


class _Unserved(Exception):
    """What this is; the place is added outside."""


def _matches(name: str, targets: Iterable[str]) -> int | None:
    """How closely one of them means the name: 0 by the name itself, 1 by a regular expression, 2 by its class; None: not at all."""
    ranks = []
    for target in targets:
        if target == name:
            ranks.append(0)
        elif target.startswith("re:") and re.match(target[3:], name):
            ranks.append(1)
        elif target in _CLASSES:
            ranks.append(2)
    return min(ranks, default=None)


# --- compressed-tensors --------------------------------------------------------------------------------------------


def _compressed_tensors(found: dict[str, Any]) -> StoredQuantization:
    for name, what in (("kv_cache_scheme", "a KV cache of few bits"), ("transform_config", "rotated weights")):
        if found.get(name):
            raise _Unserved(f"{what} ({name})")
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _Unserved(f"sparse weights ({sparsity})")
    whole = found.get("format", "naive-quantized")
    rules = []
    for name, group in found["config_groups"].items():
        if group.get("output_activations"):
            raise _Unserved(f"{name} quantizes outputs of linears")
        weights, inputs = group.get("weights"), group.get("input_activations")
        format = group.get("format") or whole
        if format not in _LAYOUTS:
            raise _Unserved(f"format {format}; served are {', '.join(_LAYOUTS)}")
        if weights is None and inputs:
            raise _Unserved(f"{name} quantizes activations and no weights")
        stored = None if weights is None else StoredLinear(_scheme(weights, inputs), _LAYOUTS[format])
        rules.append(Rule(_names(group["targets"]), stored))
    return StoredQuantization("compressed-tensors", tuple(rules), _names(found.get("ignore") or ()))


def _scheme(weights: dict[str, Any], inputs: dict[str, Any] | None) -> Scheme:
    bits, kind, symmetric = int(weights.get("num_bits", 8)), weights.get("type", "int"), bool(weights.get("symmetric", True))
    size = weights.get("group_size")
    strategy: Any = weights.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    if strategy not in ("tensor", "channel", "group"):
        raise _Unserved(f"weights with a scale for each {strategy}")
    if kind not in ("int", "float") or bits not in (4, 8) or (kind == "float" and bits != 8):
        raise _Unserved(f"weights of {bits} bits ({kind}); served are int of 4 and 8, float of 8")
    if kind == "float" and not (symmetric and strategy != "group"):
        raise _Unserved("fp8 weights that are asymmetric or in groups")
    if weights.get("dynamic"):
        raise _Unserved("weights that are quantized while they run")
    if str(weights.get("actorder")).rpartition(".")[2].lower() in ("group", "dynamic"):
        raise _Unserved("groups of inputs in the order of their activations (actorder group)")
    dynamic = _dynamic(inputs, kind)
    if dynamic and (not symmetric or (bits == 8 and strategy == "group")):
        raise _Unserved("dynamic activations with weights that are asymmetric, or int8 in groups")
    if strategy == "group" and int(size or 0) < 1:
        raise ValueError(f"group_size {size}")
    return Scheme(bits, kind, symmetric, strategy, int(size) if size and strategy == "group" else 0, dynamic)


def _dynamic(inputs: dict[str, Any] | None, kind: str) -> bool:
    """Whether activations are quantized token by token, which is the one way that is served."""
    if not inputs:
        return False
    bits, own, strategy = inputs.get("num_bits", 8), inputs.get("type", "int"), inputs.get("strategy")
    if not inputs.get("dynamic"):
        raise _Unserved("activations with scales of calibration (static); only dynamic ones, token by token")
    if inputs.get("dynamic") is not True or strategy != "token" or bits != 8 or own != kind or not inputs.get("symmetric", True):
        raise _Unserved(
            f"activations of {bits} bits ({own}), a scale for each {strategy}; only symmetric, of 8 bits, token by token"
        )
    return True


def _names(value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{value!r} is no list of names")
    for name in value:
        re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
    return tuple(value)


# --- GPTQ and AWQ --------------------------------------------------------------------------------------------------


def _gptq(found: dict[str, Any]) -> StoredQuantization:
    """Of AutoGPTQ and GPTQModel. desc_act need not be refused: whether groups are out of order the tensors say."""
    written = str(found.get("checkpoint_format") or "gptq")
    if written not in ("gptq", "gptq_v2") or found.get("is_marlin_format"):
        raise _Unserved(f"GPTQ in the format {written}; served are gptq and gptq_v2")
    if str(found.get("pack_dtype") or "int32").rpartition(".")[2] != "int32":
        raise _Unserved(f"GPTQ packed in {found['pack_dtype']}")

    def stored(settings: dict[str, Any]) -> StoredLinear:
        scheme = _grouped(int(settings["bits"]), int(settings.get("group_size", 128)), bool(settings.get("sym", True)))
        return StoredLinear(scheme, "gptq", zero_less_one=written == "gptq")

    rules = [Rule((f"re:{'|'.join(_blocks(found))}",), stored(found))]
    if found.get("lm_head"):
        rules.append(Rule(("lm_head",), stored(found)))
    ignore = []
    special = []
    for pattern, changes in (found.get("dynamic") or {}).items():
        re.compile(expression := pattern.removeprefix("-:").removeprefix("+:"))
        if pattern.startswith("-:"):
            ignore.append(f"re:{expression}")
        else:
            special.append(Rule((f"re:{expression}",), stored(found | changes)))
    return StoredQuantization("gptq", (*special, *rules), tuple(ignore))


def _blocks(found: dict[str, Any]) -> list[str]:
    """Regular expressions of the linears inside layers."""
    named = found.get("modules_in_block_to_quantize") or found.get("inside_layer_modules")
    if not named:
        return [r"model\.layers\."]
    flat = [name for part in named for name in ([part] if isinstance(part, str) else part)]
    return [rf"model\.layers\.\d+\.{re.escape(name)}$" for name in flat]


def _awq(found: dict[str, Any]) -> StoredQuantization:
    version = str(found.get("version") or "gemm").lower()
    if version != "gemm":
        raise _Unserved(f"AWQ in the format {version}; served is gemm")
    if not found.get("zero_point", True):
        raise _Unserved("AWQ without zero-points")
    bits = int(found.get("bits") or found["w_bit"])
    if bits != 4:
        raise _Unserved(f"AWQ of {bits} bits")
    size = int(found.get("group_size") or found["q_group_size"])
    ignore = [f"re:.*{re.escape(name)}" for name in _names(found.get("modules_to_not_convert") or ())]
    rule = Rule((r"re:model\.layers\.",), StoredLinear(_grouped(bits, size, symmetric=False), "awq"))
    return StoredQuantization("awq", (rule,), tuple(ignore))


def _grouped(bits: int, size: int, symmetric: bool) -> Scheme:
    if bits not in (4, 8):
        raise _Unserved(f"weights of {bits} bits; served are 4 and 8")
    if size != -1 and size < 1:
        raise ValueError(f"group_size {size}")
    return Scheme(bits, "int", symmetric, "channel" if size == -1 else "group", max(size, 0))
