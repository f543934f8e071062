"""Continuous against static batching: the same requests, all there at once, through the same model and pool under each policy.

    python -m bench.batching MODEL [--trace FILE] [--peers]

Policies of our engine (cluster/batcher.py), all greedy, end-of-sequence ignored, requests in the order of their arrival:

    continuous    iteration-level scheduling (ORCA, Yu et al. 2022); --slots sequences at most, and our shipped default where
                  --slots is another number
    static        batches that are computed to the end of their longest row, finished rows too, as the original does
    static-skip   the same, finished rows skipped: they cost a place in the batch, but no arithmetic

Static runs at its best batch size: the one with the most output tokens per CPU second (which other load disturbs less) in one run
over the first --sweep-requests requests, for each variant by itself. Tried are those of --sweep, and doubles of the largest one as
long as it is the best, up to --sweep-most. That is --slots unless told otherwise: static gets at most as many slots as continuous,
so that at its largest both may hold the same number of sequences. The policies then run in turn, repetition by repetition, with
other tokens each time.

Slot occupancy = useful rows / (slots x iterations). A row is useful if a client gets the token drawn for it; slots are the
sequences that the policy runs at most (static: the batch size); iterations that draw no token (prefill only) are left out. It is
given over the whole run, and over the iterations during which further requests wait, that is without the drain at the end, which
a server under load doesn't have. Peers run in this process, on the same jobs: transformers' continuous batching with as many
slots, and its static `generate` at its own best batch size, found in the same way, also in order of arrival. With --vllm PYTHON,
the interpreter of an environment that has vLLM, that runs too, in a process of its own, with as many slots and threads.
"""

import contextlib
import dataclasses
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import options
from bench.contenders import (
    DEFAULT_SLOTS,
    Contender,
    Policy,
    PolicyContender,
    continuous_generate,
    dtype_name,
    faster_peer,
    interleave,
    load_for_policies,
    load_peer,
    static_batches,
    times_faster,
    vllm_offline,
)
from bench.report import Cell, Report, command_line, draw_bars
from bench.workload import Job, Shape, at_once, jobs
from cluster.config import Batching
from cluster.offline import LLM

STATIC: tuple[Batching, Batching] = ("static", "static-skip")


@dataclass(frozen=True)
class Sweep:
    """Which batch sizes a static side tries, and on what."""

    sizes: Sequence[int]
    most: int
    """No larger one is tried."""
    some: Sequence[Job]
    report: Report

    def best(self, what: str, make: Callable[[int], Contender]) -> int:
        """The batch size of the most output tokens per CPU second."""
        tokens = sum(job.output_tokens for job in self.some)

        def rate(size: int) -> float:
            contender = make(size)
            contender.run(self.some)
            return tokens / contender.cpu_s

        best, rates = best_batch(self.sizes, self.most, rate)
        listed = ", ".join(f"{size}: {rate:.0f}" for size, rate in rates.items())
        edge = ", the largest allowed" if best == self.most else ""
        self.report.say(
            f"sweep of {what} over {len(self.some)} requests, output tokens per CPU s by batch size: {listed}; best: {best}{edge}"
        )
        self.report.record(f"sweep {what}", rates)
        return best


def best_batch(sizes: Sequence[int], most: int, rate: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """The size of the highest rate (output tokens per second), and all rates; the smaller one where they are equal.

    Sizes above `most` are cut to it. As long as the largest one is the best, its double is tried.
    """
    rates = {size: rate(size) for size in sorted({min(size, most) for size in sizes})}
    while True:
        best = max(rates, key=lambda size: rates[size])
        if best < max(rates) or best == most:
            return best, rates
        larger = min(2 * best, most)
        rates[larger] = rate(larger)


def best_static(llm: LLM, batching: Batching, sweep: Sweep) -> Policy:
    """At its best batch size."""
    return Policy(batching, sweep.best(batching, lambda size: PolicyContender(llm, Policy(batching, size))))


def peers(arguments: Namespace, sweep: Sweep, shapes: Sequence[Shape], vocab_size: int) -> list[Contender]:
    """What runs here of transformers; the reason is said for what doesn't."""
    model, dtype, say = arguments.model, arguments.peer_dtype, sweep.report.say
    trial = [dataclasses.replace(s, prompt_tokens=min(32, s.prompt_tokens), output_tokens=32) for s in shapes[: sweep.most]]
    tokens = jobs(trial, vocab_size)
    if dtype == "faster":
        loaded, dtype = faster_peer(model, sweep.most, tokens, say, by_length=False)
    else:
        loaded = load_peer(model, dtype)
    batch = sweep.best("transformers generate", lambda size: static_batches(loaded, dtype, size, by_length=False))
    found = [static_batches(loaded, dtype, batch, by_length=False)]
    longest = max(shape.total for shape in (*shapes, *trial[:2]))
    found += running(
        "transformers' continuous batching", lambda: continuous_generate(model, dtype, arguments.slots, longest), tokens[:2], say
    )
    return found


def vllm(arguments: Namespace, llm: LLM, shapes: Sequence[Shape]) -> Contender:
    """vLLM with our dtype."""
    longest = max(shape.total for shape in shapes) + 1
    return vllm_offline(arguments.vllm, arguments.model, dtype_name(llm), arguments.slots, longest, arguments.threads)


def running(what: str, make: Callable[[], Contender], warm: Sequence[Job], say: Callable[[str], None]) -> list[Contender]:
    """The peer, warm; none where it does not run here, for which the reason is said."""
    try:
        peer = make()
        try:
            peer.generate(warm)
        except BaseException:
            peer.close()
            raise
    except Exception as error:  # whatever a peer of another version raises: the comparison goes on without it
        say(f"left out: {what} does not run here: {type(error).__name__}: {error}")
        return []
    return [peer]


def tabulate(contenders: Sequence[Contender], tokens: int, report: Report) -> None:
    """The table of all, and what the first one is to each other."""
    columns = ["", "output tok/s", "wall s", "CPU s", "occupancy", "while some wait", "first is, by wall", "by CPU"]
    rows: list[list[Cell]] = []
    for contender in contenders:
        share: list[Cell] = [None, None]
        if isinstance(contender, PolicyContender):
            share = [f"{contender.whole.share:.1%}", f"{contender.in_demand.share:.1%}"]
        ratios = [f"{ratio:.2f}x" for ratio in times_faster(contenders[0], contender)]
        rows.append([contender.name, tokens / contender.wall_s, contender.wall_s, contender.cpu_s, *share, *ratios])
    report.table("batching policies, all requests at once (medians; ratios are medians of pairwise ones)", columns, rows)
    report.record("repetitions", {c.name: {"wall_s": c.wall, "cpu_s": c.cpu} for c in contenders})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("model")
    options.add_workload(parser, requests=256, prompt_scale=0.125, output_scale=0.25)
    parser.add_argument("--slots", type=options.positive, default=DEFAULT_SLOTS, help="of continuous (default: %(default)s)")
    parser.add_argument("--sweep", type=options.numbers, default=[8, 16, 32, 64], help="batch sizes of static (8,16,32,64)")
    parser.add_argument("--sweep-most", type=options.positive, help="largest batch of static (default: --slots)")
    parser.add_argument("--sweep-requests", type=options.positive, help="default: all")
    parser.add_argument("--repetitions", type=options.positive, default=3)
    parser.add_argument("--threads", type=options.positive, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="auto", help="ours")
    parser.add_argument("--kv-memory", help="of our pool")
    parser.add_argument("--peers", action="store_true", help="transformers beside ours")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="vLLM of that interpreter's environment beside ours")
    parser.add_argument("--peer-dtype", default="faster", choices=["faster", "float32", "bfloat16"])
    arguments = parser.parse_args(argv)
    report = Report("batching", command_line(argv))
    torch.set_num_threads(arguments.threads)
    largest = arguments.sweep_most or arguments.slots
    most = max(arguments.slots, DEFAULT_SLOTS, largest)
    llm = load_for_policies(arguments, most)
    try:
        shapes = at_once(options.workload(arguments, llm.batcher.config.max_sequence_tokens, report.say))
    except ValueError as error:
        parser.error(str(error))
    report.say(f"rayline: {dtype_name(llm)}, {arguments.threads} threads, pool of {llm.batcher.config.pool_tokens} tokens")
    PolicyContender(llm, Policy("continuous", arguments.slots)).run(jobs(shapes[:8], llm.vocab_size))
    sweep = Sweep(arguments.sweep, largest, jobs(shapes[: arguments.sweep_requests], llm.vocab_size), report)
    policies = [Policy("continuous", arguments.slots), *(best_static(llm, kind, sweep) for kind in STATIC)]
    if arguments.slots != DEFAULT_SLOTS:
        policies.append(Policy("continuous", DEFAULT_SLOTS))
    with contextlib.ExitStack() as stack:
        contenders: list[Contender] = [PolicyContender(llm, policy) for policy in policies]

        def enter(found: Sequence[Contender]) -> None:
            for contender in found:
                stack.callback(contender.close)
            contenders.extend(found)

        if arguments.peers:
            enter(peers(arguments, sweep, shapes, llm.vocab_size))
        if arguments.vllm:
            enter(running("vLLM", lambda: vllm(arguments, llm, shapes), jobs(shapes[:8], llm.vocab_size), report.say))
        interleave(contenders, arguments.repetitions, lambda repetition: jobs(shapes, llm.vocab_size, repetition))
    tokens = sum(shape.output_tokens for shape in shapes)
    tabulate(contenders, tokens, report)
    report.save(arguments.out)
    ours = [contender for contender in contenders if isinstance(contender, PolicyContender)]
    panels = {
        "output tok/s": {c.name: tokens / c.wall_s for c in contenders},
        "slot occupancy, % (whole run)": {c.name: 100 * c.whole.share for c in ours},
    }
    draw_bars(arguments.out / "batching.png", f"{arguments.model}: {len(shapes)} requests at once", panels)


if __name__ == "__main__":
    main()
