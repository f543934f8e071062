"""In what precision each linear of a model is kept: the names that a user writes, and a recipe of patterns. No arithmetic: that is
workers/quantization."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.config import ConfigError

Kind = Literal["int", "float"]
Granularity = Literal["tensor", "channel", "group"]

CASTS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of precisions that are no quantization, as dtypes."""
HEAD = "lm_head"
LINEARS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
"""Of each layer."""
_WORDS = r"(?P<base>int4|int8|fp8)(?P<asym>-asym)?(?:-(?:g(?P<group>[1-9]\d*)|(?P<tensor>tensor)))?(?P<dynamic>-dynamic)?"
_NAMES = "int8, int4, fp8, with -asym, -g128 (or -tensor) and -dynamic behind, or fp32, fp16, bf16"


@dataclass(frozen=True)
class Scheme:
    """How a weight [out_features, in_features] is quantized, and what it is multiplied by."""

    bits: int
    """4 or 8."""
    kind: Kind = "int"
    """float: fp8 e4m3 (Micikevicius et al. 2022)."""
    symmetric: bool = True
    granularity: Granularity = "channel"
    """What shares a scale: all of it, a row, or a row's runs of group_size inputs."""
    group_size: int = 0
    """Inputs of a group; 0 where there are none."""
    dynamic: bool = False
    """Activations are quantized too, in 8 bits, each token by its own range; else weights only."""

    def __str__(self) -> str:
        words = [f"{'int' if self.kind == 'int' else 'fp'}{self.bits}"]
        words += [] if self.symmetric else ["asym"]
        words += {"tensor": ["tensor"], "channel": [], "group": [f"g{self.group_size}"]}[self.granularity]
        words += ["dynamic"] if self.dynamic else []
        return "-".join(words)

    @property
    def lowest(self) -> int:
        """The smallest integer; of int only."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest."""
        return (1 << (self.bits - 1)) - 1

    @property
    def bits_per_weight(self) -> float:
        """With the scales (16 bits) and zero-points of groups."""
        if self.granularity != "group":
            return self.bits
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.group_size


def linear_names(num_layers: int) -> list[str]:
    """Of a model's linears as they are in checkpoints, the lm_head's last."""
    return [f"model.layers.{number}.{name}" for number in range(num_layers) for name in LINEARS] + [HEAD]


Precision = Scheme | str
"""A scheme, or a dtype: a key of CASTS."""


def parse_precision(text: str) -> Precision:
    """What str() of a scheme gives, or a key of CASTS; int4 alone is int4-g128. Raises ConfigError."""
    word = text.strip()
    if word in CASTS:
        return word
    found = re.fullmatch(_WORDS, word)
    if found is None:
        raise ConfigError(f"'{word}' is no precision; there are {_NAMES}")
    floating = found["base"] == "fp8"
    group = int(found["group"]) if found["group"] else 128 if found["base"] == "int4" and not found["tensor"] else 0
    if floating and (found["asym"] or group):
        raise ConfigError(f"'{word}': fp8 is symmetric, with a scale for each output (or -tensor)")
    if found["dynamic"] and (found["asym"] or (found["base"] == "int8" and group)):
        raise ConfigError(f"'{word}': with dynamic activations weights are symmetric, of int8 with a scale for each output")
    return Scheme(
        bits=4 if found["base"] == "int4" else 8,
        kind="float" if floating else "int",
        symmetric=not found["asym"],
        granularity="group" if group else "tensor" if found["tensor"] else "channel",
        group_size=group,
        dynamic=bool(found["dynamic"]),
    )


@dataclass(frozen=True)
class Recipe:
    """Patterns, of which the first that matches a linear decides. What none matches stays as it is in the checkpoint."""

    rules: tuple[tuple[str, Precision], ...]

    def __str__(self) -> str:
        return ", ".join(f"{pattern}: {precision}" for pattern, precision in self.rules)

    def of(self, name: str) -> Precision | None:
        """The precision of a linear ("model.layers.3.mlp.down_proj", "lm_head")."""
        return next((precision for pattern, precision in self.rules if _matches(pattern, name)), None)

    def check(self, num_layers: int) -> None:
        """ConfigError for a pattern that means no linear of a model of so many layers: it is misspelt, most likely."""
        names = linear_names(num_layers)
        for pattern, _ in self.rules:
            if not any(_matches(pattern, name) for name in names):
                raise ConfigError(f"'{pattern}' means no linear of a model of {num_layers} layers")

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Each once."""
        return tuple(dict.fromkeys(p for _, p in self.rules if isinstance(p, Scheme)))


UNCHANGED = Recipe(())
"""All as it is in the checkpoint."""


def parse_recipe(text: str | None) -> Recipe:
    """`lm_head: bf16, layers.0-1: int8, down_proj: int8, rest: int4-g128`; a precision alone is that of the layers' linears, and
    the lm_head stays as it is. None: UNCHANGED. Raises ConfigError."""
    if text is None:
        return UNCHANGED
    if ":" not in text:
        return Recipe((("layers", parse_precision(text)),))
    rules = []
    for part in text.split(","):
        pattern, colon, precision = (word.strip() for word in part.partition(":"))
        if not colon or not re.fullmatch(r"rest|lm_head|layers(\.\d+(-\d+)?)?(\.\w+)*|\w+", pattern):
            raise ConfigError(
                f"'{part.strip()}' is no rule; write lm_head: bf16, layers.0-1: int8, down_proj: int8, rest: int4-g128"
            )
        rules.append((pattern, parse_precision(precision)))
    return Recipe(tuple(rules))


def _matches(pattern: str, name: str) -> bool:
    if pattern == "rest":
        return True
    parts, wanted = name.removeprefix("model.").split("."), pattern.split(".")
    if wanted[0] != "layers":
        return _inside(wanted, parts)
    if parts[0] != "layers":
        return False
    if len(wanted) == 1:
        return True
    first, _, last = wanted[1].partition("-")
    if wanted[1][:1].isdigit():
        return int(first) <= int(parts[1]) <= int(last or first) and _inside(wanted[2:], parts[2:])
    return _inside(wanted[1:], parts[2:])


def _inside(wanted: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether `wanted` is a run of `parts`; none is in all."""
    return any(list(parts[i : i + len(wanted)]) == list(wanted) for i in range(len(parts) - len(wanted) + 1))
