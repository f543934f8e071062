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
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from compress.corpus import SPECIAL_TOKENS, Corpus, Document, Rows, collect, standard_library, stream, train_tokenizer

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
class Recipe:
    """How to train. Exactly one of `minutes` and `steps` bounds the run."""

    shape: Shape = field(default_factory=Shape)
    minutes: float | None = 70.0
    steps: int | None = None
    batch_tokens: int = 8192
    micro_tokens: int = 2048
    context: int = 512
    long_share: float = 0.2  # last part of the run, on rows of all `positions`
    chat_every: int = 10  # one row in so many is chat
    warm_up: float = 0.02
    matrix_rate: float = 0.02
    vector_rate: float = 3e-3
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_minutes: float = 5.0
    compiled: bool = True


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the hidden matrices.

    `torch.optim.Muon` does the same in bfloat16, which a processor without bfloat16
    instructions runs some 35 times slower than this float32 version: there it would
    cost more than the gradients.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                update = orthogonal(weight.grad + group["momentum"] * momentum)
                tall = math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
                weight.mul_(1 - group["lr"] * group["decay"])
                weight.add_(update, alpha=-group["lr"] * tall)


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Push the singular values of `matrix` [m, n] towards one by Newton-Schulz rounds."""
    turned = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if turned else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if turned else x


def processor_time() -> float:
    """Seconds for which every thread of the arithmetic has had a processor."""
    return time.process_time() / torch.get_num_threads()


class Schedule:
    """Progress from 0 to 1, by time or by steps, and the learning rate from it.

    Time is processor time: on a busy machine, or stopped for a while, a run takes longer
    instead of ending with less training.
    """

    def __init__(self, recipe: Recipe) -> None:
        if (recipe.minutes is None) == (recipe.steps is None):
            raise ValueError("give either minutes or steps")
        self.recipe = recipe
        self.step = 0
        self.seconds = 0.0
        self.end = 1.0
        self.hurried_at: float | None = None

    def advance(self, seconds: float) -> None:
        self.step += 1
        self.seconds += seconds

    def state(self) -> dict[str, Any]:
        """All that changes during a run, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "recipe"}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def progress(self) -> float:
        if self.recipe.steps is not None:
            return self.step / self.recipe.steps
        assert self.recipe.minutes is not None
        return self.seconds / (60 * self.recipe.minutes)

    @property
    def done(self) -> bool:
        return self.progress >= self.end

    @property
    def long(self) -> bool:
        return self.hurried_at is not None or self.progress >= 1 - self.recipe.long_share

    def hurry(self) -> None:
        """Finish within a tenth of the schedule from here."""
        if self.hurried_at is None:
            self.hurried_at = self.progress
            self.end = min(1.0, self.progress + 0.1)

    def _planned(self, progress: float) -> float:
        rising = (progress + 1e-3) / max(self.recipe.warm_up, 1e-3)
        return min(1.0, rising, max(0.0, (1 - progress) / (1 - self.recipe.warm_up)))

    def factor(self) -> float:
        """What the peak learning rates are multiplied by at this moment."""
        if self.hurried_at is None:
            return self._planned(self.progress)
        left = (self.end - self.progress) / max(self.end - self.hurried_at, 1e-9)
        return self._planned(self.hurried_at) * max(0.0, left)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token loss in nats of token ids [rows, length + 1]."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


class Trainer:
    """One training run: the model, its optimizers, and where it stands."""

    def __init__(self, recipe: Recipe, rows: Rows) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.rows = rows
        self.model = Qwen3ForCausalLM(recipe.shape.config())
        self.schedule = Schedule(recipe)
        self.rows_taken = 0
        self.tokens = 0
        matrices = [w for n, w in self.model.named_parameters() if w.ndim == 2 and "embed" not in n]
        others = [w for n, w in self.model.named_parameters() if w.ndim != 2 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=recipe.matrix_rate, decay=recipe.decay),
            torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.peaks = (recipe.matrix_rate, recipe.vector_rate)
        loss: Callable[[Tensor], Tensor] = lambda batch: loss_of(self.model, batch)  # noqa: E731
        self.loss = torch.compile(loss, dynamic=False) if recipe.compiled else loss

    def train_step(self) -> float:
        """One update from `batch_tokens` tokens; the mean loss over them, in nats."""
        recipe = self.recipe
        length = recipe.shape.positions if self.schedule.long else recipe.context
        rows = max(1, recipe.micro_tokens // length)
        pieces = max(1, recipe.batch_tokens // (rows * length))
        total = 0.0
        for _ in range(pieces):
            loss = self.loss(self.rows.batch(self.rows_taken, rows, length + 1)) / pieces
            torch.autograd.backward(loss)
            total += loss.item()
            self.rows_taken += rows
            self.tokens += rows * length
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.schedule.factor()
            optimizer.step()
            optimizer.zero_grad()
        return total

    def save(self, path: Path) -> None:
        """Write all that `resume` needs; the old checkpoint stays until the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedule": self.schedule.state(),
            "counters": (self.rows_taken, self.tokens),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.schedule.restore(state["schedule"])
        self.rows_taken, self.tokens = state["counters"]

    def run(self, checkpoint: Callable[[], None]) -> float:
        """Train to the end of the schedule; the smoothed training loss at the end, in nats."""
        smooth, saved = math.nan, time.monotonic()
        with tqdm(total=100.0, mininterval=5, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
            while not self.schedule.done:
                began = processor_time()
                loss = self.train_step()
                self.schedule.advance(processor_time() - began)
                smooth = loss if math.isnan(smooth) else 0.97 * smooth + 0.03 * loss
                bar.set_postfix(step=self.schedule.step, loss=f"{smooth:.3f}", tokens=self.tokens, refresh=False)
                bar.update(min(100.0, 100 * self.schedule.progress) - bar.n)
                if time.monotonic() - saved > 60 * self.recipe.save_minutes:
                    checkpoint()
                    saved = time.monotonic()
        return smooth


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
    trainer = Trainer(recipe, Rows(tokenizer, corpus.training, recipe.chat_every))
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
