"""The sides of bench.gpu: ours and transformers' on a device, and what they take of its memory.

Both kinds of transformers' batching are those of bench.contenders, but on a device, in one batch, and for more than one version.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.contenders import Contender
from bench.report import Cell
from bench.workload import Job
from cluster.offline import LLM
from cluster.protocol import SamplingParams

LONGEST = 512
"""Tokens of the longest sequence."""
STEP_TOKENS = 2048
"""Tokens of one iteration, on both sides that batch continuously."""


# --- transformers ---------------------------------------------------------------------------------------------------


def load_oracle(path: Path, dtype: str, device: str, **options: Any) -> Any:
    """transformers' own model."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **options).to(device).eval()
    loaded.generation_config.eos_token_id = None
    return loaded


@torch.inference_mode()
def generate(oracle: Any, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations of prompts padded on the left, end-of-sequence ignored."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=oracle.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=oracle.device)
    rows = oracle.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    tokens: list[list[int]] = rows[:, width:].tolist()
    return tokens


def static(path: Path, dtype: str, device: str) -> Contender:
    """generate() on all requests as one batch."""
    oracle = load_oracle(path, dtype, device)

    def run(work: Sequence[Job]) -> list[list[int]]:
        rows = generate(oracle, [job.prompt for job in work], max(job.output_tokens for job in work))
        return [row[: job.output_tokens] for row, job in zip(rows, work, strict=True)]

    return Contender("transformers generate, static", run)


def continuous(path: Path, dtype: str, device: str, slots: int) -> Contender:
    """transformers' continuous batching with its SDPA attention: its flash attention comes from a hub or a package of its own."""
    from transformers.generation import ContinuousBatchingConfig

    page = 32
    sizes = {  # "page_size" came, and "block_size" went, after 5.17
        "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size": page,
        "num_blocks": slots * (LONGEST // page) + 1,
        "max_batch_tokens": max(STEP_TOKENS, slots),
        "max_requests_per_batch": slots,
        "allow_block_sharing": False,
    }
    defaults = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=LONGEST)
    oracle = load_oracle(path, dtype, device, attn_implementation="sdpa")
    manager = oracle.init_continuous_batching(
        generation_config=defaults, continuous_batching_config=ContinuousBatchingConfig(**sizes)
    )
    manager.start()

    def run(work: Sequence[Job]) -> list[list[int]]:
        numbers = {
            manager.add_request(job.prompt, max_new_tokens=job.output_tokens, eos_token_id=-1): i for i, job in enumerate(work)
        }
        outputs: list[list[int]] = [[] for _ in work]
        while numbers:
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("its thread has ended")
            elif output.error:
                raise RuntimeError(output.error)
            elif output.is_finished():
                outputs[numbers.pop(output.request_id)] = list(output.generated_tokens)
        return outputs

    return Contender("transformers continuous batching", run, lambda: manager.stop(block=True, timeout=30))


# --- ours -----------------------------------------------------------------------------------------------------------


def load_ours(path: Path, dtype: str, device: str, slots: int, budget: int) -> LLM:
    """Default settings but for sizes."""
    sizes: dict[str, Any] = {"max_model_len": LONGEST, "max_num_seqs": slots, "max_num_batched_tokens": max(budget, slots)}
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
            side = Side(make(), 0.0)
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
    """All sides in turn, until the time is over."""
    for repetition in range(1, repetitions + 1):
        some = work(repetition)
        for side in sides:
            if not side.failed and (repetition == 1 or time.monotonic() < until):
                side.run(some)


def rows(sides: Sequence[Side], name: str, dtype: str, requests: int, tokens: int) -> Iterator[list[Cell]]:
    """Lines of the table."""
    ours = next((side.contender for side in sides if side.contender.name == "rayline" and side.contender.wall), None)
    for side in sides:
        c = side.contender
        if side.failed or not c.wall:
            yield [name, dtype, requests, c.name, side.failed or "no time left", None, None, None, None, None]
            continue
        pairs = [theirs / own for own, theirs in zip(ours.wall, c.wall, strict=False)] if ours else []
        same = sum(a == b for a, b in zip(ours.outputs, c.outputs, strict=True)) if ours else None
        middle = statistics.median(c.wall)
        ratio = statistics.median(pairs) if pairs else None
        yield [name, dtype, requests, c.name, tokens / middle, middle, ratio, same, side.resident, side.peak]
