"""The decoder of Llama (Touvron et al. 2023, Dubey et al. 2024), Mistral (Jiang et al. 2023), Qwen2 (Yang et al. 2024) and Qwen3
(Yang et al. 2025): one module, differences as flags of ModelShape.

    h = embedding[ids]
    per layer:  h += O · attention(rope(norm(Q)), rope(norm(K)), V)    with Q, K, V = W · rms_norm(h)     (inner norms: Qwen3)
                h += down(silu(gate(x)) * up(x))                       with x = rms_norm(h)
    logits = lm_head · rms_norm(h)

Everything but attention runs over the flat [num_tokens, hidden] batch and knows nothing of sequences (ORCA's selective batching).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.shape import ModelShape
from kv.pool import KVPool
from parallel.linear import Linear
from workers.attention import AttentionStep
from workers.rope import Rope, rotate


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer; [out, in] inside the linears, norms [hidden]."""

    input_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    """[num_heads + num_kv_heads, head_dim]: the query norm's weight for every query head, then the key norm's for every key
    head."""
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


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


@dataclass(frozen=True)
class Decoder:
    """A whole decoder-only model."""

    shape: ModelShape
    dtype: torch.dtype
    """That of activations and of the KV pool."""
    embedding: Tensor
    """[vocab, hidden], in the checkpoint's dtype: rows are converted as they are looked up."""
    rope: Rope
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    lm_head: "LogitsHead"

    def forward(self, batch: TokenBatch, pool: KVPool) -> Tensor:
        """Run the batch, write its keys and values to the pool; returns hidden states [num_tokens, hidden] before the last norm."""
        hidden = self.embedding[batch.ids].to(self.dtype)
        angles = self.rope.at(batch.positions)
        for number, layer in enumerate(self.layers):
            normed = rms_norm(hidden, layer.input_norm, self.shape.rms_norm_eps)
            hidden = hidden + self._attention(number, layer, normed, angles, batch, pool)
            normed = rms_norm(hidden, layer.mlp_norm, self.shape.rms_norm_eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(F.silu(gate) * up)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] rows of `forward` -> [n, vocab] fp32."""
        return self.lm_head(rms_norm(hidden, self.final_norm, self.shape.rms_norm_eps))

    def _attention(
        self, number: int, layer: DecoderLayer, normed: Tensor, angles: tuple[Tensor, Tensor], batch: TokenBatch, pool: KVPool
    ) -> Tensor:
        shape = self.shape
        heads = layer.qkv(normed).view(len(normed), -1, shape.head_dim)  # query heads, key heads, value heads
        turned, values = torch.split(heads, [shape.num_heads + shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if layer.qk_norm is not None:
            turned = rms_norm(turned, layer.qk_norm, shape.rms_norm_eps)
        queries, keys = torch.split(rotate(turned, *angles), [shape.num_heads, shape.num_kv_heads], dim=1)
        pool.write(number, batch.slots, keys, values)
        return layer.output(batch.attention.attend(number, queries, keys, values))


class LogitsHead:
    """The last linear. Its output is fp32 in every dtype: two logits that differ must not meet by rounding to bf16."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """weight [vocab, hidden]; dtype: that of the hidden states. On a CPU the weight is kept in fp32; on CUDA in `dtype`, with
        fp32 accumulation and output."""
        self._on_cpu = weight.device.type == "cpu"
        self._linear = Linear(weight.float()) if self._on_cpu else None
        self._weight = None if self._on_cpu else weight.to(dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab] fp32"""
        if self._linear is not None:
            return self._linear(hidden.float())
        assert self._weight is not None
        if hidden.dtype == torch.float32:
            return F.linear(hidden, self._weight)
        return torch.mm(hidden, self._weight.t(), out_dtype=torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang & Sennrich 2019 over the last dimension, in fp32; returned in x's dtype. weight broadcasts against x."""
    wide = x.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
