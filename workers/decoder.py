"""The decoder of Llama (Touvron et al. 2023, Dubey et al. 2024), Mistral (Jiang et al. 2023), Qwen2 (Yang et al. 2024) and Qwen3
(Yang et al. 2025): one module, differences as flags of ModelShape.

    h = embedding[ids]
    per layer:  h += O · attention(rope(norm(Q)), rope(norm(K)), V)    with Q, K, V = W · rms_norm(h)     (inner norms: Qwen3)
                h += down(silu(gate(x)) * up(x))                       with x = rms_norm(h)
    logits = lm_head · rms_norm(h)

Everything but attention runs over the flat [num_tokens, hidden] batch and knows nothing of sequences (ORCA's selective batching).
A Decoder holds a rank's part of the model: some layers, and of each some heads and inner features. TorchLayers below is what is
computed; workers/native does the same on CPUs in C++.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.shape import ModelShape
from kv.pool import KVPool
from parallel.linear import Multiply, RowParallel
from parallel.partition import Partition
from parallel.vocabulary import Embedding, LogitsHead
from workers.attention import AttentionStep
from workers.rope import Rope, rotate

if TYPE_CHECKING:
    from workers.kernels import Kernels


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer; [out, in] inside the linears, norms [hidden]."""

    input_norm: Tensor
    qkv: Multiply
    qk_norm: Tensor | None
    """[num_heads + num_kv_heads, head_dim]: the query norm's weight for every query head, then the key norm's for every key
    head. Of this rank's heads."""
    output: RowParallel
    mlp_norm: Tensor
    gate_up: Multiply
    down: RowParallel


@dataclass(frozen=True)
class TokenBatch:
    """One iteration's flat batch."""

    ids: Tensor
    """[num_tokens] int64"""
    positions: Tensor
    """[num_tokens] int64"""
    slots: Tensor
    """[num_tokens] int64: where in the pool each token's key and value go."""
    attention: AttentionStep


Norm = Callable[[Tensor], Tensor]
"""[n, hidden] -> the same, normed and weighted."""


class LayerStack(Protocol):
    """A rank's layers, however they are computed."""

    layers: tuple[DecoderLayer, ...]
    hidden_dtype: torch.dtype
    """Of hidden states between layers and stages."""

    def run(self, batch: TokenBatch, pool: KVPool, hidden: Tensor) -> Tensor:
        """hidden [num_tokens, hidden], which may be overwritten, through all layers; writes their keys and values to the pool."""


@dataclass(frozen=True)
class Decoder:
    """A decoder-only model, or a rank's part of it."""

    shape: ModelShape
    """Of the whole model."""
    part: Partition
    kernels: "Kernels"
    """What it is computed by."""
    dtype: torch.dtype
    """That of weights."""
    embedding: Embedding | None
    """In the first stage."""
    stack: LayerStack
    final_norm: Norm | None
    """In the last stage."""
    lm_head: LogitsHead | None
    """In the last stage."""

    def forward(self, batch: TokenBatch, pool: KVPool, hidden: Tensor | None) -> Tensor:
        """Run the batch through the layers, write its keys and values to the pool.

        hidden [num_tokens, hidden]: what the stage before returned, None in the first stage. Returns the same, of these layers:
        from the last stage the hidden states before the last norm.
        """
        if hidden is None:
            assert self.embedding is not None
            hidden = self.embedding(batch.ids)
        return self.stack.run(batch, pool, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] rows of `forward` -> [n, vocab] fp32. In the last stage only, there by all ranks."""
        assert self.lm_head is not None
        assert self.final_norm is not None
        return self.lm_head(self.final_norm(hidden))


@dataclass
class TorchLayers:
    """The layers by torch's operators, on any device."""

    shape: ModelShape
    part: Partition
    rope: Rope
    layers: tuple[DecoderLayer, ...]
    hidden_dtype: torch.dtype

    def run(self, batch: TokenBatch, pool: KVPool, hidden: Tensor) -> Tensor:
        """See LayerStack."""
        angles = self.rope.at(batch.positions)
        for number, layer in enumerate(self.layers):
            normed = rms_norm(hidden, layer.input_norm, self.shape.rms_norm_eps)
            hidden = hidden + self._attention(number, layer, normed, angles, batch, pool)
            normed = rms_norm(hidden, layer.mlp_norm, self.shape.rms_norm_eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return hidden

    def _attention(
        self, number: int, layer: DecoderLayer, normed: Tensor, angles: tuple[Tensor, Tensor], batch: TokenBatch, pool: KVPool
    ) -> Tensor:
        shape, num_heads, num_kv_heads = self.shape, len(self.part.heads), len(self.part.kv_heads)
        heads = layer.qkv(normed).view(len(normed), -1, shape.head_dim)  # query heads, key heads, value heads
        turned, values = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], dim=1)
        if layer.qk_norm is not None:
            turned = rms_norm(turned, layer.qk_norm, shape.rms_norm_eps)
        queries, keys = torch.split(rotate(turned, *angles), [num_heads, num_kv_heads], dim=1)
        pool.write(number, batch.slots, keys, values)
        return layer.output(batch.attention.attend(number, queries, keys, values))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang & Sennrich 2019 over the last dimension, in fp32; returned in x's dtype. weight broadcasts against x."""
    wide = x.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
