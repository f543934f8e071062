"""What drawing tokens from logits takes: by the native kernels and by torch's operators, in turn.

    python -m bench.sampling [--rows 1,16,64] [--vocab 32000] [--threads 2] [--repetitions 20]

Milliseconds of wall clock for all rows together, medians.
"""

import statistics
import time
from collections.abc import Sequence

import torch

from bench import options
from bench.native import native_threads
from bench.report import Report, command_line
from cluster.protocol import NewSequence, SamplingParams
from workers.draws import DrawSetup
from workers.native.picker import NativePicker
from workers.picker import Picker, TorchPicker
from workers.sequences import SequenceState, Span

WAYS: dict[str, dict[str, float]] = {
    "temperature 1": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
}


def spans(rows: int, **params: float) -> list[Span]:
    """So many sequences of one token each."""
    made = []
    for seed in range(rows):
        new = NewSequence(choice=0, prompt=[0], emitted=[], params=SamplingParams(seed=seed, **params))  # type: ignore[arg-type]
        tokens = torch.zeros(1, dtype=torch.int32).numpy()
        made.append(Span(SequenceState(seed, 0, DrawSetup.of(new), 1, tokens, 1, tokens), 0, 1, True))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Raises SystemExit where the native kernels cannot be built."""
    parser = options.parser(__doc__)
    parser.add_argument("--rows", type=options.numbers, default=[1, 16, 64])
    parser.add_argument("--vocab", type=options.positive, default=32_000)
    parser.add_argument("--threads", type=options.positive, default=2)
    parser.add_argument("--repetitions", type=options.positive, default=20)
    arguments = parser.parse_args(argv)
    threads = native_threads(parser, arguments.threads)
    sides: dict[str, Picker] = {
        "native": NativePicker(arguments.vocab, threads),
        "torch": TorchPicker(arguments.vocab, torch.device("cpu")),
    }
    report, rows = Report("sampling", command_line(argv)), []
    for count in arguments.rows:
        torch.manual_seed(0)
        logits = torch.randn(count, arguments.vocab) * 2
        for way, params in WAYS.items():
            taken: dict[str, list[float]] = {side: [] for side in sides}
            drawing = spans(count, **params)
            for _ in range(arguments.repetitions):
                for side, picker in sides.items():
                    own = logits.clone()
                    began = time.perf_counter()
                    picker.pick(own, range(count), drawing)
                    taken[side].append(1e3 * (time.perf_counter() - began))
            rows.append([count, way, *(statistics.median(times) for times in taken.values())])
    report.table(f"tokens drawn from {arguments.vocab} logits a row, ms", ["rows", "", *sides], rows)
    report.save(arguments.out)


if __name__ == "__main__":
    main()
