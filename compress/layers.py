"""A model layer by layer: which linears it has, their weights, and what goes into each while text runs through a layer.

The layer itself is the decoder's own (workers.decoder.TorchLayers), in fp32; attention is over whole rows of equal length, without
a paged pool.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.model import ModelFiles
from cluster.schemes import HEAD, linear_names
from cluster.shape import ModelShape
from kv.pool import KVPool
from parallel.groups import SOLO_GROUP
from parallel.linear import RowParallel
from parallel.partition import partition
from workers.checkpoint import Checkpoint
from workers.decoder import DecoderLayer, TokenBatch, TorchLayers
from workers.quantization.stored import read_linear
from workers.rope import Rope

EMBEDDING, FINAL_NORM = "model.embed_tokens", "model.norm"
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A layer's linears in the order in which they are computed; those side by side have the same input."""
Observe = Callable[[int, Tensor], None]
"""Called with the number of a stage and its input [n, inputs]."""


@dataclass(frozen=True)
class LinearShape:
    """Of a linear."""

    outputs: int
    inputs: int
    bias: bool


def linears_of(shape: ModelShape) -> dict[str, LinearShape]:
    """By name, without what stands before it: those of a layer."""
    hidden, inner, query = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    kv = shape.num_kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": LinearShape(query, hidden, shape.qkv_bias),
        "self_attn.k_proj": LinearShape(kv, hidden, shape.qkv_bias),
        "self_attn.v_proj": LinearShape(kv, hidden, shape.qkv_bias),
        "self_attn.o_proj": LinearShape(hidden, query, shape.output_bias),
        "mlp.gate_proj": LinearShape(inner, hidden, shape.mlp_bias),
        "mlp.up_proj": LinearShape(inner, hidden, shape.mlp_bias),
        "mlp.down_proj": LinearShape(hidden, inner, shape.mlp_bias),
    }


def all_linears(shape: ModelShape) -> list[str]:
    """Full names, the lm_head's last, though it may be tied."""
    return linear_names(shape.num_layers)


def num_parameters(shape: ModelShape) -> int:
    """Of the model before it was quantized; a tied head is not counted twice."""
    linears = linears_of(shape).values()
    layer = sum(one.outputs * (one.inputs + one.bias) for one in linears) + sum(_norms(shape).values())
    rows = shape.vocab_size * shape.hidden_size
    return shape.num_layers * layer + rows * (1 if shape.tied_embeddings else 2) + shape.hidden_size


def _norms(shape: ModelShape) -> dict[str, int]:
    norms = {"input_layernorm": shape.hidden_size, "post_attention_layernorm": shape.hidden_size}
    return norms | ({"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim} if shape.qk_norm else {})


class Weights:
    """The tensors of a model directory, read as they are asked for. Raises ConfigError where one is missing or odd."""

    def __init__(self, files: ModelFiles) -> None:
        self._files, self._checkpoint = files, Checkpoint(files.path)

    def layer(self, number: int) -> dict[str, Tensor]:
        """All tensors of a layer, by name without what stands before it. Quantized weights in fp32, others as they are stored."""
        before, shape = f"model.layers.{number}.", self._files.shape
        found = {}
        for name, linear in linears_of(shape).items():
            found[f"{name}.weight"] = self._linear(before + name, linear.outputs, linear.inputs)
            if linear.bias:
                found[f"{name}.bias"] = self._checkpoint.take(f"{before}{name}.bias", linear.outputs)
        for name, size in _norms(shape).items():
            found[f"{name}.weight"] = self._checkpoint.take(f"{before}{name}.weight", size)
        return found

    def embedding(self) -> Tensor:
        """[vocab, hidden]"""
        return self._checkpoint.take(f"{EMBEDDING}.weight", self._files.shape.vocab_size, self._files.shape.hidden_size)

    def final_norm(self) -> Tensor:
        """[hidden]"""
        return self._checkpoint.take(f"{FINAL_NORM}.weight", self._files.shape.hidden_size)

    def head(self) -> Tensor | None:
        """[vocab, hidden]; None where it is the embedding."""
        shape = self._files.shape
        if shape.tied_embeddings:
            self._checkpoint.ignore(f"{HEAD}.")
            return None
        return self._linear(HEAD, shape.vocab_size, shape.hidden_size)

    def finish(self) -> None:
        """Once all was asked for. ConfigError where there are tensors that belong to nothing."""
        for number in range(self._files.shape.num_layers):  # those that an earlier run has read
            self._checkpoint.ignore(f"model.layers.{number}.")
        self._checkpoint.finish()

    def _linear(self, name: str, outputs: int, inputs: int) -> Tensor:
        quantization = self._files.quantization
        if quantization is None or quantization.of(name) is None:
            return self._checkpoint.take(f"{name}.weight", outputs, inputs)
        return read_linear(self._checkpoint, quantization, name, outputs, inputs).dequantized()


class LayerRun:
    """A layer that runs over rows of equal length."""

    def __init__(
        self,
        shape: ModelShape,
        number: int,
        weights: dict[str, Tensor],
        length: int,
        observe: Observe | None = None,
        last: int = len(STAGES),
    ) -> None:
        """weights: see Weights.layer; of any floating-point dtype, kept in fp32. observe: is told each stage's input. last: the
        stage that is not computed any more, when its input has been told."""
        self._shape, self._length, self._observe, self._last = shape, length, observe, last
        device = torch.device("cpu")
        rope = Rope(shape.head_dim, shape.rope_theta, shape.rope_scaling, length, device)
        part = replace(partition(shape), layers=range(number, number + 1))
        self._layers = TorchLayers(shape, part, rope, (self._layer(weights),), torch.float32)
        self._attention = _RowAttention(length, shape.windows[number])
        self._nowhere = KVPool(1, 2, 16, shape.num_kv_heads, shape.head_dim, torch.float32, device)

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """hidden [rows, length, hidden] fp32 -> the same; None where a stage is not computed."""
        positions = torch.arange(self._length).repeat(len(hidden))
        batch = TokenBatch(positions, positions, torch.zeros_like(positions), self._attention)  # ids are not looked at here
        try:
            return self._layers.run(batch, self._nowhere, hidden.flatten(0, 1)).view(hidden.shape)
        except _Stopped:
            return None

    def _layer(self, weights: dict[str, Tensor]) -> DecoderLayer:
        norms = {name: weights[f"{name}.weight"].float() for name in _norms(self._shape)}
        qk_norm = None
        if self._shape.qk_norm:
            query = norms["self_attn.q_norm"].expand(self._shape.num_heads, -1)
            qk_norm = torch.cat((query, norms["self_attn.k_norm"].expand(self._shape.num_kv_heads, -1)))
        qkv, output, gate_up, down = (self._stage(weights, number) for number in range(len(STAGES)))
        before, between = norms["input_layernorm"], norms["post_attention_layernorm"]
        attended, added = (RowParallel(own, None, SOLO_GROUP) for own in (output, down))
        return DecoderLayer(before, qkv, qk_norm, attended, between, gate_up, added)

    def _stage(self, weights: dict[str, Tensor], number: int) -> "_Watched":
        if number >= self._last:  # multiplies nothing
            return _Watched(torch.empty(0, 0), None, number, self._observe, stops=True)
        names = STAGES[number]
        parts = [weights[f"{name}.weight"].float() for name in names]
        biases = [weights[f"{name}.bias"].float() for name in names if f"{name}.bias" in weights]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return _Watched(whole, torch.cat(biases) if biases else None, number, self._observe, stops=False)


class _Stopped(Exception):
    """All that was asked for was seen."""


class _Watched:
    """A linear that tells what it multiplies."""

    def __init__(self, weight: Tensor, bias: Tensor | None, number: int, observe: Observe | None, stops: bool) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias
        self._number, self._observe, self._stops = number, observe, stops

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features]"""
        if self._observe is not None:
            self._observe(self._number, x)
        if self._stops:
            raise _Stopped
        return F.linear(x, self.weight, self.bias)


class _RowAttention:
    """Causal attention inside each row, through a sliding window or not."""

    def __init__(self, length: int, window: int | None) -> None:
        back = torch.arange(length)[:, None] - torch.arange(length)
        self._length = length
        self._seen = None if window is None or window >= length else (back >= 0) & (back < window)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See AttentionStep; the batch is all there is."""
        queries, keys, values = (x.view(-1, self._length, *x.shape[1:]).transpose(1, 2) for x in (queries, keys, values))
        causal = self._seen is None
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._seen, is_causal=causal, enable_gqa=True)
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)
