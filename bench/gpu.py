"""A GPU's checks and figures in one run: tokens and logits against transformers, then output tokens per second beside it.

    python -m bench.gpu [--models S M L] [--out DIR]

Works from a bare checkout beside torch, transformers and triton (no Ray, no msgspec), in some seven minutes on an H200; with
--device cpu anywhere. The models of bench.models are made first, in a temporary directory or in --directory.

1. fp32: greedy tokens of several prompts, batched and prefilled in chunks, must be those of transformers' generate(), run alone.
   The exit code says whether they are. Largest logit difference on the same tokens.
2. Other dtypes: agreement of the arg-max, and logit differences, to transformers in that dtype and to transformers in fp32.
3. Requests with prompts of 32 to 256 and outputs of 16 to 128 tokens, all at once, greedy: Rayline, transformers' static generate()
   (one batch padded on the left; surplus tokens don't count) and its continuous batching, in turn, repetition by repetition.

Every result is printed as soon as it is known. --out gets gpu.json and gpu.md, the tables to paste.
"""

import argparse
import contextlib
import dataclasses
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bench import models, options
from bench.exactness import Case, Run
from bench.gpu_sides import build, compare, continuous, free, generate, load_oracle, load_ours, rayline, rows, static
from bench.report import Cell, Report, command_line
from bench.workload import jobs, uniform_shapes
from cluster.model import open_model
from cluster.offline import LLM
from cluster.protocol import SamplingParams

PROMPTS = (1, 7, 40, 64, 65, 130, 200, 300)
"""Lengths of the prompts whose tokens are checked."""


# --- parity ---------------------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """A prompt, transformers' greedy tokens after it in fp32, and the logits they come from."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor
    """[len(tokens), vocab] fp32, on the CPU."""


@torch.inference_mode()
def teacher_forced(oracle: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """[len(tokens), vocab] fp32 on the CPU: the logits of each of `tokens`."""
    ids = torch.tensor([prompt + tokens[:-1]], device=oracle.device)
    logits: Tensor = oracle(ids).logits[0, len(prompt) - 1 :].float().cpu()
    return logits


def our_logits(llm: LLM, checked: Sequence[Checked]) -> list[Tensor]:
    """The same by our runner: two batches, prompts in chunks of 48 and then what is left, mixed with each other."""
    cases = [Case(i, c.prompt, SamplingParams(temperature=0.0)) for i, c in enumerate(checked)]
    rows: list[dict[int, Tensor]] = [{} for _ in cases]

    def keep(case: Case, index: int, likeliest: int, token: int, logits: Tensor) -> None:
        rows[case.seq][index] = logits

    for some in (cases[::2], cases[1::2]):
        run = Run(llm.runner, some, keep)
        for case in some:
            run.add(case, checked[case.seq].tokens[:-1])
        run.step({case.seq: 48 for case in some if len(case.prompt) > 48})
        run.step({case.seq: run.plans.sequences[case.seq].missing for case in some}, every=True)
    return [torch.stack([found[i] for i in range(len(found))]) for found in rows]


def largest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Absolute difference."""
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def agreement(some: Sequence[Tensor], others: Sequence[Tensor]) -> str:
    """Of the arg-max, in positions."""
    same = sum(int((one.argmax(-1) == other.argmax(-1)).sum()) for one, other in zip(some, others, strict=True))
    return f"{same} of {sum(len(one) for one in some)}"


def check_fp32(path: Path, device: str, num_tokens: int, say: Callable[[str], None]) -> tuple[list[Checked], list[Cell], bool]:
    """What transformers gives, a row of the table, and whether our tokens are the same."""
    oracle = load_oracle(path, "float32", device)
    shapes = [dataclasses.replace(shape, prompt_tokens=n) for shape, n in zip(uniform_shapes(len(PROMPTS)), PROMPTS, strict=True)]
    prompts = [job.prompt for job in jobs(shapes, oracle.config.vocab_size)]
    tokens = [generate(oracle, [prompt], num_tokens)[0] for prompt in prompts]
    checked = [Checked(p, t, teacher_forced(oracle, p, t)) for p, t in zip(prompts, tokens, strict=True)]
    del oracle
    llm = load_ours(path, "float32", device, slots=16, budget=64)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    ours = [completion.outputs[0].token_ids for completion in llm.generate(prompts, params, ignore_eos=True)]
    for c, own in zip(checked, ours, strict=True):
        if own != c.tokens:
            at = next(i for i, (a, b) in enumerate(zip(own, c.tokens, strict=True)) if a != b)
            top = c.logits[at].topk(2).values.tolist()
            say(
                f"prompt of {len(c.prompt)}: token {at} differs, where transformers' two best logits are {top[0]:.6f}, {top[1]:.6f}"
            )
    same = sum(own == c.tokens for c, own in zip(checked, ours, strict=True))
    logits, wanted = our_logits(llm, checked), [c.logits for c in checked]
    gap = largest(logits, wanted)
    row: list[Cell] = [path.name, "float32", f"{same} of {len(ours)}", agreement(logits, wanted), f"{gap:.1e}", None, None]
    return checked, row, same == len(ours)


def check_half(path: Path, dtype: str, device: str, checked: Sequence[Checked]) -> list[Cell]:
    """A row of the table."""
    oracle = load_oracle(path, dtype, device)
    theirs = [teacher_forced(oracle, c.prompt, c.tokens) for c in checked]
    del oracle
    ours = our_logits(load_ours(path, dtype, device, slots=16, budget=64), checked)
    exact = [c.logits for c in checked]
    gaps = [f"{largest(ours, theirs):.1e}", f"{largest(ours, exact):.1e}", f"{largest(theirs, exact):.1e}"]
    return [path.name, dtype, None, agreement(ours, theirs), *gaps]


# --- the whole ------------------------------------------------------------------------------------------------------


def facts(device: str) -> str:
    """What runs it."""
    about = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device == "cpu":
        return about
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
        about += f", driver {driver.strip()}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {about}"


PARITY = ("model", "dtype", "same outputs", "same arg-max", "largest logit difference", "ours to fp32", "theirs to fp32")
SPEED = ("model", "dtype", "requests", "side", "tok/s", "wall s", "times ours", "same outputs", "resident GiB", "peak GiB above")


def markdown(columns: Sequence[str], lines: Sequence[Sequence[Cell]]) -> str:
    """A table to paste."""

    def text(cell: Cell) -> str:
        if isinstance(cell, float):
            return f"{cell:.0f}" if cell >= 100 else f"{cell:.3g}"
        return "" if cell is None else str(cell)

    body = ["| " + " | ".join(map(text, line)) + " |" for line in (columns, *lines)]
    return "\n".join([body[0], "|" + "---|" * len(columns), *body[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 where fp32 tokens differ."""
    parser = options.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", nargs="+", default=["S", "M", "L"], choices=list(models.MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="for speed; parity always begins with float32")
    parser.add_argument("--requests", nargs="+", type=options.positive, default=[64, 256])
    parser.add_argument("--repetitions", type=options.positive, default=3)
    parser.add_argument("--tokens", type=options.positive, default=48, help="of each prompt whose tokens are checked")
    parser.add_argument("--seconds", type=options.positive, default=420, help="no new comparison after that (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="of the models; those that are there are taken (default: a temporary one)")
    parser.add_argument("--no-speed", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu")
    until = time.monotonic() + arguments.seconds
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # fp32 is fp32 on both sides: no TF32
    report = Report("gpu", command_line(argv))
    report.say(facts(arguments.device))
    with contextlib.ExitStack() as stack:
        directory: Path = arguments.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = make_models(directory, arguments.models, arguments.device, report.say)
        parity, same = run_parity(paths, arguments, report)
        speed = [] if arguments.no_speed else run_speed(paths, arguments, until, report)
    report.save(arguments.out)
    page = [facts(arguments.device), markdown(PARITY, parity), markdown(SPEED, speed)]
    (arguments.out / "gpu.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    report.say("fp32: all tokens are those of transformers" if same else "fp32: TOKENS DIFFER from those of transformers")
    return 0 if same else 1


def make_models(directory: Path, names: Sequence[str], device: str, say: Callable[[str], None]) -> list[Path]:
    """Paths of the models, made where they are not there."""
    began, tokenizer = time.monotonic(), None
    for name in names:
        if not (directory / name / "tokenizer.json").is_file():
            tokenizer = tokenizer or models.train_tokenizer()
            models.write_model(name, directory, tokenizer, device)
            free()
            say(f"made {name}, {time.monotonic() - began:.1f} s after the start")
    return [directory / name for name in names]


def run_parity(paths: Sequence[Path], arguments: argparse.Namespace, report: Report) -> tuple[list[list[Cell]], bool]:
    """The table's lines, and whether all fp32 tokens are the same."""
    lines: list[list[Cell]] = []
    all_same = True
    for path in paths:
        checked, row, same = check_fp32(path, arguments.device, arguments.tokens, report.say)
        all_same &= same
        lines.append(row)
        report.say(f"{path.name} float32: {row[2]} outputs the same, largest logit difference {row[4]}")
        for dtype in arguments.dtypes:
            free()
            if dtype != "float32":
                lines.append(check_half(path, dtype, arguments.device, checked))
                report.say(f"{path.name} {dtype}: arg-max {lines[-1][3]}, to theirs, ours and theirs to fp32: {lines[-1][4:]}")
        free()
    report.table("against transformers on the same tokens", PARITY, lines)
    return lines, all_same


def run_speed(paths: Sequence[Path], arguments: argparse.Namespace, until: float, report: Report) -> list[list[Cell]]:
    """The table's lines: largest models last, bf16 first."""
    lines: list[list[Cell]] = []
    for dtype in arguments.dtypes:
        for path in paths:
            for requests in arguments.requests:
                if time.monotonic() > until:
                    report.say(f"{path.name} {dtype} {requests} is left out: the time is over")
                    continue
                for line in run_comparison(path, dtype, requests, arguments, until, report.say):
                    lines.append(line)
                    report.say(" ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line))
                free()
    report.table("output tokens per second", SPEED, lines)
    return lines


def run_comparison(
    path: Path, dtype: str, requests: int, arguments: argparse.Namespace, until: float, say: Callable[[str], None]
) -> list[list[Cell]]:
    """The table's lines for one model, dtype and number of requests. Nothing is left on the device."""
    device: str = arguments.device
    makers = {
        "rayline": lambda: rayline(path, dtype, device, requests),
        "transformers static": lambda: static(path, dtype, device),
        "transformers continuous": lambda: continuous(path, dtype, device, requests),
    }
    shapes, vocab = uniform_shapes(requests), open_model(str(path)).shape.vocab_size
    warm = [dataclasses.replace(shape, output_tokens=4) for shape in shapes]
    sides = build(makers, jobs(warm, vocab), say)
    compare(sides, lambda repetition: jobs(shapes, vocab, repetition), arguments.repetitions, until)
    for side in sides:
        side.contender.close()
    return list(rows(sides, path.name, dtype, requests, sum(shape.output_tokens for shape in shapes)))


if __name__ == "__main__":
    raise SystemExit(main())
