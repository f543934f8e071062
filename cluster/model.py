"""A model directory as far as everyone must know it: its shape, its special tokens, where its files are. No tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ConfigError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (Dubey et al. 2024; formula in workers/rope.py)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """The decoder's dimensions and flags, from config.json."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qk_norm: bool
    """RMSNorm over head_dim on queries and keys before rope (Qwen3)."""
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    """The checkpoint's own: float32, bfloat16 or float16."""

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size


@dataclass(frozen=True)
class ModelFiles:
    """A resolved model directory."""

    path: Path
    shape: ModelShape
    eos_token_ids: tuple[int, ...]


def open_model(model: str, revision: str | None = None) -> ModelFiles:
    """Find `model` (a directory, or a hub id, which is downloaded into the hub's cache) and read its configuration.

    Raises ConfigError where it isn't there, is incomplete or of an architecture that Rayline has no decoder for.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _download(model, revision)
    config = _read_json(path / "config.json", required=True)
    generation = _read_json(path / "generation_config.json", required=False)
    if not list(path.glob("*.safetensors")):
        raise ConfigError(f"{path} has no *.safetensors file")
    return ModelFiles(path, parse_shape(config, str(path)), _eos_ids(config, generation))


def parse_shape(config: dict[str, Any], where: str) -> ModelShape:
    """ModelShape of a Hugging Face config.json; `where` is named in errors."""
    names = config.get("architectures") or []
    name = next((n for n in names if n in ARCHITECTURES), None)
    if name is None:
        given, known = ", ".join(names) or "(none named)", ", ".join(ARCHITECTURES)
        raise ConfigError(f"{where}: unsupported architecture {given}; known: {known}")
    family = ARCHITECTURES[name]
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        shape = ModelShape(
            family=family,
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope, where),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=family == "qwen3",
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )
    except KeyError as error:
        raise ConfigError(f"{where}: config.json lacks {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: config.json has a value that can't be used: {error}") from None
    _check_shape(shape, config, where)
    return shape


def _check_shape(shape: ModelShape, config: dict[str, Any], where: str) -> None:
    sizes = (shape.vocab_size, shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    if min(sizes) < 1:
        raise ConfigError(f"{where}: config.json has a size below 1")
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(f"{where}: {shape.num_heads} heads don't divide into {shape.num_kv_heads} key/value heads")
    if shape.head_dim % 2:
        raise ConfigError(f"{where}: head_dim {shape.head_dim} is odd, but rotary embeddings turn pairs")
    if config.get("use_sliding_window"):
        raise ConfigError(f"{where}: sliding-window attention is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act {config['hidden_act']} is not supported, only silu")
    if config.get("quantization_config"):
        raise ConfigError(f"{where}: quantized checkpoints are not supported")


def _rope_scaling(rope: dict[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"{where}: rope scaling '{kind}' is not supported, only llama3")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _eos_ids(config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigError(f"{path.parent} has no {path.name}") from None
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no JSON object")
    return content


def _download(model: str, revision: str | None) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"no such model directory: {model}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ConfigError(f"{model} is no local directory and cannot be had from the hub: {reason}") from None
