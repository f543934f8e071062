"""What speculation gains: one target with no drafts, with as many as pay, and always with K tokens, for batches of several sizes.

    python -m bench.enlarged deploy/demo build/enlarged
    python -m bench.speculation build/enlarged --draft deploy/demo-draft [--batches 1,4,16,64] [--tokens 4] [--repetitions 3]
    python -m bench.speculation deploy/demo --draft deploy/demo-draft --hopeless --repetitions 20

Prompts are pieces of this interpreter's standard library, 64 tokens each; every side continues the same ones, greedily, in turn, in
one process, after a first round that does not count. The tokens must be equal. Seconds are wall clock, of the whole generation;
losses are of this process's CPU time, pair by pair. With --hopeless the draft has random weights: nothing that it proposes stands.
"""

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import options
from bench.report import Line, Report, command_line, draw_lines, interval
from cluster.model import open_model
from cluster.offline import LLM
from cluster.protocol import SamplingParams
from compress.corpus import collect, standard_library
from compress.distill import copy_beside

PREFIX = 64
SIDES = ("off", "adaptive", "always K")


@dataclass
class _Side:
    """What one side took, by repetition."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if a token differs."""
    parser = options.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--draft", help="default: prompt lookup")
    parser.add_argument("--hopeless", action="store_true", help="a draft of this shape with random weights; no side `always K`")
    parser.add_argument("--batches", type=options.numbers, default=[1, 2, 4, 8, 16, 32, 64], metavar="N,N")
    parser.add_argument("--tokens", type=options.positive, default=4, metavar="K")
    parser.add_argument("--output-tokens", type=options.positive, default=64, metavar="N", help="of each sequence")
    parser.add_argument("--repetitions", type=options.positive, default=3)
    parser.add_argument("--threads", type=options.positive, default=2)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args(argv)
    if arguments.hopeless and not arguments.draft:
        parser.error("--hopeless goes with --draft")
    report = Report("speculation", command_line(argv))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.hopeless:
            arguments.draft = str(write_random(arguments.draft, Path(folder)))
        wrong = _run(arguments, report)
    report.save(arguments.out)
    return int(wrong > 0)


def write_random(model: str, out: Path) -> Path:
    """A model of the shape and tokenizer of `model`, its weights drawn as at the start of training."""
    source = open_model(model).path
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16).save_pretrained(out)
    copy_beside(source, out)
    return out


def _run(arguments: Namespace, report: Report) -> int:
    sides = SIDES[:2] if arguments.hopeless else SIDES
    engines = {side: _load(side, arguments) for side in sides}
    pieces = list(_pieces(engines["off"]))
    rows: list[list[Any]] = []
    curves: dict[str, list[tuple[int, float, float, float]]] = {side: [] for side in sides[1:]}
    wrong, used = 0, 0
    for size in arguments.batches:
        taken = {side: _Side() for side in sides}
        for repetition in range(-1, arguments.repetitions):
            prompts = [pieces[(used + i) % len(pieces)] for i in range(size)]
            used += size
            outputs = {}
            shift = repetition % len(sides)
            for side in sides[shift:] + sides[:shift]:
                outputs[side] = _generate(
                    engines[side], prompts, arguments.output_tokens, taken[side] if repetition >= 0 else _Side()
                )
            wrong += sum(outputs[side] != outputs["off"] for side in sides[1:])
        for side in sides:
            gains = [theirs / ours for theirs, ours in zip(taken["off"].wall_s, taken[side].wall_s, strict=True)]
            losses = [ours / theirs - 1 for theirs, ours in zip(taken["off"].cpu_s, taken[side].cpu_s, strict=True)]
            low, high = interval(losses)
            rate = size * arguments.output_tokens / statistics.median(taken[side].wall_s)
            lost = "" if side == "off" else f"{statistics.fmean(losses):+.1%} ({low:+.1%} to {high:+.1%})"
            share = taken[side].accepted / taken[side].proposed if taken[side].proposed else None
            rows.append([size, side, rate, statistics.median(gains), lost, taken[side].proposed, share])
            if side in curves:
                curves[side].append((size, statistics.median(gains), min(gains), max(gains)))
        report.say(f"  {size} sequences: {', '.join(f'{side} {statistics.median(taken[side].wall_s):.2f} s' for side in sides)}")
    columns = ["sequences", "", "output tok/s", "gain", "CPU time lost (95 %)", "proposed", "accepted"]
    how = "of random weights" if arguments.hopeless else arguments.draft or "prompt lookup"
    report.table(f"{Path(arguments.model).name}, draft {how}, K = {arguments.tokens}", columns, rows)
    report.say("all tokens are equal" if not wrong else f"{wrong} batches differ in a token")
    lines = [Line(side, *(list(values) for values in zip(*points, strict=True))) for side, points in curves.items()]
    top = 1.1 * max(max(line.high) for line in lines)
    draw_lines(arguments.out / "speculation.png", "Gain of speculation by batch", "sequences", "gain", lines, {"off": 1.0}, top)
    return wrong


def _pieces(llm: LLM) -> Iterator[list[int]]:
    """From all over the held-out files, the nth of each before the next of any."""
    texts = [llm.prepared(document.text) for document in collect(standard_library()).held_out]
    for start in range(0, max(map(len, texts)), 400):
        for ids in texts:
            if start + PREFIX <= len(ids):
                yield ids[start : start + PREFIX]


def _generate(llm: LLM, prompts: list[list[int]], output: int, side: _Side) -> list[list[int]]:
    counters = llm.batcher.counters
    proposed, accepted = counters.proposed, counters.accepted
    wall, cpu = time.perf_counter(), time.process_time()
    done = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=output), ignore_eos=True)
    side.wall_s.append(time.perf_counter() - wall)
    side.cpu_s.append(time.process_time() - cpu)
    side.proposed += counters.proposed - proposed
    side.accepted += counters.accepted - accepted
    return [completion.outputs[0].token_ids for completion in done]


def _load(side: str, arguments: Namespace) -> LLM:
    settings: dict[str, Any] = {
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "kv_memory": "512MiB",
        "prefix_cache": "off",
    }
    if side != "off":
        how = {"speculative": "draft", "draft_model": arguments.draft} if arguments.draft else {"speculative": "lookup"}
        settings |= {**how, "speculative_tokens": arguments.tokens}
        settings["speculative_pace"] = "fixed" if side == "always K" else "adaptive"
    return LLM(arguments.model, max_model_len=PREFIX + arguments.output_tokens, **settings)


if __name__ == "__main__":
    raise SystemExit(main())
