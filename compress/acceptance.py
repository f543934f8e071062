"""How much of a draft stands, on text that neither model was trained on."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cluster.model import ModelFiles
from cluster.offline import LLM
from cluster.protocol import SamplingParams
from cluster.request import Sequence

K = 4
"""Tokens proposed at a time."""
CHOSEN = {"greedy": 0.0, "temperature 0.8": 0.8}
PROMPTS, PREFIX, OUTPUT = 64, 64, 128
_LOOP = 24


@dataclass
class Acceptance:
    """Of drafts of K tokens each."""

    by_position: list[float]
    """The share of first, second ... tokens that stood where all before them did."""
    tokens_per_step: float
    """Of the target: those that stood, and the one that it draws itself."""
    looped: int
    """Outputs that ended up repeating themselves, which are left out: they are easy to predict."""
    prompts: int


def measure(files: ModelFiles, draft: Path, held_out: Tensor) -> dict[str, Acceptance]:
    """By the names of CHOSEN: continue prefixes from all over `held_out` [n] ids, one after the other, the draft proposing K tokens
    each time."""
    step = (len(held_out) - PREFIX) // PROMPTS
    prompts = [held_out[i * step : i * step + PREFIX].tolist() for i in range(PROMPTS)]
    settings = {"speculative": "draft", "draft_model": str(draft), "speculative_tokens": K, "speculative_pace": "fixed"}
    with LLM(str(files.path), **settings) as llm:  # type: ignore[arg-type]
        return {name: _measure(llm, prompts, temperature) for name, temperature in CHOSEN.items()}


def _measure(llm: LLM, prompts: list[list[int]], temperature: float) -> Acceptance:
    tried, right, looped, steps, tokens = [0] * K, [0] * K, 0, 0, 0
    told: list[tuple[int, int]] = []

    def verified(sequence: Sequence, proposed: int, stood: int) -> None:
        told.append((proposed, stood))

    llm.batcher.pace.verified = verified  # type: ignore[method-assign]
    for number, prompt in enumerate(prompts):
        told.clear()
        params = SamplingParams(seed=number, temperature=temperature, max_tokens=OUTPUT)
        [done] = llm.generate([prompt], params, ignore_eos=True)
        if loops(done.outputs[0].token_ids):
            looped += 1
            continue
        for proposed, stood in told:
            if proposed == K:
                steps, tokens = steps + 1, tokens + stood + 1
            for position in range(min(proposed, stood + 1)):
                tried[position] += 1
                right[position] += position < stood
    shares = [r / t if t else 0.0 for r, t in zip(right, tried, strict=True)]
    return Acceptance(shares, tokens / steps if steps else 0.0, looped, len(prompts))


def loops(tokens: list[int]) -> bool:
    """Whether the end repeats what stands right before it."""
    end = tokens[-_LOOP:]
    return any(tokens[-_LOOP - shift : -shift] == end for shift in range(1, min(_LOOP, len(tokens) - _LOOP) + 1))
