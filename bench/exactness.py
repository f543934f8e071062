"""How often a token flips: the table of docs/exactness.md.

    python -m bench.exactness [MODEL ...] [--dtypes float32 bfloat16] [--parts whole divided] [--tokens N] [--write]

MODEL is a directory, or the name of a model of bench.models, which is made in a temporary directory; the demo and S where none is
named. --write puts the rows into docs/exactness.md, in place of those of the same models, dtypes and parts, with the command line
and the machine that gave them. Without --tokens and --sequences it counts as much as default_counts says.

The reference of a sequence is itself run alone: its whole prompt in one prefill, then token by token; every other sequence goes on
with its likeliest tokens, the rest with tokens drawn at temperature 1. Each cause then runs the same sequences in another way, but
on the reference's tokens whatever comes out, so that one flip doesn't bring others. At every position two flips are possible: the
arg-max of the logits is not the reference's, and the token drawn from them at temperature 1 with the sequence's seed is not.

The part "divided" runs them on tensor-parallel ranks or pipeline stages that are threads of this process (bench.divided): alone,
against that reference, and in batches, against alone on the same ranks.
"""

import argparse
import math
import os
import random
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from bench import divided, models, options
from bench.divided import Divided, can_divide
from bench.exactness_page import HEADER, PAGE, Measured, Part, Tally, row, source, write_page
from bench.plans import PlanWriter
from bench.report import command_line, cpu_model
from cluster.config import Config, from_mapping
from cluster.model import DEMO_MODEL, ModelFiles, open_model
from cluster.protocol import SamplingParams
from compress.corpus import collect, standard_library
from parallel.linear import cpu_computes_bfloat16
from parallel.mesh import Mesh
from router.tokenizer import load
from workers.device import resolve_device, torch_dtype
from workers.runner import ModelRunner, load_runner
from workers.sampler import Sampler
from workers.sequences import SequenceTable, Span

BLOCK_SIZE = 16
FULL = 10_000
"""Tokens for each cause where arithmetic is fast."""
WAVE = 64
"""Most sequences at a time: the references' logits are kept for so many."""
_LARGE = 32 << 20
"""Bytes of a checkpoint that takes its time on a CPU: S has 71 million, the demo 7."""
LONG = 8
"""Every so many sequences one has a prompt of over 512 tokens."""


@dataclass
class Case:
    """A sequence and its reference."""

    seq: int
    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    """What it goes on with, in whatever run."""
    greedy: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """Per position [vocab] fp32, on the CPU."""

    def keep(self, likeliest: int, drawn: int, logits: Tensor) -> None:
        """What the reference gives at its next position."""
        self.greedy.append(likeliest)
        self.drawn.append(drawn)
        self.logits.append(logits)


@dataclass(frozen=True)
class Bare:
    """A model without an engine, and what it was loaded by."""

    files: ModelFiles
    config: Config
    runner: ModelRunner


Observe = Callable[[Case, int, int, int, Tensor], None]
"""Case, index of the position in its output, likeliest token, drawn token, logits [vocab] fp32."""


class Run:
    """One epoch of a runner, driven by plans; logits are looked at in place of what the runner would draw."""

    def __init__(self, runner: ModelRunner | Divided, cases: Sequence[Case], observe: Observe) -> None:
        self.plans = PlanWriter(runner.num_blocks, runner.pool.block_size, carry=True)
        self._cases = {case.seq: case for case in cases}
        self._runner, self._observe = runner, observe
        self._judge = runner if isinstance(runner, Divided) else runner.decoder
        self._table = SequenceTable(runner.pool.block_size)
        self._sampler = Sampler(self._judge.kernels.picker(self._judge.shape.vocab_size, runner.pool.device))

    def add(self, case: Case, output: Sequence[int] = ()) -> None:
        """It comes with the next step, with so much output known."""
        self.plans.add(case.seq, case.prompt, case.params)
        self.plans.sequences[case.seq].output.extend(output)

    def step(self, counts: dict[int, int], *, every: bool = False) -> None:
        """Run so many tokens of each; the reference's next token is known afterwards where all known ones were computed.

        every: look at the logits of all positions from the prompt's last on, not only at the chunks' last ones.
        """
        spans, rows = self._forward(counts, every)
        greedy = rows.argmax(-1).tolist()
        drawn = [draw.token for draw in self._sampler.draw(rows.clone(), spans)] if spans else []
        for span, likeliest, token, logits in zip(spans, greedy, drawn, rows.cpu(), strict=True):
            case, tracked = self._cases[span.state.seq], self.plans.sequences[span.state.seq]
            index = span.end - len(case.prompt)
            self._observe(case, index, likeliest, token, logits)
            if index == len(tracked.output) and index < len(case.tokens):
                tracked.output.append(case.tokens[index])

    def decode(self, seqs: Sequence[int], until: int) -> None:
        """Steps with all of `seqs`, until each was looked at for `until` positions."""
        while left := [seq for seq in seqs if len(self.plans.sequences[seq].output) < until]:
            self.step({seq: self.plans.sequences[seq].missing for seq in left})

    @torch.inference_mode()
    def _forward(self, counts: dict[int, int], every: bool) -> tuple[list[Span], Tensor]:
        plan = self.plans.plan(counts)
        spans = self._table.apply(plan)
        hidden = self._runner.forward(spans)
        looked_at: list[Span] = []
        rows: list[int] = []
        first = 0
        for span in spans:
            start = max(span.start, len(self._cases[span.state.seq].prompt) - 1) if every else span.end - 1
            if span.sample:
                looked_at += [Span(span.state, position, position + 1, True) for position in range(start, span.end)]
                rows += range(first + start - span.start, first + span.num_tokens)
            first += span.num_tokens
        index = torch.tensor(rows, dtype=torch.int64, device=hidden.device)
        return looked_at, self._judge.logits(hidden.index_select(0, index))


def reference(runner: ModelRunner, case: Case, length: int) -> None:
    """Fill in the case's reference, `length` tokens of it."""

    def keep(case: Case, index: int, likeliest: int, token: int, logits: Tensor) -> None:
        case.tokens.append(token if case.seq % 2 else likeliest)
        case.keep(likeliest, token, logits)

    run = Run(runner, [case], keep)
    run.add(case)
    run.decode([case.seq], length)


def comparison(tally: Tally, begin: int = 0) -> Observe:
    """Counts into `tally`, from output position `begin` on."""

    def compare(case: Case, index: int, likeliest: int, token: int, logits: Tensor) -> None:
        if index < begin or index >= len(case.tokens):
            return
        tally.tokens += 1
        tally.greedy += likeliest != case.greedy[index]
        tally.drawn += token != case.drawn[index]
        tally.largest = max(tally.largest, float((logits - case.logits[index]).abs().max()))

    return compare


# --- causes --------------------------------------------------------------------------------------------------------


def batched(runner: ModelRunner | Divided, cases: Sequence[Case], tally: Tally, size: int) -> None:
    """`size` at a time: prompts together in one plan, then decodes together. What does not fill a batch is left out."""
    for first in range(0, len(cases) - size + 1, size):
        some = cases[first : first + size]
        run = Run(runner, some, comparison(tally))
        for case in some:
            run.add(case)
        run.decode([case.seq for case in some], len(some[0].tokens))


def mixed(runner: ModelRunner, cases: Sequence[Case], tally: Tally) -> None:
    """One enters every other step, its whole prompt beside the others' decodes."""
    run = Run(runner, cases, comparison(tally))
    waiting, length = list(cases), len(cases[0].tokens)
    step = 0
    while True:
        if waiting and step % 2 == 0:
            run.add(waiting.pop(0))
        left = {seq: t.missing for seq, t in run.plans.sequences.items() if len(t.output) < length}
        if not left and not waiting:
            return
        if left:
            run.step(left)
        step += 1


def chunked(runner: ModelRunner, cases: Sequence[Case], tally: Tally, size: int) -> None:
    """The prompt in chunks, then decodes, alone; prompts that are one chunk are left out."""
    for case in cases:
        if len(case.prompt) <= size:
            continue
        run = Run(runner, [case], comparison(tally))
        run.add(case)
        for _ in range((len(case.prompt) - 1) // size):
            run.step({case.seq: size})
        run.decode([case.seq], len(case.tokens))


def prefilled(runner: ModelRunner, cases: Sequence[Case], tally: Tally) -> None:
    """Prompt and output in one prefill, and the logits of all positions from it."""
    for case in cases:
        run = Run(runner, [case], comparison(tally))
        run.add(case, case.tokens[:-1])
        run.step({case.seq: len(case.prompt) + len(case.tokens) - 1}, every=True)


def preempted(runner: ModelRunner, cases: Sequence[Case], tally: Tally) -> None:
    """Half way all blocks are taken, everything is computed again in one prefill, then it goes on. Counted from there on."""
    for case in cases:
        half = len(case.tokens) // 2
        run = Run(runner, [case], comparison(tally, half))
        run.add(case, case.tokens[:half])  # what was computed before leaves nothing behind, so it needs no computing here
        run.decode([case.seq], len(case.tokens))


def count_divided(bare: Bare, mesh: Mesh, cases: Sequence[Case], alone: Tally, together: Tally | None) -> None:
    """Each alone on the ranks of `mesh`, then in batches, against that. Nothing where the model has no parts for so many.

    A rank has as many threads as the whole model: their number can change bits too.
    """
    config = replace(bare.config, tp=mesh.tp, pp=mesh.pp, threads=torch.get_num_threads())
    if not can_divide(bare.files, config):
        return
    again = {case.seq: replace(case, greedy=[], drawn=[], logits=[]) for case in cases}
    count = comparison(alone)

    def observe(case: Case, index: int, likeliest: int, token: int, logits: Tensor) -> None:
        count(case, index, likeliest, token, logits)
        again[case.seq].keep(likeliest, token, logits)

    with closing(Divided(bare.files, config, num_blocks=bare.runner.num_blocks)) as ranks:
        for case in cases:
            run = Run(ranks, [case], observe)
            run.add(case)
            run.decode([case.seq], len(case.tokens))
        if together is not None:
            batched(ranks, list(again.values()), together, divided.BATCH)


CAUSES: dict[str, Callable[[ModelRunner, Sequence[Case], Tally], None]] = {
    "batch of 2": lambda runner, cases, tally: batched(runner, cases, tally, 2),
    "batch of 8": lambda runner, cases, tally: batched(runner, cases, tally, 8),
    "batch of 64": lambda runner, cases, tally: batched(runner, cases, tally, 64),
    "batch, mixed with prefills": mixed,
    "prompt in chunks of 16": lambda runner, cases, tally: chunked(runner, cases, tally, 16),
    "prompt in chunks of 17": lambda runner, cases, tally: chunked(runner, cases, tally, 17),
    "prompt in chunks of 64": lambda runner, cases, tally: chunked(runner, cases, tally, 64),
    "prompt in chunks of 512": lambda runner, cases, tally: chunked(runner, cases, tally, 512),
    "prefill against decode": prefilled,
    "preemption": preempted,
}
PARTS: dict[str, tuple[str, ...]] = {"whole": tuple(CAUSES), "divided": divided.CAUSES}
ALL_CAUSES = [cause for causes in PARTS.values() for cause in causes]


# --- the whole table -----------------------------------------------------------------------------------------------


def make_cases(files: ModelFiles, count: int, length: int) -> list[Case]:
    """Prompts of 24 to 200 tokens of the standard library's source, every LONG-th of 520 to 700, as far as the model goes."""
    text = "".join(document.text for document in collect(standard_library()).held_out)
    ids = load(files.path).encode_now(text, add_special_tokens=False)
    rng = random.Random(1234)
    room = files.shape.max_position_embeddings - length
    cases = []
    for seq in range(count):
        size = rng.randint(520, 700) if seq % LONG == LONG - 1 and room >= 700 else rng.randint(24, 200)
        first = rng.randrange(len(ids) - size)
        cases.append(Case(seq, ids[first : first + min(size, room)], SamplingParams(seed=seq, temperature=1.0, max_tokens=length)))
    return cases


def measure(bare: Bare, tokens: int, causes: Sequence[str], sequences: int = WAVE) -> dict[str, Tally]:
    """Tallies of about `tokens` tokens for each cause; `sequences` at a time, up to WAVE."""
    assert 0 < sequences <= WAVE, "the pool holds a wave"
    waves = max(1, round(tokens / (sequences * WAVE)))
    length = max(2, math.ceil(tokens / (sequences * waves)))
    cases = make_cases(bare.files, waves * sequences, length)
    tallies = {cause: Tally() for cause in causes}
    for first in range(0, len(cases), sequences):
        wave = cases[first : first + sequences]
        for case in wave:
            reference(bare.runner, case, length)
        for cause, tally in tallies.items():
            if cause in CAUSES:
                CAUSES[cause](bare.runner, wave, tally)
        for name, mesh in divided.MESHES.items():
            alone, together = tallies.get(name), tallies.get(divided.in_batch(name))
            if alone is not None or together is not None:
                count_divided(bare, mesh, wave, alone or Tally(), together)
        for case in wave:
            case.logits.clear()
    return tallies


def load_bare(files: ModelFiles, dtype: str, device: str, length: int, kernels: str = "auto") -> Bare:
    """With a pool that holds a wave. Raises ConfigError for a dtype that is none."""
    longest = min(files.shape.max_position_embeddings, 700 + length)
    num_blocks = 1 + WAVE * (-(-200 // BLOCK_SIZE) + -(-length // BLOCK_SIZE) + 2) + WAVE // LONG * -(-longest // BLOCK_SIZE)
    torch_dtype(dtype)  # refuses what a row can't be named after, "auto" among it
    settings = {"dtype": dtype, "device": device, "block_size": BLOCK_SIZE, "kernels": kernels}
    config = from_mapping({"model": str(files.path), **settings})
    return Bare(files, config, load_runner(files, config, num_blocks=num_blocks))


def default_counts(files: ModelFiles, dtype: str, device: torch.device) -> tuple[int, int]:
    """Tokens for each cause and sequences at a time: fewer in what a CPU without bf16 arithmetic takes long for."""
    if device.type == "cuda" or cpu_computes_bfloat16():
        return FULL, WAVE
    large = sum(file.stat().st_size for file in files.path.glob("*.safetensors")) > _LARGE
    if dtype == "float32":
        return (2560, WAVE) if large else (FULL, WAVE)
    return (512, 16) if large else (2560, WAVE)


def _machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{threads} of {os.cpu_count()} cores of a {cpu_model()}, torch {torch.__version__}"


def _paths(names: Sequence[str], scratch: Path) -> Iterator[Path]:
    tokenizer = None
    for name in names:
        if name in models.MODELS:
            tokenizer = tokenizer or models.train_tokenizer()
            yield models.write_model(name, scratch, tokenizer)
        else:
            yield Path(name)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[str(DEMO_MODEL), "S"], metavar="MODEL")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=options.positive, help="for each cause, about")
    parser.add_argument("--sequences", type=options.positive, help=f"at a time, up to {WAVE}; fewer have fewer prompts to compute")
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="causes in the model, or in its division"
    )
    parser.add_argument("--causes", nargs="+", choices=ALL_CAUSES, metavar="CAUSE", help="default: all of the parts")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=options.positive, default=os.cpu_count() or 1)
    parser.add_argument("--machine", help="its name on the page; default: what it says of itself")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/exactness.md")
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.sequences is not None and arguments.sequences > WAVE:
        parser.error(f"--sequences is {arguments.sequences}, but the logits of at most {WAVE} are kept")
    parts = {part: causes for part, causes in PARTS.items() if part in arguments.parts}
    every = [cause for causes in parts.values() for cause in causes]
    causes = arguments.causes or every
    if arguments.write and set(causes) != set(every):
        parser.error("--write needs all causes: it replaces all rows of a model, dtype and part")
    torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    machine = arguments.machine or _machine(device, arguments.threads)
    came_from = source(device.type, shlex.join(["python", "-m", "bench.exactness", *command_line(argv)]), machine)
    print("\n".join((f"What gives the rows: {came_from}", "", *HEADER)), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for path in _paths(arguments.models, Path(scratch)):
            files = open_model(str(path))
            for dtype in arguments.dtypes:
                usual = default_counts(files, dtype, device)
                tokens, sequences = arguments.tokens or usual[0], arguments.sequences or usual[1]
                bare = load_bare(files, dtype, arguments.device, max(2, math.ceil(tokens / sequences)))
                tallies = measure(bare, tokens, causes, sequences)
                rows = {cause: row(path.name, dtype, cause, tally) for cause, tally in tallies.items()}
                print("\n".join(rows.values()), flush=True)
                if arguments.write:
                    measured = {
                        Part(path.name, dtype, part == "divided"): Measured(came_from, [rows[cause] for cause in theirs])
                        for part, theirs in parts.items()
                    }
                    write_page(measured, arguments.page)


if __name__ == "__main__":
    main()
