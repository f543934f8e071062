"""What speculation gains: one target with no drafts, with as many as pay, and always with K tokens, for batches of several sizes.

    python -m bench.enlarged deploy/demo build/enlarged
    python -m bench.speculation build/enlarged --draft deploy/demo-draft [--batches 1,4,16,64] [--tokens 4] [--repetitions 3]

Prompts are pieces of this interpreter's standard library, 64 tokens each; every side continues the same ones, greedily, by 64
tokens, in turn, all in one process. Seconds are wall clock, of the whole generation. The tokens must be equal.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import options
from bench.report import Line, Report, command_line, draw_lines
from cluster.offline import LLM
from cluster.protocol import SamplingParams
from compress.corpus import collect, standard_library

PREFIX, OUTPUT = 64, 64
SIDES = ("off", "adaptive", "always K")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if a token differs."""
    parser = options.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--draft", help="default: prompt lookup")
    parser.add_argument("--batches", type=options.numbers, default=[1, 2, 4, 8, 16, 32, 64], metavar="N,N")
    parser.add_argument("--tokens", type=options.positive, default=4, metavar="K")
    parser.add_argument("--repetitions", type=options.positive, default=3)
    parser.add_argument("--threads", type=options.positive, default=2)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args(argv)
    report = Report("speculation", command_line(argv))
    engines = {side: _load(side, arguments) for side in SIDES}
    texts = [document.text for document in collect(standard_library()).held_out]
    pieces = [
        ids[i : i + PREFIX] for text in texts for ids in [engines["off"].prepared(text)] for i in range(0, len(ids) - PREFIX, 400)
    ]
    rows, curves, wrong = [], {side: ([], [], [], []) for side in SIDES[1:]}, 0  # type: ignore[var-annotated]
    for size in arguments.batches:
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        before = {side: _counts(llm) for side, llm in engines.items()}
        for repetition in range(arguments.repetitions):
            prompts = [pieces[(repetition * size + i) % len(pieces)] for i in range(size)]
            outputs = {}
            for side in SIDES[repetition % 3 :] + SIDES[: repetition % 3]:
                began = time.perf_counter()
                done = engines[side].generate(prompts, SamplingParams(temperature=0.0, max_tokens=OUTPUT), ignore_eos=True)
                seconds[side].append(time.perf_counter() - began)
                outputs[side] = [completion.outputs[0].token_ids for completion in done]
            wrong += sum(outputs[side] != outputs["off"] for side in SIDES[1:])
        for side in SIDES:
            gains = [theirs / ours for theirs, ours in zip(seconds["off"], seconds[side], strict=True)]
            proposed, accepted = (now - then for now, then in zip(_counts(engines[side]), before[side], strict=True))
            rate = size * OUTPUT / statistics.median(seconds[side])
            share = accepted / proposed if proposed else None
            rows.append([size, side, rate, statistics.median(gains), proposed, share])
            if side in curves:
                for values, value in zip(curves[side], (size, statistics.median(gains), min(gains), max(gains)), strict=True):
                    values.append(value)
        report.say(f"  {size} sequences: {', '.join(f'{side} {statistics.median(seconds[side]):.2f} s' for side in SIDES)}")
    columns = ["sequences", "", "output tok/s", "gain", "proposed", "accepted"]
    report.table(f"{Path(arguments.model).name}, draft {arguments.draft or 'prompt lookup'}, K = {arguments.tokens}", columns, rows)
    report.say("all tokens are equal" if not wrong else f"{wrong} batches differ in a token")
    report.save(arguments.out)
    lines = [Line(side, *values) for side, values in curves.items()]
    top = 1.1 * max(max(line.high) for line in lines)
    draw_lines(arguments.out / "speculation.png", "Gain of speculation by batch", "sequences", "gain", lines, {"off": 1.0}, top)
    return int(wrong > 0)


def _load(side: str, arguments: Any) -> LLM:
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
    return LLM(arguments.model, max_model_len=PREFIX + OUTPUT, **settings)


def _counts(llm: LLM) -> tuple[int, int]:
    return llm.batcher.counters.proposed, llm.batcher.counters.accepted


if __name__ == "__main__":
    raise SystemExit(main())
