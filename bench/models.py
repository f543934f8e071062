"""Random-weight models to measure with: nothing is downloaded, anyone can make the same ones.

    python -m bench.models DIRECTORY [NAME ...]

S is a Llama of 35 million parameters, M a Qwen3 of 473 million (the 0.6B shape with a vocabulary of 32,000); for GPUs, L is a Llama
of 1.04 billion (the 3.2 1B shape) and XL one of 7.1 billion (the 3.1 8B shape), also with 32,000 entries. All are written as
bfloat16 safetensors, with a byte-level BPE tokenizer trained on the sources of Python's standard library and a ChatML template.
Speed doesn't depend on what the weights are; text that comes out is noise.
"""

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 32_000
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
    "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
}


def small() -> LlamaForCausalLM:
    """S: 8 layers of 512, 8 heads over 4 key/value heads of 64."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=4, **sizes, **_SHARED))


def medium() -> Qwen3ForCausalLM:
    """M: 28 layers of 1024, 16 heads over 8 key/value heads of 128."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
    return Qwen3ForCausalLM(Qwen3Config(num_attention_heads=16, num_key_value_heads=8, **sizes, **_SHARED))


def large() -> LlamaForCausalLM:
    """L: 16 layers of 2048, 32 heads over 8 key/value heads of 64."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, **sizes, **_SHARED))


def extra_large() -> LlamaForCausalLM:
    """XL: 32 layers of 4096, 32 heads over 8 key/value heads of 128."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, **sizes, **_SHARED))


MODELS = {"S": small, "M": medium, "L": large, "XL": extra_large}
DEFAULT = ("S", "M")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB_SIZE entries, learnt from this interpreter's standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_standard_library(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def write_model(name: str, directory: Path, tokenizer: PreTrainedTokenizerFast, device: str = "cpu") -> Path:
    """Write the model MODELS[name] to directory/name and return that path. The weights, drawn on `device`, are always the same
    there."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[name]().to(torch.bfloat16)
    target = directory / name
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="S, M, L, XL; default: S and M")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(MODELS)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    tokenizer = train_tokenizer()
    for name in arguments.names or DEFAULT:
        print(write_model(name, arguments.directory, tokenizer))


if __name__ == "__main__":
    main()
