"""The whole set, one benchmark after the other in a process of its own: what `make bench` runs.

    python -m bench [--model DIR] [--trace FILE] [--out DIR]

Offline against transformers, batching policies with peers, Poisson arrivals, slot occupancy over whole traces, KV waste, the
prefix cache; defaults are for the demo model on two cores. Each is a command by itself with more options: bench.offline,
bench.batching, bench.arrivals, bench.occupancy, bench.waste, bench.prefix.
"""

import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from bench import options
from cluster.model import DEMO_MODEL


def commands(arguments: Namespace) -> list[list[str]]:
    """What is run, as words after `python -m`."""
    model, out = str(arguments.model), ["--out", str(arguments.out)]
    whole = ["--trace", str(arguments.trace)] if arguments.trace is not None else []
    trace = [*whole, "--spread"] if whole else []
    return [
        ["bench.offline", model, *out],
        ["bench.batching", model, "--peers", *trace, *out],
        ["bench.arrivals", model, *trace, *out],
        ["bench.occupancy", *whole, *out],
        ["bench.waste", *trace, *out],
        ["bench.prefix", model, *out],
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, also after one that fails; 1 if one did."""
    parser = options.parser(__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, metavar="DIR", help="(default: the demo)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="Azure CSV or Mooncake JSONL (default: log-normal lengths)")
    failed = []
    for words in commands(parser.parse_args(argv)):
        print(f"\n--- python -m {shlex.join(words)}", flush=True)
        if subprocess.run([sys.executable, "-m", *words], check=False).returncode:
            failed.append(words[0])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
