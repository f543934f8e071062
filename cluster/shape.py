"""A decoder's dimensions and flags, read from a Hugging Face config.json. What differs between families is a flag here, and nowhere
a second decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.config import ConfigError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_MISSING: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
"""What transformers takes where config.json says nothing, as far as families differ."""


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling (Dubey et al. 2024; formula in workers/rope.py)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023; formula in workers/rope.py)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Round the range of the ramp to whole dimensions."""
    attention_factor: float | None
    """What cos and sin are multiplied by, where the configuration says so."""
    mscale: float | None
    mscale_all_dim: float | None


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class ModelShape:
    """The decoder's dimensions and flags."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """The longest sequence, with what rope scaling adds to it."""
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    windows: tuple[int | None, ...]
    """Per layer the sliding window (Jiang et al. 2023, Mistral 7B): how many positions a token sees, with its own; None: all."""
    tied_embeddings: bool
    qk_norm: bool
    """RMSNorm over head_dim on queries and keys before rope (Qwen3)."""
    qkv_bias: bool
    output_bias: bool
    """Of attention's output projection."""
    mlp_bias: bool
    dtype: str
    """The checkpoint's own: float32, bfloat16 or float16."""


def parse_shape(config: dict[str, Any], where: str) -> ModelShape:
    """ModelShape of a config.json; `where` is named in errors. Values that are missing have the defaults of transformers.

    Raises ConfigError for what is broken, or would need another decoder.
    """
    names = config.get("architectures") or []
    name = next((n for n in names if n in ARCHITECTURES), None)
    if name is None:
        given, known = ", ".join(names) or "(none named)", ", ".join(ARCHITECTURES)
        raise ConfigError(f"{where}: unsupported architecture {given}; known: {known}")
    family = ARCHITECTURES[name]
    config = {**_MISSING[family], **config}
    try:
        shape = _shape(family, config, where)
    except KeyError as error:
        raise ConfigError(f"{where}: config.json lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise ConfigError(f"{where}: config.json has a value that can't be used: {error}") from None
    _check(shape, config, where)
    return shape


def _shape(family: str, config: dict[str, Any], where: str) -> ModelShape:
    heads, hidden, layers = (int(config[name]) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    rope = {
        "partial_rotary_factor": config.get("partial_rotary_factor"),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    positions, theta = int(config["max_position_embeddings"]), float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    scaling = _rope_scaling(rope, positions, theta, where)
    attention_bias = bool(config.get("attention_bias", False))
    return ModelShape(
        family=family,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(config["num_key_value_heads"] or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        max_position_embeddings=_reach(positions, scaling),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=_windows(family, config, layers, where),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or (attention_bias and family != "mistral"),
        output_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _check(shape: ModelShape, config: dict[str, Any], where: str) -> None:
    sizes = (shape.vocab_size, shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    if min(sizes) < 1 or shape.max_position_embeddings < 1 or any(w is not None and w < 1 for w in shape.windows):
        raise ConfigError(f"{where}: config.json has a size below 1")
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(f"{where}: {shape.num_heads} heads don't divide into {shape.num_kv_heads} key/value heads")
    if shape.head_dim % 2:
        raise ConfigError(f"{where}: head_dim {shape.head_dim} is odd, but rotary embeddings turn pairs")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act {config['hidden_act']} is not supported, only silu")


# --- sliding windows -----------------------------------------------------------------------------------------------


def _windows(family: str, config: dict[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    """Mistral has one window for all layers, Qwen turns it on with a flag and from a layer's number on; both may name layers by
    type."""
    if family == "llama":
        return (None,) * layers
    window = config.get("sliding_window", 4096)
    if window is None or (family != "mistral" and not config.get("use_sliding_window", False)):
        return (None,) * layers
    types = config.get("layer_types")
    if types is None:
        first = 0 if family == "mistral" else int(config.get("max_window_layers", 28))
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{where}: layer_types must name full_attention or sliding_attention for each of {layers} layers")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in types)


# --- rope scaling --------------------------------------------------------------------------------------------------


def _linear(rope: dict[str, Any], positions: int) -> LinearScaling:
    return LinearScaling(float(rope["factor"]))


def _llama3(rope: dict[str, Any], positions: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope.get("original_max_position_embeddings") or positions),
    )


def _yarn(rope: dict[str, Any], positions: int) -> YarnScaling:
    original = int(rope.get("original_max_position_embeddings") or positions)
    attention_factor, mscale, mscale_all_dim = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    return YarnScaling(
        factor=float(rope.get("factor") or positions / original),
        original_max_position_embeddings=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=None if attention_factor is None else float(attention_factor),
        mscale=None if mscale is None else float(mscale),
        mscale_all_dim=None if mscale_all_dim is None else float(mscale_all_dim),
    )


_SCALINGS: dict[str, Callable[[dict[str, Any], int], RopeScaling]] = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _rope_scaling(rope: dict[str, Any], positions: int, theta: float, where: str) -> RopeScaling | None:
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{where}: rope_parameters by type of layer are not supported")
    if rope["partial_rotary_factor"] not in (None, 1.0):
        raise ConfigError(f"{where}: partial rotary embeddings are not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in _SCALINGS:
        raise ConfigError(f"{where}: rope scaling '{kind}' is not supported, only {', '.join(_SCALINGS)}")
    scaling = _SCALINGS[kind](rope, positions)
    possible = scaling.factor > 0
    if isinstance(scaling, Llama3Scaling):
        possible &= scaling.low_freq_factor < scaling.high_freq_factor and scaling.original_max_position_embeddings > 0
    if isinstance(scaling, YarnScaling):
        possible &= min(scaling.beta_fast, scaling.beta_slow, scaling.original_max_position_embeddings) > 0 and theta > 1
    if not possible:
        raise ConfigError(f"{where}: rope scaling makes no sense: {scaling}")
    return scaling


def _reach(positions: int, scaling: RopeScaling | None) -> int:
    """The longest sequence: linear scaling and YaRN are configured with the length before scaling, Llama 3 with the one after."""
    if isinstance(scaling, LinearScaling):
        return int(positions * scaling.factor)
    if isinstance(scaling, YarnScaling):
        return max(positions, int(scaling.original_max_position_embeddings * scaling.factor))
    return positions
