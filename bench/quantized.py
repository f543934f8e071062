"""What linears over quantized weights take, against fp32 and bf16 ones and torch's own in fp32, in turn.

    python -m bench.quantized [--rows 1,4,16,64,512] [--schemes int8,int8-dynamic,...] [--threads 2] [--repetitions 9]

The four linears of a layer of Qwen3-0.6B, one layer after the other, as many as hold more weights than the caches do.
Milliseconds of wall clock for one layer, medians.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench import options
from bench.native import native_threads
from bench.report import Cell, Report, command_line
from cluster.schemes import Scheme, parse_precision
from workers.native.library import PackedLinear, PackedQuantized, Threads
from workers.quantization.weight import quantize

SHAPES = {"qkv": (4096, 1024), "output": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}
"""[outputs, inputs]"""
SCHEMES = "int8,int8-g128,int8-dynamic,int4,int4-asym,int4-dynamic,fp8"
_LAYERS = 4
"""Of 16 million weights each: in 4 bits 32 MB."""

Layer = Sequence[Callable[[Tensor], Tensor]]


def layers(side: str, threads: Threads) -> list[Layer]:
    """Of random weights in one precision."""
    made: list[Layer] = []
    for number in range(_LAYERS):
        torch.manual_seed(number)
        made.append([_linear(torch.randn(shape) * 0.02, side, threads) for shape in SHAPES.values()])
    return made


def _linear(weight: Tensor, side: str, threads: Threads) -> Callable[[Tensor], Tensor]:
    if side == "torch":
        return lambda x: linear(x, weight)
    if side in ("fp32", "bf16"):
        return PackedLinear(weight if side == "fp32" else weight.bfloat16(), None, threads)
    scheme = parse_precision(side)
    assert isinstance(scheme, Scheme)
    return PackedQuantized(quantize(weight, scheme), None, threads)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Raises SystemExit where the native kernels cannot be built."""
    parser = options.parser(__doc__)
    parser.add_argument("--rows", type=options.numbers, default=[1, 4, 16, 64, 512])
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=SCHEMES.split(","))
    parser.add_argument("--threads", type=options.positive, default=2)
    parser.add_argument("--repetitions", type=options.positive, default=9)
    arguments = parser.parse_args(argv)
    threads = native_threads(parser, arguments.threads)
    sides = {side: layers(side, threads) for side in ("torch", "fp32", "bf16", *arguments.schemes)}
    report, rows, ratios = Report("quantized", command_line(argv)), [], []
    for count in arguments.rows:
        inputs = [torch.randn(count, shape[1]) for shape in SHAPES.values()]
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(arguments.repetitions):
            for side, made in sides.items():
                began = time.perf_counter()
                for layer in made:
                    for multiply, x in zip(layer, inputs, strict=True):
                        multiply(x)
                taken[side].append(1e3 * (time.perf_counter() - began) / _LAYERS)
        rows.append([count, *(statistics.median(times) for times in taken.values())])
        ratios.append(
            [count, *(statistics.median(b / t for b, t in zip(taken["bf16"], times, strict=True)) for times in taken.values())]
        )
    table: list[list[Cell]] = rows
    report.table("one layer's linears, ms", ["rows", *sides], table)
    report.table("times as fast as bf16, medians of pairs", ["rows", *sides], ratios)
    report.save(arguments.out)


if __name__ == "__main__":
    main()
