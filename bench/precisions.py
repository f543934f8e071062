"""One table of precisions: size, memory, load time, speed and accuracy of a model in each of them.

    python -m bench.models build/models M
    python -m bench.precisions deploy/demo [--text DIR] [--held-out DIR] [--repetitions 3] [--only int8,int4-g128]
    python -m bench.precisions build/models/M --random

Models are made in --out (build/bench/precisions/NAME) by what `rayline quantize` is made of, unless they are there. Each side is
then a process of its own; they take turns, and whoever is not asked is stopped. Speeds are output tokens/s of one request and of
16, and prompt tokens/s; ratios are medians over repetitions, to our bf16 and to transformers' generate() in fp32, whose linears
are torch's F.linear. Accuracy is on held-out text, against bf16, of models that were trained: --random leaves it out, and training.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bench import options
from bench.peers import Peer
from bench.report import Cell, Report, command_line
from bench.workload import Job, Shape, jobs
from cluster.model import ModelFiles, open_model
from cluster.schemes import Recipe, parse_precision, parse_recipe
from compress.calibration import calibration_text, held_out_text, rows_of
from compress.evaluate import Comparison, Evaluation, evaluate, size_of
from compress.layers import num_parameters
from compress.mixed import DEFAULT, search
from compress.qat import Tuning, control, tune
from compress.quantize import Method, Plan, quantize
from parallel.partition import layer_cost
from workers.quantization.weight import Ranging

SCRIPT = str(Path(__file__).parent / "peers" / "precision_peer.py")
BASE, PLAIN, MIXED, CALIBRATED = "bf16", "transformers fp32", "mixed", "int4 GPTQ"
SPEEDS = {"decode 1": [Shape(16, 33)], "decode 16": [Shape(16, 17)] * 16, "prefill": [Shape(385, 1)]}
"""What is asked for each speed. Of a decode the first token belongs to the prompt."""
_CALIBRATION, _MEASURED, _TUNING_ROWS, _LENGTH = 128, 64, 4096, 512


@dataclass(frozen=True)
class Kind:
    """A precision, and how it is come by."""

    recipe: str
    method: Method = "rtn"
    ranging: Ranging = "minmax"
    training: Literal["", "qat", "control"] = ""
    """qat: of what calibration made. control: of the model before, without rounding."""


KINDS = {
    "fp32": Kind("fp32"),
    "fp16": Kind("fp16"),
    BASE: Kind("bf16"),
    "int8": Kind("int8"),
    "int8 asymmetric": Kind("int8-asym"),
    "int8 dynamic": Kind("int8-dynamic"),
    "int4 rounded": Kind("int4-g128"),
    CALIBRATED: Kind("int4-g128", "gptq", "mse"),
    "int4 dynamic": Kind("int4-g128-dynamic", "gptq", "mse"),
    MIXED: Kind("", "gptq", "mse"),
    "bf16 fine-tuned (control)": Kind("bf16", training="control"),
    "int4 fine-tuned then GPTQ": Kind("int4-g128", "gptq", "mse", "control"),
    "int4 QAT": Kind("int4-g128", "gptq", "mse", "qat"),
}


TRAINED = {name for name, kind in KINDS.items() if kind.training} | {CALIBRATED}
"""That say nothing of random weights."""


@dataclass
class Side:
    """A process and what was measured of it."""

    peer: Peer
    seconds: dict[str, list[float]] = field(default_factory=lambda: {speed: [] for speed in SPEEDS})

    def run(self, speed: str, asked: Sequence[Job]) -> None:
        """Once; nobody else runs meanwhile."""
        self.peer.resume()
        began = time.perf_counter()
        self.peer.generate(asked)
        self.seconds[speed].append(time.perf_counter() - began)
        self.peer.pause()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="for calibration and training (default: a sample)")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[])
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,NAME", help=f"of: {', '.join(KINDS)}")
    parser.add_argument("--random", action="store_true", help="the weights are random: no training, no accuracy")
    parser.add_argument("--steps", type=options.positive, default=150, help="of training (default: %(default)s)")
    parser.add_argument("--share", type=options.factor, default=0.3, help="of bf16's linears for the mixed one, in size")
    parser.add_argument("--repetitions", type=int, default=3, help="0: no speeds (default: %(default)s)")
    parser.add_argument("--threads", type=options.positive, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    report = Report("precisions", command_line(argv))
    kinds = dict(KINDS)
    if arguments.random:
        kinds = {name: replace(kind, method="rtn", ranging="minmax") for name, kind in KINDS.items() if name not in TRAINED}
    if arguments.only:
        kinds = {name: kinds[name] for name in [BASE, *(name for name in arguments.only if name != BASE)]}
    files = open_model(arguments.model)
    folder = arguments.out / "precisions" / files.path.name
    made = Maker(files, folder, arguments).all_of(kinds)
    accuracy = {} if arguments.random else _accuracy(made, files, arguments)
    _sizes(report, made, accuracy)
    if arguments.repetitions:
        _speeds(report, made, files, arguments)
    report.record("accuracy", {name: found.as_dict() for name, found in accuracy.items()})
    report.save(arguments.out)


@dataclass(frozen=True)
class Maker:
    """Makes what is not there yet."""

    files: ModelFiles
    folder: Path
    arguments: argparse.Namespace

    def all_of(self, kinds: dict[str, Kind]) -> dict[str, Path]:
        """A directory for each."""
        made = {}
        for name, kind in kinds.items():
            made[name] = out = self.folder / re.sub(r"\W+", "-", name).strip("-")
            if not out.exists():
                print(f"making {out}", flush=True)
                self._make(name, kind, out)
        return made

    def _make(self, name: str, kind: Kind, out: Path) -> None:
        if kind.training == "qat":
            checkpoint = self.folder / f"{out.name}.pt"
            rows = self._rows(_TUNING_ROWS)
            tune(self.files, self._calibrated(), self._tuning(), rows, out, checkpoint=checkpoint, resume=True)
            return
        recipe = self._mixed() if name == MIXED else parse_recipe(kind.recipe)
        source = self._control() if kind.training else self.files
        quantize(source, Plan(recipe, kind.method, kind.ranging), self._rows(_CALIBRATION), out, resume=True).finish()

    def _calibrated(self) -> ModelFiles:
        """What training begins as, and what of the control is trained."""
        out = self.folder / "before-training"
        if not out.exists():
            self._make(CALIBRATED, KINDS[CALIBRATED], out)
        return open_model(str(out))

    def _tuning(self) -> Tuning:
        return Tuning(steps=self.arguments.steps)

    def _control(self) -> ModelFiles:
        out = self.folder / "fine-tuned-fp32"
        if out.exists():
            return open_model(str(out))
        return control(self.files, self._calibrated(), self._tuning(), self._rows(_TUNING_ROWS), out)

    def _rows(self, count: int) -> Tensor:
        length = min(_LENGTH, self.files.shape.max_position_embeddings)
        return rows_of(self.files, calibration_text(self.arguments.text), count, length)

    def _mixed(self) -> Recipe:
        """As large as if all linears took --share of what they take in bf16, or a little less; of random weights a quarter of the
        layers in int8."""
        if self.arguments.random:  # nothing to go by
            quarter = max(1, self.files.shape.num_layers // 4)
            return parse_recipe(f"layers.0-{quarter - 1}: int8, rest: int4-g128")
        linears = layer_cost(self.files.shape) * self.files.shape.num_layers  # a multiplication for each weight
        target = 2 * num_parameters(self.files.shape) - 2 * linears * (1 - self.arguments.share)
        recipe, _, loss = search(self.files, self._rows(16), [parse_precision(p) for p in DEFAULT], target_bytes=int(target))
        print(f"mixed, expected to lose {loss:.4f} nats: {recipe}", flush=True)
        return recipe


def _accuracy(made: dict[str, Path], files: ModelFiles, arguments: argparse.Namespace) -> dict[str, Evaluation]:
    length = min(_LENGTH, files.shape.max_position_embeddings)
    rows = rows_of(files, held_out_text(arguments.held_out), _MEASURED, length)
    base = str(made[BASE])
    return {name: evaluate(str(path), base, rows, threads=arguments.threads) for name, path in made.items()}


def _sizes(report: Report, made: dict[str, Path], accuracy: dict[str, Evaluation]) -> None:
    columns = ["", "MB", "GB per 10^9", "perplexity", "KL, nats per token", "same likeliest token", f"KL to that of {CALIBRATED}"]
    calibrated = accuracy.get(CALIBRATED)
    rows: list[list[Cell]] = []
    for name, path in made.items():
        size, count = size_of(path), num_parameters(open_model(str(path)).shape)
        found = accuracy.get(name)
        told = [None] * 3 if found is None else [str(found.perplexity), str(found.divergence), str(found.agreement)]
        ratio = None if found is None or calibrated is None else str(Comparison.of(found, calibrated).ratio)
        rows.append([name, size / 1e6, size / count, *told, ratio])
    report.table("Size, and accuracy on held-out text (95 % of bootstrap samples; ratios: of the same rows)", columns, rows)


def _speeds(report: Report, made: dict[str, Path], files: ModelFiles, arguments: argparse.Namespace) -> None:
    sides: dict[str, Side] = {}
    try:
        words = ["--threads", str(arguments.threads)]
        for name, path in made.items():
            if not KINDS[name].training:  # what was trained runs as its precision does
                sides[name] = Side(Peer(SCRIPT, Path(sys.executable), str(path), *words))
                sides[name].peer.pause()
        sides[PLAIN] = Side(Peer(SCRIPT, Path(sys.executable), str(made[BASE]), "--plain", "--dtype", "float32", *words))
        sides[PLAIN].peer.pause()
        for repetition in range(arguments.repetitions + 1):
            for speed, shapes in SPEEDS.items():
                asked = jobs(shapes, files.shape.vocab_size, repetition + 1)
                for side in sides.values():
                    side.run(speed, asked)
        for side in sides.values():  # the first time is for warming up
            side.seconds = {speed: taken[1:] for speed, taken in side.seconds.items()}
        _tell_speeds(report, sides)
    finally:
        for side in sides.values():
            side.peer.close()


def _tell_speeds(report: Report, sides: dict[str, Side]) -> None:
    columns = ["", "load s", "resident MB"]
    for speed in SPEEDS:
        columns += [f"{speed} tok/s", "to bf16", "to F.linear"]
    rows: list[list[Cell]] = []
    for name, side in sides.items():
        row: list[Cell] = [name, side.peer.said["load_s"], side.peer.said["resident_bytes"] / 1e6]
        for speed, shapes in SPEEDS.items():
            tokens = sum(shape.prompt_tokens if speed == "prefill" else shape.output_tokens for shape in shapes)
            row.append(tokens / statistics.median(side.seconds[speed]))
            row += [_ratio(sides[other], side, speed) for other in (BASE, PLAIN)]
        rows.append(row)
    report.table("Load time, memory of its own, speed", columns, rows)


def _ratio(other: Side, side: Side, speed: str) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(other.seconds[speed], side.seconds[speed], strict=True))


if __name__ == "__main__":
    main()
