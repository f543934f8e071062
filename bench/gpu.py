"""A GPU's checks and figures in one run: tokens and logits against transformers, then output tokens per second beside it.

    python -m bench.gpu [--models S M L] [--out DIR]

Works from a bare checkout beside torch, transformers and triton (no Ray, no msgspec), meant to end in seven minutes on an H200;
with --device cpu anywhere. The models of bench.models are made first, in a temporary directory or in --directory.

1. fp32: greedy tokens of several prompts, batched and prefilled in chunks, must be those of transformers' generate(), run alone,
   except from a near-tie on, where our token is within NEAR_TIE of transformers' best logit. The exit code says whether they are.
   Largest logit difference on the same tokens.
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
from bench.contenders import continuous_generate, load_peer, padded_generate, static_generate
from bench.exactness import Case, Run
from bench.gpu_sides import LONGEST, STEP_TOKENS, build, compare, free, load_ours, rayline, rows
from bench.report import Cell, Report, command_line
from bench.workload import jobs, uniform_shapes
from cluster.model import open_model
from cluster.offline import LLM
from cluster.protocol import SamplingParams

PROMPTS = (1, 7, 40, 64, 65, 130, 200, 300)
"""Lengths of the prompts whose tokens are checked."""
NEAR_TIE = 1e-4
"""Two logits that are closer may change places: sums of fp32 in another order differ by some 1e-5."""


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


@dataclass(frozen=True)
class Difference:
    """The first token of an output that is not transformers'."""

    at: int
    behind: float
    """So far is our token's logit below the best, both transformers'."""

    @property
    def near_tie(self) -> bool:
        """It proves nothing wrong."""
        return self.behind < NEAR_TIE


def difference(own: Sequence[int], checked: Checked) -> Difference | None:
    """None where all tokens are the same."""
    for at, (ours, theirs) in enumerate(zip(own, checked.tokens, strict=True)):
        if ours != theirs:
            logits = checked.logits[at]
            return Difference(at, float(logits.max() - logits[ours]))
    return None


@dataclass
class Verdict:
    """On fp32 outputs."""

    same: int = 0
    near_ties: int = 0
    wrong: int = 0

    def add(self, found: Difference | None) -> None:
        """Count one output in."""
        if found is None:
            self.same += 1
        elif found.near_tie:
            self.near_ties += 1
        else:
            self.wrong += 1

    def __add__(self, other: "Verdict") -> "Verdict":
        return Verdict(self.same + other.same, self.near_ties + other.near_ties, self.wrong + other.wrong)

    def __str__(self) -> str:
        near = f", {self.near_ties} more up to a near-tie" if self.near_ties else ""
        return f"{self.same} of {self.same + self.near_ties + self.wrong}{near}"


def check_fp32(path: Path, device: str, num_tokens: int, say: Callable[[str], None]) -> tuple[list[Checked], list[Cell], Verdict]:
    """What transformers gives, a row of the table, and how far our tokens are the same."""
    oracle = load_peer(str(path), "float32", device)
    shapes = [dataclasses.replace(shape, prompt_tokens=n) for shape, n in zip(uniform_shapes(len(PROMPTS)), PROMPTS, strict=True)]
    prompts = [job.prompt for job in jobs(shapes, oracle.config.vocab_size)]
    tokens = [padded_generate(oracle, [prompt], num_tokens)[0] for prompt in prompts]
    checked = [Checked(p, t, teacher_forced(oracle, p, t)) for p, t in zip(prompts, tokens, strict=True)]
    del oracle
    llm = load_ours(path, "float32", device, slots=16, budget=64)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    ours = [completion.outputs[0].token_ids for completion in llm.generate(prompts, params, ignore_eos=True)]
    verdict = Verdict()
    for c, own in zip(checked, ours, strict=True):
        found = difference(own, c)
        verdict.add(found)
        if found is not None:
            kind = "a near-tie" if found.near_tie else "WRONG"
            say(f"prompt of {len(c.prompt)}: token {found.at} differs: {kind}, {found.behind:.1e} below transformers' best logit")
    logits, wanted = our_logits(llm, checked), [c.logits for c in checked]
    gap = largest(logits, wanted)
    row: list[Cell] = [path.name, "float32", str(verdict), agreement(logits, wanted), f"{gap:.1e}", None, None]
    return checked, row, verdict


def check_half(path: Path, dtype: str, device: str, checked: Sequence[Checked]) -> list[Cell]:
    """A row of the table."""
    oracle = load_peer(str(path), dtype, device)
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
    """Command line; 1 where fp32 tokens differ, other than from a near-tie on."""
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
        parity, verdict = run_parity(paths, arguments, report)
        speed = [] if arguments.no_speed else run_speed(paths, arguments, until, report)
    report.save(arguments.out)
    page = [facts(arguments.device), markdown(PARITY, parity), markdown(SPEED, speed)]
    (arguments.out / "gpu.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    if verdict.wrong:
        report.say("fp32: TOKENS DIFFER from those of transformers")
        return 1
    report.say(f"fp32: all tokens are those of transformers{', but from near-ties on' if verdict.near_ties else ''}")
    return 0


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


def run_parity(paths: Sequence[Path], arguments: argparse.Namespace, report: Report) -> tuple[list[list[Cell]], Verdict]:
    """The table's lines, and how far all fp32 tokens are the same."""
    lines: list[list[Cell]] = []
    whole = Verdict()
    for path in paths:
        checked, row, verdict = check_fp32(path, arguments.device, arguments.tokens, report.say)
        whole += verdict
        lines.append(row)
        report.say(f"{path.name} float32: {row[2]} outputs the same, largest logit difference {row[4]}")
        for dtype in arguments.dtypes:
            free()
            if dtype != "float32":
                lines.append(check_half(path, dtype, arguments.device, checked))
                report.say(f"{path.name} {dtype}: arg-max {lines[-1][3]}, to theirs, ours and theirs to fp32: {lines[-1][4:]}")
        free()
    report.table("against transformers on the same tokens", PARITY, lines)
    return lines, whole


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
    model, device = str(path), str(arguments.device)
    makers = {
        "rayline": lambda: rayline(path, dtype, device, requests),
        "transformers generate, static": lambda: static_generate(model, dtype, requests, by_length=False, device=device),
        "transformers continuous batching": lambda: continuous_generate(
            model, dtype, requests, LONGEST, device=device, step_tokens=STEP_TOKENS
        ),
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
