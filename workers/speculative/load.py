"""From the settings to a Drafter, on the rank that draws."""

from dataclasses import dataclass

import torch

from cluster.config import Config, ConfigError
from cluster.model import ModelFiles, open_model
from cluster.shape import ModelShape
from kv.pool import HostBlocks, KVPool
from parallel.partition import partition
from workers.device import resolve_dtype
from workers.kernels import Kernels
from workers.loader import load_decoder
from workers.paged import PagedModel
from workers.speculative.draft import DraftModel


@dataclass(frozen=True)
class Draft:
    """A draft model that is to be loaded."""

    files: ModelFiles
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Of its keys and values."""
        return partition(self.files.shape).kv_bytes_per_token(self.files.shape, self.dtype.itemsize)

    def pool(self, num_blocks: int, block_size: int, device: torch.device) -> KVPool:
        """Its keys and values, under the target's block ids."""
        shape = self.files.shape
        return KVPool(shape.num_layers, num_blocks, block_size, shape.num_kv_heads, shape.head_dim, self.dtype, device)

    def load(self, pool: KVPool, host: HostBlocks | None, max_model_len: int, kernels: Kernels) -> DraftModel:
        """Read its weights. Raises ConfigError."""
        part, device = partition(self.files.shape), pool.keys.device
        decoder = load_decoder(self.files, part, self.dtype, device, max_model_len, kernels=kernels)
        return DraftModel(PagedModel(decoder, pool, host))


def open_draft(config: Config, target: ModelShape, device: torch.device, kernels: Kernels) -> Draft | None:
    """That of the settings, None where they name none. Raises ConfigError where it can't propose for the target."""
    if config.draft_model is None:
        return None
    files = open_draft_files(config.draft_model, target)
    return Draft(files, resolve_dtype(config.dtype, files.shape.dtype, device, kernels.cpu_dtypes))


def open_draft_files(name: str, target: ModelShape) -> ModelFiles:
    """Of a directory or hub id. Raises ConfigError where it can't propose for the target."""
    files = open_model(name)
    if files.shape.vocab_size != target.vocab_size:
        sizes = f"{files.shape.vocab_size} tokens, but the model {target.vocab_size}"
        raise ConfigError(f"the draft model has {sizes}: they must have the same vocabulary")
    return files
