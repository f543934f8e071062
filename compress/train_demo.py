"""Train the demo model: a small Qwen3 that writes Python, from nothing, on a CPU.

    python -m compress.train_demo OUT_DIR --minutes 70

Everything that the model learns comes from the running interpreter's standard library
(see `compress.corpus`); the result loads in any program that reads Qwen3 checkpoints.
Interrupted runs continue with `--resume`; SIGUSR1 asks a run to finish early, by
letting the learning rate fall to zero over the next tenth of the schedule.
"""

import copy
import json
import math
import signal
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from compress.corpus import SPECIAL_TOKENS, Corpus, Document, Rows, collect, standard_library, stream, train_tokenizer
from compress.training import Plan, Trainer, loss_of

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Shape:
    """Size of the network. Every divided dimension is a multiple of four."""

    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    positions: int = 1024

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )


@dataclass(frozen=True)
class Recipe(Plan):
    """How to train it."""

    shape: Shape = field(default_factory=Shape)
    chat_every: int = 10
    """One row in so many is chat."""


# ------------------------------------------------------------------ what is shipped


def export_tokenizer(tokenizer: Tokenizer, shape: Shape, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template in the latter."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=shape.positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder, save_jinja_files=False)
    # The class name that every version of transformers knows.
    _edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def export_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors in bfloat16."""
    shipped = copy.deepcopy(model).to(torch.bfloat16)
    # Plain text ends with the first, a turn of a conversation with the second.
    shipped.generation_config = GenerationConfig(eos_token_id=[0, 2], pad_token_id=0)
    shipped.save_pretrained(folder)
    # Readers older than `rope_parameters` look for the base frequency at the top.
    _edit_json(folder / "config.json", {"rope_theta": 10000.0})
    _edit_json(folder / "generation_config.json", {"bos_token_id": None})
    (folder / "model.safetensors").chmod(0o644)


def _edit_json(path: Path, changes: dict[str, object]) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.inference_mode()
def evaluate(folder: Path, tokenizer: Tokenizer, documents: tuple[Document, ...], context: int) -> dict[str, float]:
    """Loss of the exported model on `documents`, in windows of `context` tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = stream(tokenizer, (document.text for document in documents)).long()
    nats = 0.0
    for start in tqdm(range(0, len(ids) - 1, context), desc="held out", mininterval=5):
        window = ids[start : start + context + 1]
        nats += loss_of(model, window[None]).item() * (len(window) - 1)
    size = sum(len(document.text.encode()) for document in documents)
    return {"nats_per_token": nats / (len(ids) - 1), "bits_per_byte": nats / math.log(2) / size}


def train(recipe: Recipe, corpus: Corpus, folder: Path, resume: bool = False) -> dict[str, Any]:
    """Train tokenizer and model on `corpus`, write them to `folder`, return the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus.write_listing(folder / "data.json")
    tokenizer = train_tokenizer((document.text for document in corpus.training), recipe.shape.vocab)
    export_tokenizer(tokenizer, recipe.shape, folder)
    torch.manual_seed(recipe.seed)
    rows = Rows(tokenizer, corpus.training, recipe.chat_every)
    trainer = Trainer(replace(recipe, long_context=recipe.shape.positions), rows, Qwen3ForCausalLM(recipe.shape.config()))
    if resume and (folder / CHECKPOINT).exists():
        trainer.resume(folder / CHECKPOINT)

    def checkpoint() -> None:
        trainer.save(folder / CHECKPOINT)
        export_model(trainer.model, folder)

    previous = signal.signal(signal.SIGUSR1, lambda *_: trainer.schedule.hurry())
    try:
        training_loss = trainer.run(checkpoint)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    export_model(trainer.model, folder)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    figures = {
        "recipe": asdict(recipe),
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "steps": trainer.schedule.step,
        "tokens": trainer.tokens,
        "minutes": round(trainer.schedule.seconds / 60, 1),
        "training_nats_per_token": training_loss,
        "held_out": evaluate(folder, tokenizer, corpus.held_out, recipe.context) if corpus.held_out else None,
    }
    (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def main(
    out_dir: Annotated[Path, typer.Argument(help="Folder to write the model to.")],
    minutes: Annotated[float, typer.Option(help="Length of the run, in minutes of processor time.")] = 70.0,
    steps: Annotated[int | None, typer.Option(help="Number of steps; replaces --minutes.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoint in OUT_DIR.")] = False,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per update.")] = 8192,
    matrix_rate: Annotated[float, typer.Option(help="Peak learning rate of Muon.")] = 0.02,
    vector_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 3e-3,
    threads: Annotated[int, typer.Option(help="Threads for the arithmetic.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights.")] = 0,
    compiled: Annotated[bool, typer.Option(help="Compile the model; needs a C++ compiler.")] = True,
) -> None:
    """Train the demo model on the standard library of this interpreter."""
    torch.set_num_threads(threads)
    recipe = Recipe(
        minutes=None if steps is not None else minutes,
        steps=steps,
        batch_tokens=batch_tokens,
        matrix_rate=matrix_rate,
        vector_rate=vector_rate,
        seed=seed,
        compiled=compiled,
    )
    figures = train(recipe, collect(standard_library()), out_dir, resume)
    typer.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)
