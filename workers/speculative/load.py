"""The draft model that the settings name, loaded on the rank that draws."""

import torch

from cluster.config import Config, ConfigError
from cluster.model import ModelFiles, open_model
from cluster.schemes import parse_recipe
from cluster.shape import ModelShape
from parallel.partition import partition
from workers.decoder import Decoder
from workers.device import resolve_dtype
from workers.kernels import Kernels
from workers.loader import load_decoder


def load_draft(config: Config, target: ModelShape, max_model_len: int, device: torch.device, kernels: Kernels) -> Decoder | None:
    """The whole of it, whatever the target is divided into; None where the settings name none. Raises ConfigError."""
    if config.draft_model is None:
        return None
    files = open_draft(config, target, max_model_len)
    dtype = resolve_dtype(config.dtype, files.shape.dtype, device, kernels.cpu_dtypes)
    recipe = parse_recipe(config.draft_quantization)
    return load_decoder(files, partition(files.shape), dtype, device, max_model_len, kernels=kernels, recipe=recipe)


def open_draft(config: Config, target: ModelShape, max_model_len: int) -> ModelFiles:
    """The files of the draft model that the settings name. Raises ConfigError where it can't propose for the target."""
    assert config.draft_model is not None
    files = open_model(config.draft_model, config.draft_revision)
    if files.shape.vocab_size != target.vocab_size:
        sizes = f"{files.shape.vocab_size} tokens, but the model {target.vocab_size}"
        raise ConfigError(f"the draft model has {sizes}: they must have the same vocabulary")
    positions = files.shape.max_position_embeddings
    if positions < max_model_len:
        raise ConfigError(f"the draft model has positions for {positions} tokens, but max_model_len is {max_model_len}")
    return files
