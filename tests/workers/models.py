"""Tiny randomly initialised models of odd sizes, written by transformers, to compare with."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cluster.config import Config
from cluster.model import open_model
from workers.runner import ModelRunner, load_runner

VOCAB = 173
MAX_LEN = 256

_COMMON = {"vocab_size": VOCAB, "max_position_embeddings": MAX_LEN, "initializer_range": 0.4, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "llama3-rope-tied": (
        "llama",
        {
            "hidden_size": 40,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "rope_parameters": _LLAMA3,
            "tie_word_embeddings": True,
        },
    ),
    "llama-biases": (
        "llama",
        {
            "hidden_size": 36,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 18,
        },
    ),
    "qwen3-tied-bias": (
        "qwen3",
        {
            "hidden_size": 32,
            "intermediate_size": 104,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
    "llama-linear-rope": (
        "llama",
        {
            "hidden_size": 44,
            "intermediate_size": 60,
            "num_hidden_layers": 2,
            "num_attention_heads": 11,
            "num_key_value_heads": 11,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        },
    ),
    "mistral": (  # a window of less than a block, heads of another size than hidden_size / heads
        "mistral",
        {
            "hidden_size": 52,
            "intermediate_size": 68,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 22,
            "sliding_window": 5,
        },
    ),
    "mistral-yarn": (
        "mistral",
        {
            "hidden_size": 42,
            "intermediate_size": 50,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "sliding_window": 27,
            "rope_parameters": _YARN | {"beta_fast": 8.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.3},
        },
    ),
    "mistral-no-window": (
        "mistral",
        {
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "sliding_window": None,
        },
    ),
    "qwen2": (
        "qwen2",
        {
            "hidden_size": 56,
            "intermediate_size": 76,
            "num_hidden_layers": 3,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "rope_parameters": _YARN,
        },
    ),
    "qwen2-window-tied": (
        "qwen2",
        {
            "hidden_size": 36,
            "intermediate_size": 52,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "use_sliding_window": True,
            "sliding_window": 19,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-window": (
        "qwen3",
        {
            "hidden_size": 40,
            "intermediate_size": 60,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 14,
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": _YARN | {"attention_factor": 1.3},
        },
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A model directory and the model transformers made it from."""

    path: Path
    oracle: Any

    def runner(self, **settings: Any) -> ModelRunner:
        """A runner with 60 blocks of 8 tokens unless said otherwise."""
        num_blocks = settings.pop("num_blocks", 60)
        config = Config(**{"model": str(self.path), "dtype": "float32", "device": "cpu", "block_size": 8, **settings})
        return load_runner(open_model(str(self.path)), config, num_blocks=num_blocks)

    def oracle_logits(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocab] by transformers."""
        with torch.no_grad():
            logits: torch.Tensor = self.oracle(torch.tensor([ids])).logits[0]
        return logits

    def oracle_greedy(self, ids: list[int], num_tokens: int) -> list[int]:
        """Greedy continuation by transformers, end-of-sequence ignored."""
        out = self.oracle.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        tokens: list[int] = out[0, len(ids) :].tolist()
        return tokens


def make_model(
    path: Path, kind: str, dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB, layers: int | None = None, **save: Any
) -> TinyModel:
    """Write a model of KINDS[kind] to `path`; its norms and biases are random too, so that none can be forgotten unseen.

    layers: how many instead of the kind's own.
    """
    family, sizes = KINDS[kind]
    sizes = sizes | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(len(kind))
    config, model = FAMILIES[family]
    # Attention in transformers' own operators: its SDPA path drops the mask where it takes a window for wide enough.
    oracle = model(config(**_COMMON | {"vocab_size": vocab_size}, **sizes, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    oracle = oracle.to(dtype).eval()
    oracle.save_pretrained(path, **save)
    return TinyModel(path, oracle)


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Random token ids."""
    rng = random.Random(f"prompt {length} {seed}")
    return [rng.randrange(vocab) for _ in range(length)]
