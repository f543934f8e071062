"""Output tokens per second on a pile of requests, against transformers' static `generate`.

    python -m bench.models DIRECTORY
    python -m bench.offline DIRECTORY/S [--repetitions 3] [--threads 2]

64 requests at once, prompts of 32 to 256 tokens, outputs of 16 to 128, greedy, end-of-sequence ignored. The peer takes them in
batches of 64, sorted by output length and padded on the left; its surplus tokens don't count. It runs in the dtype that is
faster for it here. Both sides run in this process in turn, repetition by repetition, after one warm-up each; prompts differ
between repetitions in tokens, not in shape, so that no cache carries over. CPU seconds stand beside wall seconds for machines
that others use too.
"""

import dataclasses
import os
from collections.abc import Sequence

import torch

from bench import options
from bench.contenders import faster_peer, interleave, load_peer, rayline, static_batches, times_faster
from bench.report import Cell, Report, command_line, draw_bars
from bench.workload import jobs, uniform_shapes
from cluster.offline import LLM


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--requests", type=options.positive, default=64)
    parser.add_argument("--repetitions", type=options.positive, default=3)
    parser.add_argument("--threads", type=options.positive, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="auto", help="ours")
    parser.add_argument("--peer-dtype", default="faster", choices=["faster", "float32", "bfloat16"])
    parser.add_argument("--batch", type=options.positive, default=64, help="the peer's")
    parser.add_argument("--no-warmup", action="store_true")
    arguments = parser.parse_args(argv)
    report = Report("offline", command_line(argv))
    torch.set_num_threads(arguments.threads)
    llm = LLM(arguments.model, dtype=arguments.dtype, threads=arguments.threads, max_model_len=512, prefix_cache="off")
    shapes = uniform_shapes(arguments.requests)
    report.say(f"{len(shapes)} requests at once, {arguments.threads} threads: {options.summary(shapes)}")
    trial = [dataclasses.replace(shape, prompt_tokens=32, output_tokens=32) for shape in shapes]
    ours = rayline(llm)
    if arguments.peer_dtype == "faster":
        loaded, dtype = faster_peer(arguments.model, arguments.batch, jobs(trial, llm.vocab_size), report.say, by_length=True)
    else:
        loaded, dtype = load_peer(arguments.model, arguments.peer_dtype), arguments.peer_dtype
    peer = static_batches(loaded, dtype, arguments.batch, by_length=True)
    if not arguments.no_warmup:
        for contender in (ours, peer):
            contender.generate(jobs(trial, llm.vocab_size))
    interleave((ours, peer), arguments.repetitions, lambda repetition: jobs(shapes, llm.vocab_size, repetition))
    tokens = sum(shape.output_tokens for shape in shapes)
    columns = ["", "tok/s median", "best", "wall s", "CPU s"]
    rows: list[list[Cell]] = [[c.name, tokens / c.wall_s, tokens / min(c.wall), c.wall_s, c.cpu_s] for c in (ours, peer)]
    report.table("output tokens per second", columns, rows)
    wall, cpu = times_faster(ours, peer)
    same = sum(a == b for a, b in zip(ours.outputs, peer.outputs, strict=True))
    report.say(f"{wall:.2f}x (median of pairwise ratios; by CPU time {cpu:.2f}x)")
    report.say(f"{same} of {len(ours.outputs)} outputs of the last repetition are the same, token for token")
    report.record("repetitions", {c.name: {"wall_s": c.wall, "cpu_s": c.cpu} for c in (ours, peer)})
    report.record("ratio", {"wall": wall, "cpu": cpu, "same_outputs": same})
    report.save(arguments.out)
    rates = {c.name: tokens / c.wall_s for c in (ours, peer)}
    draw_bars(arguments.out / "offline.png", f"{arguments.model}: {len(shapes)} requests at once", {"output tok/s": rates})


if __name__ == "__main__":
    main()
