"""Slot occupancy over all output lengths of a trace, unscaled: batching continuously against in static batches, without a model.

    python -m bench.occupancy [--trace FILE] [--slots 8,16,32,64]

Prompts are of one token and all requests there at once, in order of arrival; memory limits nothing. So lengths alone decide, and
occupancy (see bench.batching) is computed exactly from them: a static batch lasts for its longest output; under continuous batching
a slot that comes free takes the next request in the following iteration, which is list scheduling. --checked requests, spread over
the trace, also run through the Batcher on the fake model under both policies, and have to give the same.
"""

import heapq
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import options
from bench.driver import Drive, FakeRunner, Occupancy
from bench.report import Cell, Report, command_line, draw_bars
from bench.workload import Job, lognormal_shapes, read_trace
from cluster.config import BatchConfig, Batching


def static(lengths: Sequence[int], slots: int) -> tuple[Occupancy, Occupancy]:
    """Over the whole run, and over the iterations while further requests wait: all but the last batch."""
    batches = [lengths[first : first + slots] for first in range(0, len(lengths), slots)]
    whole, in_demand = (Occupancy(slots, sum(map(sum, some)), sum(map(max, some))) for some in (batches, batches[:-1]))
    return whole, in_demand


def continuous(lengths: Sequence[int], slots: int) -> tuple[Occupancy, Occupancy]:
    """The same: while requests wait all slots are taken, which ends with the iteration before the last one enters."""
    ends = [0] * slots
    last_start = 0
    for length in lengths:
        last_start = ends[0]
        heapq.heapreplace(ends, last_start + length)
    return Occupancy(slots, sum(lengths), max(ends)), Occupancy(slots, slots * last_start, last_start)


def run(lengths: Sequence[int], batching: Batching, slots: int) -> tuple[Occupancy, Occupancy]:
    """The same by the Batcher, on the fake model."""
    longest = max(lengths) + 1
    blocks = slots * (-(-longest // BatchConfig.block_size) + 2) + 1
    config = BatchConfig(
        num_blocks=blocks,
        max_model_len=longest,
        batching=batching,
        max_num_seqs=slots,
        max_num_batched_tokens=max(512, slots),
        prefix_cache="off",
    )
    drive = Drive([Job([7], length) for length in lengths], config, FakeRunner(blocks), itertools.count().__next__)
    whole, in_demand = Occupancy(slots), Occupancy(slots)
    for iteration in drive.iterations():
        whole.add(iteration)
        if iteration.waiting:
            in_demand.add(iteration)
    return whole, in_demand


def check(lengths: Sequence[int], slots: int) -> None:
    """Raises RuntimeError where the Batcher gives another occupancy than is computed."""
    policies: dict[Batching, tuple[Occupancy, Occupancy]] = {
        "static-skip": static(lengths, slots),
        "continuous": continuous(lengths, slots),
    }
    for batching, computed in policies.items():
        found = run(lengths, batching, slots)
        if found != computed:
            raise RuntimeError(f"{batching}, {slots} slots: the Batcher gives {found}, computed is {computed}")


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly."""
    return [lengths[i * len(lengths) // count] for i in range(count)] if count < len(lengths) else list(lengths)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="Azure CSV or Mooncake JSONL (default: log-normal lengths)")
    parser.add_argument("--slots", type=options.numbers, default=[8, 16, 32, 64], help="of both policies (8,16,32,64)")
    parser.add_argument(
        "--checked", type=options.positive, default=128, help="requests that the Batcher runs (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    report = Report("occupancy", command_line(argv))
    try:
        shapes = lognormal_shapes(20_000) if arguments.trace is None else read_trace(arguments.trace)
    except ValueError as error:
        parser.error(str(error))
    lengths = [shape.output_tokens for shape in shapes]
    mean, median = sum(lengths) / len(lengths), statistics.median(lengths)
    report.say(f"{len(lengths)} requests, {sum(lengths)} output tokens: mean {mean:.0f}, median {median:g}, longest {max(lengths)}")
    columns = [
        "slots",
        "static",
        "static, while some wait",
        "continuous",
        "continuous, while some wait",
        "iterations, static to continuous",
    ]
    rows: list[list[Cell]] = []
    for slots in arguments.slots:
        check(spread(lengths, arguments.checked), slots)
        sides = [static(lengths, slots), continuous(lengths, slots)]
        cells = [f"{occupancy.share:.1%}" for side in sides for occupancy in side]
        rows.append([slots, *cells, f"{sides[0][0].iterations / sides[1][0].iterations:.2f}x"])
    report.table("slot occupancy over all output lengths, computed", columns, rows)
    report.save(arguments.out)
    shares = {
        f"{policy}, {row[0]}": float(str(row[i]).rstrip("%")) for row in rows for policy, i in (("static", 1), ("continuous", 3))
    }
    draw_bars(arguments.out / "occupancy.png", f"slot occupancy, {len(lengths)} requests", {"%, whole run": shares})


if __name__ == "__main__":
    main()
