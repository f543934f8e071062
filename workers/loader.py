"""From a model directory to a Decoder: each tensor is converted, quantized and packed as it is read, so that no second copy builds
up; of a divided model each rank reads its own part only."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cluster.model import ModelFiles
from cluster.schemes import UNCHANGED, Recipe
from cluster.shape import ModelShape
from parallel.groups import SOLO_GROUP, Group
from parallel.linear import Multiply, RowParallel
from parallel.partition import Partition
from parallel.vocabulary import Embedding, LogitsHead
from workers.checkpoint import Checkpoint
from workers.decoder import Decoder, DecoderLayer
from workers.kernels import Kernels, MakeLinear
from workers.quantization.weight import QuantizedWeight
from workers.rope import Rope
from workers.weights import LinearWeights, Weight

_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"


def load_decoder(
    files: ModelFiles,
    part: Partition,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    *,
    kernels: Kernels,
    recipe: Recipe = UNCHANGED,
    peers: Group = SOLO_GROUP,
    progress: bool = False,
) -> Decoder:
    """Read a rank's part of the weights of `files`. Raises ConfigError naming a tensor that is missing, odd or superfluous.

    kernels: what computes them, on the device. recipe: what is quantized on the way. peers: the ranks that share these layers.
    progress: show a bar on stderr.
    """
    shape = files.shape
    recipe.check(shape.num_layers)
    with tqdm(total=len(part.layers) + 2, desc="loading weights", file=sys.stderr, disable=not progress, leave=False) as bar:
        weights = LinearWeights(Checkpoint(files.path), files.quantization, recipe, dtype, device)
        loader = _Loader(weights, shape, part, peers, kernels)
        layers = []
        for number in part.layers:
            layers.append(loader.layer(f"model.layers.{number}."))
            bar.update()
        rows = loader.embedding_rows()
        head = LogitsHead(kernels.head(loader.head(rows), dtype), part.vocab, peers) if part.judges else None
        bar.update()
        hidden_dtype = kernels.hidden_dtype(dtype)
        rope = Rope(shape.head_dim, shape.rope_theta, shape.rope_scaling, max_model_len, device)
        decoder = Decoder(
            shape=shape,
            part=part,
            kernels=kernels,
            dtype=dtype,
            embedding=Embedding(rows, part.own_vocab.start, hidden_dtype, peers) if rows is not None and part.embeds else None,
            stack=kernels.stack(shape, part, layers, rope, dtype),
            final_norm=kernels.norm(loader.vector(_FINAL_NORM, shape.hidden_size), shape.rms_norm_eps) if part.judges else None,
            lm_head=head,
        )
        loader.finish()
        bar.update()
    return decoder


@dataclass(frozen=True)
class _Loader:
    weights: LinearWeights
    shape: ModelShape
    part: Partition
    peers: Group
    kernels: Kernels

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's weight of `size` elements."""
        weights = self.weights
        return weights.checkpoint.take(f"{name}.weight", size).to(weights.device, weights.dtype, copy=True)

    def linear(
        self, prefix: str, parts: Mapping[str, tuple[int, range]], inputs: int, bias: bool, make: MakeLinear | None = None
    ) -> Multiply:
        """The linears `parts` (name -> all out_features, this rank's) of `inputs` features, side by side."""
        read = [self.weights.read(f"{prefix}{name}", size, inputs, rows=own) for name, (size, own) in parts.items()]
        biases = [self.weights.bias(f"{prefix}{name}", size, own) for name, (size, own) in parts.items() if bias]
        weight = self.weights.together(read, f"{prefix}{'+'.join(parts)}")
        return (make or self.kernels.linear)(weight, torch.cat(biases) if biases else None)

    def row_parallel(self, name: str, outputs: int, inputs: int, own: range, bias: bool) -> RowParallel:
        """The linear `name` of `inputs` features, of which this rank has `own`."""
        weight = self.weights.together([self.weights.read(name, outputs, inputs, columns=own)], name)
        added = self.weights.bias(name, outputs) if bias else None
        alone = self.peers.size == 1  # else each rank would add it
        part = self.kernels.linear(weight, added if alone else None, None if alone else self.peers.all_max)
        return RowParallel(part, None if alone else added, self.peers)

    def layer(self, prefix: str) -> DecoderLayer:
        """Weights under `prefix` ("model.layers.0.")."""
        shape, part = self.shape, self.part
        hidden, inner = shape.hidden_size, shape.intermediate_size
        heads, kv_heads = (_features(some, shape.head_dim) for some in (part.heads, part.kv_heads))
        query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = {"q_proj": (query, heads), "k_proj": (kv, kv_heads), "v_proj": (kv, kv_heads)}
        gate_up = {"gate_proj": (inner, part.inner), "up_proj": (inner, part.inner)}
        return DecoderLayer(
            input_norm=self.vector(f"{prefix}input_layernorm", hidden),
            qkv=self.linear(attention, qkv, hidden, shape.qkv_bias),
            qk_norm=self.qk_norm(attention) if shape.qk_norm else None,
            output=self.row_parallel(f"{attention}o_proj", hidden, query, heads, shape.output_bias),
            mlp_norm=self.vector(f"{prefix}post_attention_layernorm", hidden),
            gate_up=self.linear(mlp, gate_up, hidden, shape.mlp_bias, self.kernels.gate_up),
            down=self.row_parallel(f"{mlp}down_proj", hidden, inner, part.inner, shape.mlp_bias),
        )

    def qk_norm(self, prefix: str) -> Tensor:
        """[num_heads + num_kv_heads, head_dim] of this rank's heads, see DecoderLayer."""
        query = self.vector(f"{prefix}q_norm", self.shape.head_dim).expand(len(self.part.heads), -1)
        key = self.vector(f"{prefix}k_norm", self.shape.head_dim).expand(len(self.part.kv_heads), -1)
        return torch.cat((query, key))

    def embedding_rows(self) -> Tensor | None:
        """[this rank's vocabulary, hidden] on the device, in the checkpoint's dtype; None where nobody needs it."""
        if not self.part.embeds and not (self.part.judges and self.shape.tied_embeddings):
            return None
        shape = self.shape
        rows = self.weights.checkpoint.take(f"{_EMBEDDING}.weight", shape.vocab_size, shape.hidden_size, rows=self.part.own_vocab)
        return rows.to(self.weights.device, copy=True)

    def head(self, embedding: Tensor | None) -> Weight:
        """The same of the lm_head, which may be quantized."""
        shape = self.shape
        if not shape.tied_embeddings:
            head = self.weights.read(_HEAD, shape.vocab_size, shape.hidden_size, rows=self.part.own_vocab)
            return self.weights.together([head], _HEAD) if isinstance(head, QuantizedWeight) else head.to(self.weights.device)
        self.weights.checkpoint.ignore(f"{_HEAD}.weight")
        assert embedding is not None
        return self.weights.tied(_HEAD, embedding)

    def finish(self) -> None:
        """ConfigError for tensors that no rank takes. Those of layers that other stages hold are theirs to judge."""
        checkpoint = self.weights.checkpoint
        for number in range(self.shape.num_layers):
            if number not in self.part.layers:
                checkpoint.ignore(f"model.layers.{number}.")
        for name in (_EMBEDDING, _FINAL_NORM, _HEAD):
            if not (self.part.embeds and self.part.judges):
                checkpoint.ignore(f"{name}.")
        checkpoint.finish()


def _features(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
