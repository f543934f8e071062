"""Attention over the paged pool, behind one interface with several backends.

Queries come flat, [num_tokens, num_heads, head_dim]: this is the one operator that must know where a sequence begins and ends
(ORCA's selective batching, Yu et al. 2022).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cluster.config import ConfigError
from kv.pool import KVPool
from workers.attention.portable import PortableAttention
from workers.attention.reference import ReferenceAttention
from workers.attention.spans import PagedSpans

__all__ = ["AttentionBackend", "AttentionStep", "PagedSpans", "make_attention"]


class AttentionStep(Protocol):
    """Attention of one iteration: its metadata is built once and serves every layer."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim], contiguous.

        keys and values [num_tokens, num_kv_heads, head_dim] are the batch's own, which the pool holds already: a span that
        begins at position 0 may attend to them without reading a pool that keeps them as they are.
        """


class AttentionBackend(Protocol):
    """One way to compute attention over a pool."""

    def prepare(self, spans: PagedSpans) -> AttentionStep:
        """Build the metadata of one iteration."""


def make_attention(name: str, pool: KVPool, windows: Sequence[int | None], dtype: torch.dtype) -> AttentionBackend:
    """The backend of torch's operators that `Config.kernels` names, for layers with these sliding windows (see ModelShape) and
    queries in dtype."""
    if name == "reference":
        return ReferenceAttention(pool, windows)
    if name == "torch":
        return PortableAttention(pool, windows, dtype)
    raise ConfigError(f"attention by '{name}'; choose one of torch, reference")
