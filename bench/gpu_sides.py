"""The sides of bench.gpu: which of them run here, in turn, and what each takes of the device's memory."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.contenders import Contender
from bench.report import Cell
from bench.workload import Job
from cluster.offline import LLM
from cluster.protocol import SamplingParams

LONGEST = 512
"""Tokens of the longest sequence."""
STEP_TOKENS = 2048
"""Tokens of one iteration, on both sides that batch continuously."""


# --- ours -----------------------------------------------------------------------------------------------------------


def load_ours(path: Path, dtype: str, device: str, slots: int, budget: int) -> LLM:
    """Default settings but for sizes, and without the prefix cache: each run asks the same prompts again."""
    sizes: dict[str, Any] = {
        "prefix_cache": "off",
        "max_model_len": LONGEST,
        "max_num_seqs": slots,
        "max_num_batched_tokens": max(budget, slots),
    }
    if device == "cpu":
        sizes["kv_memory"] = "256MiB"
    return LLM(str(path), dtype=dtype, device=device, **sizes)


def rayline(path: Path, dtype: str, device: str, slots: int) -> Contender:
    """LLM.generate."""
    llm = load_ours(path, dtype, device, slots, STEP_TOKENS)

    def run(work: Sequence[Job]) -> list[list[int]]:
        params = [SamplingParams(max_tokens=job.output_tokens, temperature=0.0) for job in work]
        return [c.outputs[0].token_ids for c in llm.generate([job.prompt for job in work], params, ignore_eos=True)]

    return Contender("rayline", run)


# --- speed ----------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """A contender and its memory on the device, in GiB; 0 on a CPU."""

    contender: Contender
    resident: float
    peak: float = 0.0
    failed: str = ""

    def run(self, work: Sequence[Job]) -> None:
        """One repetition, everything on the device included."""
        before = allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            self.contender.run(work)  # its outputs are lists on the host, so the device has finished
        except Exception as error:
            self.failed = reason(error)
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() / 2**30 - before)


def allocated() -> float:
    """GiB on the device."""
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def free() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:200]}"


def build(makers: dict[str, Callable[[], Contender]], warm: Sequence[Job], say: Callable[[str], None]) -> list[Side]:
    """The sides that can run here, warm; why the others can't is said."""
    sides = []
    for name, make in makers.items():
        free()
        before = allocated()
        try:
            made = make()
            side = Side(dataclasses.replace(made, name=f"{name} ({made.how})" if made.how else name), 0.0)
        except Exception as error:
            say(f"{name} is left out: {reason(error)}")
            continue
        side.run(warm)
        side.resident = allocated() - before
        if side.failed:
            say(f"{name} is left out: {side.failed}")
            side.contender.close()
            continue
        side.contender.wall.clear()
        side.contender.cpu.clear()
        side.peak = 0.0
        sides.append(side)
    return sides


def compare(sides: Sequence[Side], work: Callable[[int], list[Job]], repetitions: int, until: float) -> None:
    """All sides in turn. No repetition but the first begins when the time is over; one that began is for all sides."""
    for repetition in range(1, repetitions + 1):
        if repetition > 1 and time.monotonic() >= until:
            return
        some = work(repetition)
        for side in sides:
            if not side.failed:
                side.run(some)


def rows(sides: Sequence[Side], name: str, dtype: str, requests: int, tokens: int) -> Iterator[list[Cell]]:
    """Lines of the table."""
    ours = next((side.contender for side in sides if side.contender.name == "rayline" and not side.failed), None)
    for side in sides:
        c = side.contender
        if side.failed:
            yield [name, dtype, requests, c.name, side.failed, None, None, None, None, None]
            continue
        pairs = [theirs / own for own, theirs in zip(ours.wall, c.wall, strict=True)] if ours else []
        same = sum(a == b for a, b in zip(ours.outputs, c.outputs, strict=True)) if ours else None
        middle = statistics.median(c.wall)
        ratio = statistics.median(pairs) if pairs else None
        yield [name, dtype, requests, c.name, tokens / middle, middle, ratio, same, side.resident, side.peak]
