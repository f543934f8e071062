"""From a model directory to a Decoder: each tensor is converted and packed as it is read, so that no second copy builds up."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cluster.model import ModelFiles
from cluster.shape import ModelShape
from parallel.linear import Linear, fused
from workers.checkpoint import Checkpoint
from workers.decoder import Decoder, DecoderLayer, LogitsHead
from workers.rope import Rope


def load_decoder(
    files: ModelFiles, dtype: torch.dtype, device: torch.device, max_model_len: int, *, progress: bool = False
) -> Decoder:
    """Read the weights of `files`. Raises ConfigError naming a tensor that is missing, odd or superfluous.

    progress: show a bar on stderr.
    """
    shape = files.shape
    with tqdm(total=shape.num_layers + 2, desc="loading weights", file=sys.stderr, disable=not progress, leave=False) as bar:
        loader = _Loader(Checkpoint(files.path), shape, dtype, device)
        layers = []
        for number in range(shape.num_layers):
            layers.append(loader.layer(f"model.layers.{number}."))
            bar.update()
        embedding = loader.checkpoint.take("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size).to(device, copy=True)
        head = LogitsHead(loader.head_weight(embedding), dtype)
        bar.update()
        decoder = Decoder(
            shape=shape,
            dtype=dtype,
            embedding=embedding,
            rope=Rope(shape.head_dim, shape.rope_theta, shape.rope_scaling, max_model_len, device),
            layers=tuple(layers),
            final_norm=loader.vector("model.norm.weight", shape.hidden_size),
            lm_head=head,
        )
        loader.checkpoint.finish()
        bar.update()
    return decoder


@dataclass(frozen=True)
class _Loader:
    checkpoint: Checkpoint
    shape: ModelShape
    dtype: torch.dtype
    device: torch.device

    def vector(self, name: str, size: int) -> Tensor:
        """A norm's weight or a bias, [size]."""
        return self.checkpoint.take(name, size).to(self.device, self.dtype, copy=True)

    def linear(self, prefix: str, parts: dict[str, int], inputs: int, bias: bool) -> Linear:
        """The linears `parts` (name -> out_features) of `inputs` features, side by side."""
        weights = [self.checkpoint.take(f"{prefix}{name}.weight", size, inputs) for name, size in parts.items()]
        biases = [self.checkpoint.take(f"{prefix}{name}.bias", size) for name, size in parts.items()] if bias else None
        return fused(weights, biases, self.dtype, self.device)

    def layer(self, prefix: str) -> DecoderLayer:
        """Weights under `prefix` ("model.layers.0.")."""
        shape = self.shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return DecoderLayer(
            input_norm=self.vector(f"{prefix}input_layernorm.weight", hidden),
            qkv=self.linear(attention, {"q_proj": query, "k_proj": kv, "v_proj": kv}, hidden, shape.qkv_bias),
            qk_norm=self.qk_norm(attention) if shape.qk_norm else None,
            output=self.linear(attention, {"o_proj": hidden}, query, shape.output_bias),
            mlp_norm=self.vector(f"{prefix}post_attention_layernorm.weight", hidden),
            gate_up=self.linear(mlp, {"gate_proj": inner, "up_proj": inner}, hidden, shape.mlp_bias),
            down=self.linear(mlp, {"down_proj": hidden}, inner, shape.mlp_bias),
        )

    def qk_norm(self, prefix: str) -> Tensor:
        """[num_heads + num_kv_heads, head_dim], see DecoderLayer."""
        query = self.vector(f"{prefix}q_norm.weight", self.shape.head_dim).expand(self.shape.num_heads, -1)
        key = self.vector(f"{prefix}k_norm.weight", self.shape.head_dim).expand(self.shape.num_kv_heads, -1)
        return torch.cat((query, key))

    def head_weight(self, embedding: Tensor) -> Tensor:
        """[vocab, hidden] on the device, in the checkpoint's dtype."""
        if self.shape.tied_embeddings:
            self.checkpoint.ignore("lm_head.weight")
            return embedding
        return self.checkpoint.take("lm_head.weight", self.shape.vocab_size, self.shape.hidden_size).to(self.device)
