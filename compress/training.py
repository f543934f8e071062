"""A training run on a CPU: optimizers, schedule, checkpoints to resume from, a bar."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm


@dataclass(frozen=True)
class Plan:
    """How to train. Exactly one of `minutes` (of processor time) and `steps` bounds the run."""

    minutes: float | None = 70.0
    steps: int | None = None
    batch_tokens: int = 8192
    micro_tokens: int = 2048
    context: int = 512
    long_context: int = 1024
    long_share: float = 0.2
    """The last part of the run, on rows of `long_context` tokens."""
    warm_up: float = 0.02
    matrix_rate: float = 0.02
    vector_rate: float = 3e-3
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_minutes: float = 5.0
    compiled: bool = True


class Batches(Protocol):
    """Where rows of tokens come from."""

    def batch(self, first: int, rows: int, length: int) -> Tensor:
        """Token ids [rows, length] of the rows from number `first` on."""


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
                if weight.grad is None:
                    continue
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

    def __init__(self, plan: Plan) -> None:
        if (plan.minutes is None) == (plan.steps is None):
            raise ValueError("give either minutes or steps")
        self.plan = plan
        self.step = 0
        self.seconds = 0.0
        self.end = 1.0
        self.hurried_at: float | None = None

    def advance(self, seconds: float) -> None:
        self.step += 1
        self.seconds += seconds

    def state(self) -> dict[str, Any]:
        """All that changes during a run, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "plan"}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def progress(self) -> float:
        if self.plan.steps is not None:
            return self.step / self.plan.steps
        assert self.plan.minutes is not None
        return self.seconds / (60 * self.plan.minutes)

    @property
    def done(self) -> bool:
        return self.progress >= self.end

    @property
    def long(self) -> bool:
        return self.hurried_at is not None or self.progress >= 1 - self.plan.long_share

    def hurry(self) -> None:
        """Finish within a tenth of the schedule from here."""
        if self.hurried_at is None:
            self.hurried_at = self.progress
            self.end = min(1.0, self.progress + 0.1)

    def _planned(self, progress: float) -> float:
        rising = (progress + 1e-3) / max(self.plan.warm_up, 1e-3)
        return min(1.0, rising, max(0.0, (1 - progress) / (1 - self.plan.warm_up)))

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

    def __init__(
        self,
        plan: Plan,
        rows: Batches,
        model: nn.Module,
        loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        """optimizers: with the peak rates of all their groups; by default Muon for matrices and AdamW for all else."""
        self.plan = plan
        self.rows = rows
        self.model = model
        self.schedule = Schedule(plan)
        self.rows_taken = 0
        self.tokens = 0
        self.optimizers = list(optimizers) or self._default()
        self.peaks = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in self.optimizers]
        own: Callable[[Tensor], Tensor] = lambda batch: loss(self.model, batch)  # noqa: E731
        self.loss = torch.compile(own, dynamic=False) if plan.compiled else own

    def _default(self) -> list[torch.optim.Optimizer]:
        matrices = [w for n, w in self.model.named_parameters() if w.ndim == 2 and "embed" not in n]
        others = [w for n, w in self.model.named_parameters() if w.ndim != 2 or "embed" in n]
        return [
            Muon(matrices, lr=self.plan.matrix_rate, decay=self.plan.decay),
            torch.optim.AdamW(others, lr=self.plan.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def train_step(self) -> float:
        """One update from `batch_tokens` tokens; the mean loss over them, in nats."""
        plan = self.plan
        length = plan.long_context if self.schedule.long else plan.context
        rows = max(1, plan.micro_tokens // length)
        pieces = max(1, plan.batch_tokens // (rows * length))
        total = 0.0
        for _ in range(pieces):
            loss = self.loss(self.rows.batch(self.rows_taken, rows, length + 1)) / pieces
            torch.autograd.backward(loss)
            total += loss.item()
            self.rows_taken += rows
            self.tokens += rows * length
        nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
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
                if time.monotonic() - saved > 60 * self.plan.save_minutes:
                    checkpoint()
                    saved = time.monotonic()
        return smooth
