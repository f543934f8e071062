"""Poisson arrivals: the highest rate that keeps latency low, continuous against static batching.

    python -m bench.arrivals MODEL [--trace FILE] [--clock cpu|wall]

Latency is normalised: seconds from arrival to the last token, per output token (ORCA, Yu et al. 2022, section 6.2). "Unloaded" is
the 90th percentile of it over 100 of the same requests, each served alone. For each factor of --factors (2, 4, 8), a policy
sustains the highest measured rate at which, and at all lower measured rates, the 90th percentile stays within factor x unloaded for
every seed. Rates are found by doubling and bisection until the sustained and the next failing one are within --tolerance.

Continuous hands requests to the engine as they arrive. In front of static batching stands a hold, as Triton's dynamic batcher
before a static engine: when the engine is empty, a batch of up to B requests starts once B wait or the oldest has waited w seconds.
Static runs, for each factor by itself, at its best (B, w): of the grid --batches x --waits (w in mean latencies of an unloaded
request) the one that sustains the highest rate at that factor, by the first seed. A static request is answered when its own last
token is drawn; with --answers batch when its whole batch is done, as in the original, where finished requests can't return early.

A run has at least --requests requests, and as many as arrive in --window mean unloaded latencies: the workload is repeated, so that
a rate above what can be sustained has the time to show.

Time: iterations run for real on one thread, and the clock moves by the process-CPU time each took (on a quiet machine that is its
wall time, and other load doesn't enter); --clock wall takes wall time, and --threads of any number. Idle time is jumped over. A run
is given up, above all limits, once more than a tenth of its requests are later than 1.5 x the loosest one.
"""

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench import options
from bench.contenders import DEFAULT_SLOTS, Policy, dtype_name, load_for_policies
from bench.driver import Drive, Hold, Runner, Served
from bench.rates import Curve, champion, explore
from bench.report import Cell, Line, Report, command_line, draw_lines
from bench.workload import Job, at_once, jobs, poisson
from cluster.config import BatchConfig, Batching

PERCENTILE = 90
ALONE = 100
"""Requests served alone."""
CHECK_EVERY = 16
"""Iterations between two looks at whether a run is lost."""
SWEEP_STEP = 1.15
"""Of rates in the sweep over (B, w)."""
TIMERS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Bench:
    """What all runs of a comparison share."""

    runner: Runner
    config: Callable[[Policy], BatchConfig]
    jobs: Sequence[Job]
    timer: Callable[[], float]
    window_s: float = 0.0
    """Arrivals go on for so long at least: a queue that grows shows only with time."""

    def arriving(self, rate: float, seed: int) -> list[Job]:
        """All jobs, again and again until `window_s` is filled, as a Poisson process of `rate` a second."""
        count = max(len(self.jobs), math.ceil(rate * self.window_s))
        return poisson([self.jobs[i % len(self.jobs)] for i in range(count)], rate, seed)

    def alone(self, policy: Policy) -> list[Served]:
        """Up to ALONE of the jobs, each by itself."""
        some = [self.jobs[i * len(self.jobs) // ALONE] for i in range(ALONE)] if len(self.jobs) > ALONE else self.jobs
        return [Drive([job], self.config(policy), self.runner, self.timer).run()[0] for job in some]

    def latency(self, policy: Policy, rate: float, seed: int, late: float = math.inf) -> float:
        """The 90th percentile of normalised latency at `rate` requests a second; math.inf as soon as it must be above `late`."""
        arriving = self.arriving(rate, seed)
        drive = Drive(arriving, self.config(policy), self.runner, self.timer, policy.hold)
        for count, _ in enumerate(drive.iterations()):
            if count % CHECK_EVERY == 0 and 100 * overdue(drive, late) > (100 - PERCENTILE) * len(arriving):
                return math.inf
        return percentile(drive.served)


def percentile(served: Sequence[Served]) -> float:
    """The 90th of normalised latency: the smallest value that nine tenths don't exceed."""
    latencies = [one.normalized_latency for one in served]
    return float(np.percentile(latencies, PERCENTILE, method="inverted_cdf"))


def overdue(drive: Drive, late: float) -> int:
    """Requests whose normalised latency is above `late`, or will be."""
    count = 0
    for served in drive.served:
        end = drive.now if served.finish_s is None else served.finish_s
        count += end - served.job.arrival_s > late * served.job.output_tokens
    return count


def best_static(bench: Bench, policies: Sequence[Policy], limit: float, seed: int, start: float) -> tuple[Policy, float] | None:
    """The policy that holds `limit` at the highest rate on a grid of rates from `start`, and that rate; None if none does there."""

    def holds(policy: Policy, rate: float) -> bool:
        return bench.latency(policy, rate, seed, late=limit) <= limit

    return champion(policies, holds, start, SWEEP_STEP)


def grid(batching: Batching, sizes: Sequence[int], waits: Sequence[float], together: bool) -> list[Policy]:
    """All (B, w); largest batches and shortest waits first."""
    return [Policy(batching, size, Hold(size, wait, together)) for size in sorted(sizes, reverse=True) for wait in sorted(waits)]


@dataclass(frozen=True)
class Side:
    """Continuous batching, or a variant of static at its best."""

    name: str
    best: dict[float, Policy]
    """By factor; those that no policy holds are missing."""
    curves: dict[Policy, Curve]

    def sustained(self, factor: float, limit: float, statistic: Callable[[list[float]], float] = max) -> float | None:
        """Requests a second within `limit`, by the policy that is best at `factor`."""
        return self.curves[self.best[factor]].sustained(limit, statistic) if factor in self.best else None

    def failing(self, factor: float, limit: float) -> float | None:
        """The lowest rate at which it was measured not to sustain."""
        return self.curves[self.best[factor]].first_failing(limit) if factor in self.best else None


def tabulate(sides: Sequence[Side], factors: Sequence[float], unloaded: float, report: Report) -> None:
    """Rates by factor that all seeds sustain, up to the lowest that one fails, and that the median seed sustains; the first side
    against each other."""
    columns = ["", *[f"{factor:g}x" for factor in factors], *[f"{factor:g}x, median seed" for factor in factors]]
    rows: list[list[Cell]] = []
    ratios: list[list[Cell]] = []
    sustained: list[list[float | None]] = []
    for side in sides:
        own = [side.sustained(factor, factor * unloaded, statistic) for statistic in (max, statistics.median) for factor in factors]
        sustained.append(own)
        failing = [side.failing(factor, factor * unloaded) for factor in factors]
        brackets = [f"{low:.3g} to {high:.3g}" if low and high else low for low, high in zip(own, failing, strict=False)]
        rows.append([side.name, *brackets, *own[len(factors) :]])
    for side, rates in zip(sides[1:], sustained[1:], strict=True):
        pairs = zip(sustained[0], rates, strict=True)
        ratios.append([f"{sides[0].name} to {side.name}", *(f"{a / b:.1f}x" if a and b else None for a, b in pairs)])
    limit = f"so many times the unloaded {1000 * unloaded:.2f} ms/token"
    report.table(f"requests/s sustained with p{PERCENTILE} normalised latency within {limit}", columns, rows)
    report.table("ratios", columns, ratios)


def lines(sides: Sequence[Side]) -> list[Line]:
    """Medians over the seeds with their range, in ms per token, as far as every seed was measured to its end."""
    drawn = []
    for policy, curve in ((policy, curve) for side in sides for policy, curve in side.curves.items()):
        finite = [(rate, [1000 * v for v in values]) for rate, values in sorted(curve.points.items()) if math.inf not in values]
        low, high = [min(values) for _, values in finite], [max(values) for _, values in finite]
        drawn.append(Line(policy.name, [rate for rate, _ in finite], [statistics.median(v) for _, v in finite], low, high))
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("model")
    options.add_workload(parser, requests=100, prompt_scale=0.0625, output_scale=0.125)
    parser.add_argument("--slots", type=options.positive, default=DEFAULT_SLOTS, help="of continuous (default: %(default)s)")
    parser.add_argument("--batches", type=options.numbers, default=[8, 16, 32, 64], help="B of static (8,16,32,64)")
    parser.add_argument("--waits", type=options.factors, default=[0.0, 0.5, 1.0], help="w in mean unloaded latencies (0,0.5,1)")
    parser.add_argument("--variants", nargs="+", choices=["static", "static-skip"], default=["static"], help="(static)")
    parser.add_argument("--answers", choices=["own", "batch"], default="own", help="when a static request is answered")
    parser.add_argument("--factors", type=options.factors, default=[2.0, 4.0, 8.0], help="limits (2,4,8)")
    parser.add_argument("--seeds", type=options.numbers, default=[1, 2, 3], help="of the arrivals (1,2,3)")
    parser.add_argument("--window", type=options.factor, default=100.0, help="of arrivals, in mean unloaded latencies (100)")
    parser.add_argument("--tolerance", type=options.factor, default=0.12, help="of sustained rates (default: %(default)s)")
    parser.add_argument("--clock", choices=list(TIMERS), default="cpu")
    parser.add_argument("--threads", type=options.positive, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-memory", help="of our pool")
    arguments = parser.parse_args(argv)
    if arguments.clock == "cpu" and arguments.threads != 1:
        parser.error("process-CPU time is time for a client with --threads 1 only; take --clock wall")
    report = Report("arrivals", command_line(argv))
    most = max(arguments.slots, *arguments.batches)
    llm = load_for_policies(arguments, most)
    try:
        shapes = at_once(options.workload(arguments, llm.batcher.config.max_sequence_tokens, report.say))
    except ValueError as error:
        parser.error(str(error))
    clock = f"the clock is {arguments.clock} time, idle time is jumped over"
    bench = Bench(llm.runner, lambda policy: policy.config(llm), jobs(shapes, llm.vocab_size), TIMERS[arguments.clock])
    report.say(f"rayline: {dtype_name(llm)}, {arguments.threads} threads; {clock}")
    sides, unloaded = compare(bench, arguments, report)
    tabulate(sides, arguments.factors, unloaded, report)
    report.record("points", {p.name: sorted(curve.points.items()) for side in sides for p, curve in side.curves.items()})
    report.save(arguments.out)
    levels = {f"{factor:g} x unloaded": 1000 * factor * unloaded for factor in arguments.factors}
    title = f"{arguments.model}, {len(shapes)} requests, {len(arguments.seeds)} seeds: median and range"
    labels = ("requests/s (Poisson)", f"p{PERCENTILE} normalised latency, ms per output token")
    draw_lines(arguments.out / "arrivals.png", title, *labels, lines(sides), levels, top=1.3 * max(levels.values()))


def compare(bench: Bench, arguments: Namespace, report: Report) -> tuple[list[Side], float]:
    """Continuous and each static variant, and the unloaded latency in seconds per token."""
    continuous = Policy("continuous", arguments.slots)
    bench.alone(continuous)  # warm-up
    alone = bench.alone(continuous)
    unloaded = percentile(alone)
    mean = statistics.mean(served.finish_s or 0.0 for served in alone)
    report.say(f"unloaded: {1000 * mean:.0f} ms a request, p{PERCENTILE} {1000 * unloaded:.2f} ms per output token")
    report.record("unloaded", {"mean_latency_s": mean, "p90_s_per_token": unloaded})
    bench = replace(bench, window_s=arguments.window * mean)
    late = 1.5 * max(arguments.factors) * unloaded

    def explored(policy: Policy, factors: Sequence[float], start: float) -> Curve:
        def measure(rate: float) -> list[float]:
            values = [bench.latency(policy, rate, seed, late) for seed in arguments.seeds]
            shown = ["given up" if math.isinf(value) else f"{value / unloaded:.2f}x" for value in values]
            print(f"{policy.name}: {rate:.3g} requests/s: {', '.join(shown)}", flush=True)
            return values

        return explore(measure, [factor * unloaded for factor in factors], start, arguments.tolerance)

    whole = explored(continuous, arguments.factors, 2 / mean)
    sides = [Side(continuous.name, dict.fromkeys(arguments.factors, continuous), {continuous: whole})]
    waits = [wait * mean for wait in arguments.waits]
    for variant in arguments.variants:
        candidates = grid(variant, arguments.batches, waits, arguments.answers == "batch")
        best: dict[float, Policy] = {}
        starts: dict[Policy, float] = {}
        rate = 0.1 / mean
        for factor in sorted(arguments.factors):
            found = best_static(bench, candidates, factor * unloaded, arguments.seeds[0], rate)
            if found is None:
                report.say(f"{variant}: no (B, w) holds {factor:g}x at {rate:.3g} requests/s")
                continue
            best[factor], rate = found  # what holds one factor holds the next
            starts.setdefault(best[factor], rate)
            tried = f"B of {arguments.batches}, w of {[f'{1000 * wait:.0f} ms' for wait in waits]}"
            report.say(f"{variant}: best of {tried} at {factor:g}x is {best[factor].name}, with {rate:.3g} requests/s by one seed")
        curves = {policy: explored(policy, [f for f, p in best.items() if p == policy], start) for policy, start in starts.items()}
        sides.append(Side(f"{variant}, best (B, w)", best, curves))
    report.say(
        f"unloaded, measured again at the end: p{PERCENTILE} {1000 * percentile(bench.alone(continuous)):.2f} ms per output token"
    )
    return sides, unloaded


if __name__ == "__main__":
    main()
