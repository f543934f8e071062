"""How much of a draft stands, on text that neither model was trained on.

python -m compress.acceptance TARGET DRAFT [--held-out DIR]
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from torch import Tensor

from cluster.config import SpeculativeAcceptance
from cluster.model import ModelFiles, open_model
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


Measured = dict[str, dict[str, Acceptance]]
"""By Config.speculative_acceptance, and by the names of CHOSEN."""


def measure(files: ModelFiles, draft: str, held_out: Tensor) -> Measured:
    """Continue prefixes from all over `held_out` [n] ids, one after the other, the draft proposing K tokens each time.

    draft: a directory or hub id. Raises ConfigError where it can't propose for the model, ValueError for too little text.
    """
    if len(held_out) < PREFIX + PROMPTS:
        raise ValueError(f"{len(held_out)} tokens of held-out text are too few: {PREFIX + PROMPTS} are needed")
    step = (len(held_out) - PREFIX) // PROMPTS
    prompts = [held_out[i * step : i * step + PREFIX].tolist() for i in range(PROMPTS)]
    settings = {"speculative": "draft", "draft_model": draft, "speculative_tokens": K, "speculative_pace": "fixed"}
    found: Measured = {}
    for rule in get_args(SpeculativeAcceptance):
        with LLM(str(files.path), speculative_acceptance=rule, **settings) as llm:  # type: ignore[arg-type]
            found[rule] = {name: _measure(llm, prompts, temperature) for name, temperature in CHOSEN.items()}
    return found


def figures_of(measured: Measured) -> dict[str, dict[str, dict[str, Any]]]:
    """For JSON."""
    return {rule: {name: asdict(found) for name, found in by_name.items()} for rule, by_name in measured.items()}


def lines(measured: Measured) -> Iterator[str]:
    """Rows of a table in Markdown."""
    yield f"| | {' | '.join(f'position {at + 1}' for at in range(K))} | tokens per step of the target | looping outputs left out |"
    yield "|---" * (K + 3) + "|"
    for rule, by_name in measured.items():
        for name, found in by_name.items():
            shares = " | ".join(f"{share:.1%}" for share in found.by_position)
            yield f"| {rule}, {name} | {shares} | {found.tokens_per_step:.2f} | {found.looped} of {found.prompts} |"


def _measure(llm: LLM, prompts: list[list[int]], temperature: float) -> Acceptance:
    tried, right, looped, steps, tokens = [0] * K, [0] * K, 0, 0, 0
    told: list[tuple[int, int]] = []

    def verified(sequence: Sequence, proposed: int, stood: int) -> None:
        told.append((proposed, stood))

    llm.batcher.planner.speculation.verified = verified  # type: ignore[method-assign]
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


def main(
    target: Annotated[str, typer.Argument(help="The model: a directory or hub id.")],
    draft: Annotated[str, typer.Argument(help="Its draft model.")],
    held_out: Annotated[Path | None, typer.Option(exists=True, help="Text to measure on. Default: Python's library.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the figures to, as JSON.")] = None,
) -> None:
    """Measure what stands of the draft's proposals, by both rules of acceptance."""
    from compress.corpus import collect, standard_library
    from compress.distill import encoded, read_text  # which imports this module

    try:
        files = open_model(target)
        texts = read_text([held_out]) if held_out else [document.text for document in collect(standard_library()).held_out]
        measured = measure(files, draft, encoded(files, texts))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    for line in lines(measured):
        typer.echo(line)
    if out is not None:
        out.write_text(json.dumps(figures_of(measured), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
