"""Small tokenizers of both families, trained on the spot."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from router.prepare import ServedModel
from router.tokenizer import Tokenizer, load

TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

_PAD = {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Streams of tokens become streams of text; a character may need several tokens.",
    "Grüße aus Köln! Ça va? Привет, мир. 你好,世界。 🙂🙃🎉 👩‍👩‍👧‍👦 ",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 22), 'ok')\n",
] * 3


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE tokenizer and a ChatML template."""
    path = tmp_path_factory.mktemp("byte-level")
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    encoder.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    encoder.add_tokens(["<think>", "naïve"])
    encoder.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": _PAD}
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return load(model_path)


@pytest.fixture(scope="session")
def sentence_pieces() -> tokenizers.Tokenizer:
    """A tokenizer as converted from Llama 2's: spaces replaced, byte fallback, a space put before the text."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = [line for line in CORPUS if line.isascii()]
    trained.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=600, special_tokens=special + bytes_, show_progress=False))
    document = json.loads(trained.to_str())
    document["model"]["byte_fallback"] = True
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in special]
    encoder = tokenizers.Tokenizer.from_str(json.dumps(document))
    encoder.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    encoder.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return encoder


@pytest.fixture(scope="session")
def served(tokenizer: Tokenizer) -> ServedModel:
    return ServedModel("tiny", max_model_len=256, vocab_size=len(tokenizer.vocabulary), created=1700000000)
