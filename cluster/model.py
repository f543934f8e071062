"""A model directory as far as everyone must know it: its shape, its special tokens, where its files are. No tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.quantization_config import StoredQuantization, parse_quantization
from cluster.shape import ModelShape, parse_shape

DEMO_MODEL = Path(__file__).resolve().parent.parent / "deploy" / "demo"
"""The model that comes with the code."""


@dataclass(frozen=True)
class ModelFiles:
    """A resolved model directory."""

    path: Path
    shape: ModelShape
    eos_token_ids: tuple[int, ...]
    quantization: StoredQuantization | None = None
    """How its linears are stored, where some are quantized."""


def open_model(model: str, revision: str | None = None, *, weights: bool = True) -> ModelFiles:
    """Find `model` (a directory, or a hub id, which is downloaded into the hub's cache) and read its configuration.

    weights: download them too. Raises ConfigError where it isn't there, is incomplete or of an architecture that Rayline has no
    decoder for.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _download(model, revision, weights)
    config = _read_json(path / "config.json", required=True)
    generation = _read_json(path / "generation_config.json", required=False)
    if weights and not list(path.glob("*.safetensors")):
        raise ConfigError(f"{path} has no *.safetensors file")
    shape, quantization = parse_shape(config, str(path)), parse_quantization(config, str(path))
    return ModelFiles(path, shape, _eos_ids(config, generation), quantization)


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


def _download(model: str, revision: str | None, weights: bool) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"no such model directory: {model}")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ConfigError(f"{model} is no local directory and cannot be had from the hub: {reason}") from None
