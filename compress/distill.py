"""Distil a draft model: a small decoder that predicts what its target would draw.

It is trained by forward KL on the target's whole distribution (Hinton et al. 2015), over text that the user gives and over the
target's own continuations of that text: what it will have to predict is what the target writes.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from cluster.model import ModelFiles
from cluster.offline import LLM
from cluster.protocol import SamplingParams
from cluster.shape import ModelShape
from compress.acceptance import K, figures_of, measure
from compress.corpus import GOLDEN
from compress.divergence import divergence
from compress.training import Plan, Trainer
from router.tokenizer import load

CHECKPOINT, SAMPLES = "checkpoint.pt", "samples.pt"
HELD_OUT = 0.03
"""Share of the text that is kept for the measurement."""
_PREFIX, _CONTINUATION = 32, 224
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""What a model made from another has from it: the tokenizer, and how it wants to be sampled."""


@dataclass(frozen=True)
class DraftShape:
    """Size of the draft; its vocabulary and positions are the target's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, target: ModelShape, hidden: int | None, intermediate: int | None, layers: int) -> "DraftShape":
        """By default as wide as the target, of whose layers it can then begin as a copy, with half the inner features."""
        if hidden is None:
            heads = (target.num_heads, target.num_kv_heads, target.head_dim)
            return cls(target.hidden_size, intermediate or target.intermediate_size // 2, layers, *heads)
        kv_heads = max(1, hidden // 64)
        return cls(hidden, intermediate or 8 * hidden // 3, layers, 2 * kv_heads, kv_heads, 32)


@dataclass(frozen=True)
class Distillation(Plan):
    """How to train it."""

    shape: DraftShape | None = None
    """Default: see DraftShape.of."""
    own: float = 0.5
    """Share of rows that are the target's own continuations, drawn at temperatures 0 and 1 in turn."""
    samples: int = 1500
    """How many of them are made, each of some 250 tokens."""


class Mixture:
    """Rows of the text, and of the target's continuations, without any state but a counter (see compress.corpus.Rows)."""

    def __init__(self, text: Tensor, own: Tensor, share: float) -> None:
        """text [n] ids; own [rows, length] ids."""
        self._text, self._own, self._share = text, own, share if len(own) else 0.0

    def batch(self, first: int, rows: int, length: int) -> Tensor:
        """See compress.training.Batches. Continuations stand one behind the other where a row is longer than one."""
        return torch.stack([self._row(number, length) for number in range(first, first + rows)]).long()

    def _row(self, number: int, length: int) -> Tensor:
        where = (number * GOLDEN) % 1.0
        if (number * 0.7548776662) % 1.0 < self._share:  # another irrational step, so that the two do not go together
            count = -(-length // self._own.shape[1])
            start = int(where * len(self._own))
            return torch.cat([self._own[(start + i) % len(self._own)] for i in range(count)])[:length]
        return self._text[int(where * max(1, len(self._text) - length)) :][:length]


def read_text(paths: Sequence[Path]) -> list[str]:
    """Files, and all text files below folders, in the order of their names. Raises OSError, ValueError where there is none."""
    files = [file for path in paths for file in (sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])]
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    return texts


def encoded(files: ModelFiles, texts: Sequence[str]) -> Tensor:
    """[n] ids of all texts by the model's tokenizer, an end of sequence behind each."""
    tokenizer = load(files.path)
    ids: list[int] = []
    for text in tqdm(texts, desc="tokenizing", mininterval=5):
        ids += [*tokenizer.encode_now(text, add_special_tokens=False), *files.eos_token_ids[:1]]
    return torch.tensor(ids, dtype=torch.int32)


def continuations(llm: LLM, text: Tensor, count: int) -> Tensor:
    """[count, length]: beginnings taken from all over the text, and what the target makes of them."""
    rows: list[list[int]] = []
    size = 64
    for begin in tqdm(range(0, count, size), desc="the target's own text", mininterval=5):
        numbers = range(begin, min(count, begin + size))
        starts = [int((n * GOLDEN) % 1.0 * (len(text) - _PREFIX)) for n in numbers]
        prompts = [text[start : start + _PREFIX].tolist() for start in starts]
        params = [SamplingParams(seed=n, temperature=float(n % 2), max_tokens=_CONTINUATION) for n in numbers]
        done = llm.generate(prompts, params, ignore_eos=True)
        rows += [[*prompt, *one.outputs[0].token_ids] for prompt, one in zip(prompts, done, strict=True)]
    return torch.tensor(rows, dtype=torch.int32)


def against(teacher: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    """The loss: KL(teacher || student) in nats, the mean over all positions of token ids [rows, length + 1]."""

    def loss(student: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        told = student(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        return divergence(wanted, told).mean()

    return loss


def student_of(files: ModelFiles, shape: DraftShape, teacher: PreTrainedModel) -> PreTrainedModel:
    """A new model of the target's vocabulary. What has the same name and size there begins as the target's."""
    config = Qwen3Config(
        vocab_size=files.shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=files.shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=files.shape.tied_embeddings,
        bos_token_id=None,
        eos_token_id=list(files.eos_token_ids) or None,
    )
    student = Qwen3ForCausalLM(config)
    own, theirs = student.state_dict(), teacher.state_dict()
    student.load_state_dict(
        {name: theirs[name] if name in theirs and theirs[name].shape == x.shape else x for name, x in own.items()}
    )
    return student


def distill(
    files: ModelFiles,
    recipe: Distillation,
    texts: Sequence[str],
    out: Path,
    *,
    held_out_texts: Sequence[str] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Train a draft of the model `files` and write it to `out`; the figures that stand in its distillation.json too.

    held_out_texts: what acceptance is measured on; the end of `texts` where there are none. Raises ValueError for too little text.
    """
    out.mkdir(parents=True, exist_ok=True)
    text, held_out = encoded(files, texts), encoded(files, held_out_texts)
    if not len(held_out):
        kept = int(len(text) * (1 - HELD_OUT))
        text, held_out = text[:kept], text[kept:]
    for name, some in (("text", text), ("held-out text", held_out)):
        if len(some) < 2 * recipe.context:
            raise ValueError(f"{len(some)} tokens of {name} are too few: {2 * recipe.context} are needed")
    samples = out / SAMPLES
    if not (resume and samples.exists()):
        with LLM(str(files.path), threads=torch.get_num_threads()) as llm:
            torch.save(continuations(llm, text, recipe.samples if recipe.own > 0 else 0), samples)
    torch.manual_seed(recipe.seed)
    longest = files.shape.max_position_embeddings
    recipe = replace(recipe, context=min(recipe.context, longest), long_context=min(recipe.long_context, longest))
    teacher = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32).eval()
    student = student_of(files, recipe.shape or DraftShape.of(files.shape, None, None, 1), teacher)
    trainer = Trainer(recipe, Mixture(text, torch.load(samples, weights_only=True), recipe.own), student, against(teacher))
    if resume and (out / CHECKPOINT).exists():
        trainer.resume(out / CHECKPOINT)

    def checkpoint() -> None:
        trainer.save(out / CHECKPOINT)
        export(student, files, out)

    loss = trainer.run(checkpoint)
    export(student, files, out)
    for name in (CHECKPOINT, SAMPLES):
        (out / name).unlink(missing_ok=True)
    figures = {
        "recipe": asdict(recipe),
        "parameters": sum(weight.numel() for weight in student.parameters()),
        "steps": trainer.schedule.step,
        "tokens": trainer.tokens,
        "minutes": round(trainer.schedule.seconds / 60, 1),
        "kl_nats_per_token": loss,
        "acceptance": figures_of(measure(files, str(out), held_out)),
        "proposed_at_a_time": K,
    }
    (out / "distillation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def export(student: PreTrainedModel, files: ModelFiles, out: Path) -> None:
    """In bf16, with the target's tokenizer."""
    shipped = Qwen3ForCausalLM(student.config).to(torch.bfloat16)
    shipped.load_state_dict(student.state_dict())
    shipped.save_pretrained(out)
    copy_beside(files.path, out)


def copy_beside(model: Path, out: Path) -> None:
    """What of the model's files is neither weights nor config.json: those that are there."""
    for name in _BESIDE:
        if (model / name).exists():
            shutil.copyfile(model / name, out / name)
