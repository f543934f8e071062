"""Continuous against static batching: the same requests, all there at once, through the same model and pool under each policy.

    python -m bench.batching MODEL [--trace FILE] [--peers]

Policies of our engine (cluster/batcher.py), all greedy, end-of-sequence ignored, requests in the order of their arrival:

    continuous    iteration-level scheduling (ORCA, Yu et al. 2022); --slots sequences at most, and our shipped default where
                  --slots is another number
    static        batches that are computed to the end of their longest row, finished rows too, as the original does
    static-skip   the same, finished rows skipped: they cost a place in the batch, but no arithmetic

Static runs at its best batch size: the one of --sweep with the most output tokens per CPU second (which other load disturbs less)
in one run over the first --sweep-requests requests, for each variant by itself. The policies then run in turn, repetition by
repetition, with other tokens each time.

Slot occupancy = useful rows / (slots x iterations). A row is useful if a client gets the token drawn for it; slots are the
sequences that the policy runs at most (static: the batch size); iterations that draw no token (prefill only) are left out. It is
given over the whole run, and over the iterations during which further requests wait, that is without the drain at the end, which
a server under load doesn't have. Peers run in this process, on the same jobs: transformers' continuous batching with as many
slots, and its static `generate` at our static side's best batch size, also in order of arrival. With --vllm PYTHON, the interpreter
of an environment that has vLLM, that runs too, in a process of its own, with as many slots and threads.
"""

import dataclasses
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
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
    faster_static,
    interleave,
    static_generate,
    times_faster,
    vllm_offline,
)
from bench.report import Cell, Report, command_line, draw_bars
from bench.workload import Job, Shape, at_once, jobs
from cluster.config import Batching
from cluster.offline import LLM


def best_batch(batching: Batching, sizes: Sequence[int], rate: Callable[[Policy], float]) -> tuple[Policy, dict[int, float]]:
    """The static policy of the highest rate (output tokens per second), and all rates; the smaller batch where they are equal."""
    rates = {size: rate(Policy(batching, size)) for size in sorted(set(sizes))}
    return Policy(batching, max(rates, key=lambda size: rates[size])), rates


def swept(llm: LLM, sizes: Sequence[int], some: Sequence[Job], report: Report) -> list[Policy]:
    """Both static variants, each at its best batch size over `some`."""
    tokens = sum(job.output_tokens for job in some)

    def rate(policy: Policy) -> float:
        contender = PolicyContender(llm, policy)
        contender.run(some)
        return tokens / contender.cpu_s

    policies = []
    variants: tuple[Batching, Batching] = ("static", "static-skip")
    for batching in variants:
        policy, rates = best_batch(batching, sizes, rate)
        listed = ", ".join(f"{size}: {rate:.0f}" for size, rate in rates.items())
        report.say(f"sweep of {batching} over {len(some)} requests, output tokens per CPU s by batch size: {listed}")
        report.record(f"sweep {batching}", rates)
        policies.append(policy)
    return policies


def peers(arguments: Namespace, batch: int, shapes: Sequence[Shape], vocab_size: int, report: Report) -> list[Contender]:
    """What runs here of transformers; the reason is said for what doesn't. batch: of its static side."""
    model, dtype = arguments.model, arguments.peer_dtype
    trial = [dataclasses.replace(s, prompt_tokens=min(32, s.prompt_tokens), output_tokens=4) for s in shapes[:batch]]
    tokens = jobs(trial, vocab_size)
    if dtype == "faster":
        static = faster_static(model, batch, tokens, report.say, by_length=False)
        dtype = "bfloat16" if "bfloat16" in static.name else "float32"
    else:
        static = static_generate(model, dtype, batch, by_length=False)
    found = [static]
    try:
        continuous = continuous_generate(model, dtype, arguments.slots, max(shape.total for shape in shapes))
        continuous.generate(tokens[:2])
    except Exception as error:  # whatever a peer of another version raises: the comparison goes on without it
        report.say(f"left out: transformers' continuous batching does not run here: {type(error).__name__}: {error}")
    else:
        found.append(continuous)
    return found


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
    most = max(arguments.slots, DEFAULT_SLOTS, *arguments.sweep)
    settings = {"max_num_seqs": most, "max_num_batched_tokens": max(512, most), "kv_memory": arguments.kv_memory}
    llm = LLM(arguments.model, dtype=arguments.dtype, threads=arguments.threads, **settings)
    try:
        shapes = at_once(options.workload(arguments, llm.batcher.config.max_sequence_tokens, report.say))
    except ValueError as error:
        parser.error(str(error))
    report.say(f"rayline: {dtype_name(llm)}, {arguments.threads} threads, pool of {llm.batcher.config.pool_tokens} tokens")
    PolicyContender(llm, Policy("continuous", arguments.slots)).run(jobs(shapes[:8], llm.vocab_size))
    static, skip = swept(llm, arguments.sweep, jobs(shapes[: arguments.sweep_requests], llm.vocab_size), report)
    policies = [Policy("continuous", arguments.slots), static, skip]
    if arguments.slots != DEFAULT_SLOTS:
        policies.append(Policy("continuous", DEFAULT_SLOTS))
    contenders: list[Contender] = [PolicyContender(llm, policy) for policy in policies]
    if arguments.peers:
        contenders += peers(arguments, static.slots, shapes, llm.vocab_size, report)
    if arguments.vllm:
        dtype, longest = dtype_name(llm), max(shape.total for shape in shapes) + 1
        vllm = vllm_offline(arguments.vllm, arguments.model, dtype, arguments.slots, longest, arguments.threads)
        vllm.generate(jobs(shapes[:8], llm.vocab_size))
        contenders.append(vllm)
    try:
        interleave(contenders, arguments.repetitions, lambda repetition: jobs(shapes, llm.vocab_size, repetition))
    finally:
        for contender in contenders:
            contender.close()
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
