"""The demo model: its corpus, its training in miniature, and the copy that ships."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from compress.corpus import IM_END, Corpus, Document, Rows, chats, collect, functions, is_held_out, stream, train_tokenizer
from compress.train_demo import Recipe, Shape, train
from compress.training import Schedule, Trainer, orthogonal, processor_time

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
TINY = Shape(vocab=320, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64)

MODULE = '''"""Module number {n}."""


def double_{n}(value):
    """Return twice the value, plus the number of this module."""
    if value is None:
        return {n}
    return 2 * value + {n}
'''

SNIPPET = '''import os


class Inventory:
    """Count how many of each item there are."""

    def __init__(self, items=None):
        self.items = {}
        for name in items or ():
            self.add(name)

    def add(self, name, count=1):
        if not isinstance(name, str):
            raise TypeError("name must be a string")
        self.items[name] = self.items.get(name, 0) + count

    def __len__(self):
        return sum(self.items.values())
'''


def tiny_recipe(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {"minutes": None, "steps": 4, "batch_tokens": 128, "micro_tokens": 64, "context": 32}
    return Recipe(shape=TINY, long_context=TINY.positions, compiled=False, **(settings | changes))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder that looks like a small standard library."""
    root = tmp_path / "lib"
    for number in range(120):
        path = root / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE.format(n=number), encoding="utf-8")
    for name in ("site-packages/a.py", "package0/tests/b.py", "test/c.py", "lib-dynload/d.py", "encodings/e.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("unwanted = True\n", encoding="utf-8")
    (root / "latin.py").write_bytes(b"name = '\xe9'\n")
    return root


@pytest.fixture
def corpus(library: Path) -> Corpus:
    return collect(library)


@pytest.fixture
def tokenizer(corpus: Corpus) -> Tokenizer:
    return train_tokenizer((document.text for document in corpus.training), TINY.vocab)


# ------------------------------------------------------------------------- corpus


def test_split_is_deterministic_disjoint_and_by_path(library: Path, corpus: Corpus) -> None:
    assert collect(library) == corpus
    training = {document.path for document in corpus.training}
    held_out = {document.path for document in corpus.held_out}
    assert training.isdisjoint(held_out)
    assert len(training | held_out) == 120
    assert held_out
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, training))


def test_unwanted_files_are_left_out(corpus: Corpus) -> None:
    documents = corpus.training + corpus.held_out
    assert all("unwanted" not in document.text for document in documents)
    assert all(document.path != "latin.py" for document in documents)


def test_about_three_percent_are_held_out() -> None:
    share = sum(is_held_out(f"folder/file{number}.py") for number in range(20_000)) / 20_000
    assert 0.025 < share < 0.035


def test_listing_changes_with_any_text(corpus: Corpus) -> None:
    first, *rest = corpus.training
    changed = Corpus((Document(first.path, first.text + "#"), *rest), corpus.held_out)
    assert changed.listing()["training"] != corpus.listing()["training"]
    assert changed.listing()["held_out"] == corpus.listing()["held_out"]


def test_functions_are_dedented_whole_lines() -> None:
    text = (
        "class A:\n    def long_enough(self):\n        # A remark that makes it long enough to be taken.\n        return self\n\n"
        "    x = 1\n"
    )
    (found,) = functions(Document("a.py", text))
    assert found == (
        "long_enough",
        "def long_enough(self):\n    # A remark that makes it long enough to be taken.\n    return self",
    )
    assert list(functions(Document("b.py", "print 'old'"))) == []


def test_chats_end_the_answer_and_do_not_repeat(corpus: Corpus) -> None:
    examples = chats(corpus.training * 2)
    assert len(examples) == len(set(examples)) == len(corpus.training)
    for example in examples:
        assert example.count("<|im_start|>assistant\ndef double_") == 1
        assert example.endswith(f"{IM_END}\n")


# ---------------------------------------------------------------------- tokenizer


def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = "\tdef f(x):\r\n    return 'žluťoučký 🐍', 1234567890\n\n\n  \x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]


def test_indentation_is_one_token(tokenizer: Tokenizer) -> None:
    line = tokenizer.encode("\n        return").tokens
    assert line[:2] == ["Ċ", "Ġ" * 8]


def test_rows_are_repeatable_and_chat_starts_conversations(corpus: Corpus, tokenizer: Tokenizer) -> None:
    rows = Rows(tokenizer, corpus.training, chat_every=2)
    batch = rows.batch(0, 12, 33)
    assert batch.shape == (12, 33)
    assert torch.equal(batch, rows.batch(0, 12, 33))
    assert set(batch[1::2, 0].tolist()) == {tokenizer.token_to_id("<|im_start|>")}
    joined = stream(tokenizer, [document.text for document in corpus.training])
    start = int(6 * 0.6180339887498949 % 1.0 * (len(joined) - 33))
    assert torch.equal(batch[6], joined[start : start + 33].long())


# ----------------------------------------------------------------------- training


def test_orthogonal_evens_out_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((8, 32), (32, 8), (16, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.shape[0] == min(shape)
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_schedule_rises_then_falls_to_zero() -> None:
    schedule = Schedule(tiny_recipe(steps=100))
    factors = []
    while not schedule.done:
        factors.append(schedule.factor())
        schedule.advance(1.0)
    peak = factors.index(max(factors))
    assert peak < 5
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert len(factors) == 100
    assert factors[-1] < 0.02
    assert schedule.factor() == 0.0


def test_time_without_a_processor_is_not_counted() -> None:
    began = processor_time()
    time.sleep(0.3)
    assert processor_time() - began < 0.1
    schedule = Schedule(tiny_recipe(steps=None, minutes=2.0))
    schedule.advance(30.0)
    assert schedule.progress == pytest.approx(0.25)


def test_hurried_schedule_ends_within_a_tenth() -> None:
    schedule = Schedule(tiny_recipe(steps=100))
    for _ in range(30):
        schedule.advance(1.0)
    before = schedule.factor()
    schedule.hurry()
    assert schedule.factor() == pytest.approx(before)
    for _ in range(10):
        assert not schedule.done
        schedule.advance(1.0)
    assert schedule.done
    assert schedule.factor() == pytest.approx(0.0)


def test_tiny_run_loads_back(tmp_path: Path, corpus: Corpus) -> None:
    figures = train(tiny_recipe(steps=2), corpus, tmp_path)
    assert figures["steps"] == 2
    assert figures["held_out"]["nats_per_token"] < math.log(TINY.vocab) + 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [0, 2]
    assert len(tokenizer) <= TINY.vocab
    ids = tokenizer("def double", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    assert not (tmp_path / "checkpoint.pt").exists()


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    recipe = tiny_recipe(steps=4)
    rows = Rows(tokenizer, corpus.training, recipe.chat_every)

    def advance(trainer: Trainer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(trainer.train_step())
            trainer.schedule.advance(1.0)
        return losses

    def fresh() -> Trainer:
        torch.manual_seed(recipe.seed)
        return Trainer(recipe, rows, Qwen3ForCausalLM(TINY.config()))

    whole = fresh()
    expected = advance(whole, 4)
    first = fresh()
    assert advance(first, 2) == pytest.approx(expected[:2], rel=1e-4)
    first.save(tmp_path / "checkpoint.pt")
    second = fresh()
    second.resume(tmp_path / "checkpoint.pt")
    assert advance(second, 2) == pytest.approx(expected[2:], rel=1e-4)
    assert second.tokens == whole.tokens


# ------------------------------------------------------------------ the shipped model


def test_shipped_folder_is_small_and_whole() -> None:
    names = {path.name for path in DEMO.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "data.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 12_000_000


def test_shipped_listing_is_disjoint() -> None:
    listing = json.loads((DEMO / "data.json").read_text(encoding="utf-8"))
    training, held_out = set(listing["training"]["files"]), set(listing["held_out"]["files"])
    assert training.isdisjoint(held_out)
    assert all(map(is_held_out, held_out))


def test_shipped_chat_template_renders() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    messages = [{"role": "user", "content": "Write a function called main."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWrite a function called main.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(text)[0] == 1
    assert tokenizer.encode(text).count(2) == 1


def test_shipped_model_divides_by_four() -> None:
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size", "vocab_size"):
        assert config[name] % 4 == 0, name


@torch.inference_mode()
def test_shipped_model_knows_python() -> None:
    """It predicts code it has not seen far better than a uniform guess (8.3 nats) does."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(DEMO)(SNIPPET, return_tensors="pt").input_ids
    logits = model(input_ids=ids[:, :-1]).logits[0]
    assert cross_entropy(logits, ids[0, 1:]).item() < 3.5
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert cross_entropy(model(input_ids=shuffled[:, :-1]).logits[0], shuffled[0, 1:]).item() > 5.0
