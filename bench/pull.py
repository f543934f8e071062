"""KV pulled from another engine against KV computed again: what each takes, by the length of the prefix.

    python -m bench.pull [MODEL] [--tokens 128 512 960] [--repetitions 8]

Two processes hold a pool of the model's layout each, as ranks of two engines do, and move blocks over the network of this machine
by the code that ranks move them by. For each length, in turn, repetition by repetition:

    computed    a prompt of so many tokens by the real model, in chunks as the Batcher makes them
    pulled      its blocks from one process to the other, from the orders to both ranks' word that it is done
    first       the same for two ranks that have not met before

Times are by the clock on the wall: to move KV takes another process's time too.
"""

import multiprocessing
import queue
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench import options
from bench.report import Cell, Report, command_line
from bench.workload import Shape, jobs
from cluster.model import DEMO_MODEL
from cluster.offline import LLM
from cluster.protocol import Give, Moved, SamplingParams, Take
from kv.pool import KVPool
from workers.mover import Mover

_WITHIN_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
    parser.add_argument("--tokens", type=options.positive, nargs="+", default=[128, 512, 960])
    parser.add_argument("--repetitions", type=options.positive, default=8)
    parser.add_argument("--threads", type=options.positive, default=1, help="of the model")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args(argv)
    report = Report("pull", command_line(argv))
    longest = max(arguments.tokens) + 1
    settings = {"dtype": arguments.dtype, "threads": arguments.threads, "prefix_cache": "off"}
    with LLM(arguments.model, max_model_len=longest, kv_memory="64MiB", **settings) as llm:
        pool = llm.runner.pool
        size = pool.block_size
        if pool.num_blocks <= longest // size:
            parser.error(f"{longest} tokens do not fit a pool of 64 MiB")
        with _two_ranks(pool) as ranks:
            rows: list[list[Cell]] = []
            ranks.pull(1, "warm")
            for tokens in arguments.tokens:
                seconds = _measure(llm, ranks, tokens, arguments.repetitions)
                report.record(str(tokens), seconds)
                computed, pulled, first = (statistics.median(seconds[name]) for name in ("computed", "pulled", "first"))
                mebibytes = tokens // size * pool.bytes_per_block / (1 << 20)
                rows.append([tokens, mebibytes, 1e3 * computed, 1e3 * pulled, computed / pulled, mebibytes / pulled, 1e3 * first])
    columns = ["tokens", "MiB", "computed ms", "pulled ms", "times", "MiB/s", "first ms"]
    report.table(f"{arguments.model}, {arguments.dtype}", columns, rows)
    report.save(arguments.out)
    return 0


def _measure(llm: LLM, ranks: "_Ranks", tokens: int, repetitions: int) -> dict[str, list[float]]:
    params = SamplingParams(seed=1, max_tokens=1)
    prompts = jobs([Shape(tokens, 1)] * (repetitions + 1), llm.vocab_size, tokens)
    llm.generate([prompts[-1].prompt], params)
    seconds: dict[str, list[float]] = {"computed": [], "pulled": [], "first": []}
    blocks = tokens // llm.runner.pool.block_size
    for repetition in range(repetitions):
        began = time.perf_counter()
        llm.generate([prompts[repetition].prompt], params)
        seconds["computed"].append(time.perf_counter() - began)
        seconds["pulled"].append(ranks.pull(blocks, "warm"))
        seconds["first"].append(ranks.pull(blocks, f"first {tokens} {repetition}"))
    return seconds


class _Ranks:
    """This process takes, another one gives."""

    def __init__(self, pool: KVPool, giver: Connection) -> None:
        self._moved: queue.SimpleQueue[Moved] = queue.SimpleQueue()
        self._mover = Mover(pool, "127.0.0.1", 1, 0, self._moved.put)
        self._giver = giver
        self._count = 0

    def pull(self, num_blocks: int, peer: str) -> float:
        """Seconds of a transfer."""
        self._count += 1
        order: dict[str, Any] = {
            "epoch": 1,
            "pull": str(self._count),
            "peer": peer,
            "store": self._mover.store,
            "blocks": list(range(1, num_blocks + 1)),
            "after": -1,
            "within_s": _WITHIN_S,
        }
        began = time.perf_counter()
        self._giver.send(Give(**order))
        self._mover.put(Take(**order))
        for moved in (self._moved.get(), self._giver.recv()):
            if moved.error:
                raise RuntimeError(moved.error)
        return time.perf_counter() - began


def _give(pipe: Connection, shape: Sequence[int], dtype: torch.dtype) -> None:
    layers, blocks, size, heads, head_dim = shape
    pool = KVPool(layers, blocks, size, heads, head_dim, dtype, torch.device("cpu"))
    mover = Mover(pool, "127.0.0.1", 1, 0, pipe.send)
    while (order := pipe.recv()) is not None:
        mover.put(order)


@contextmanager
def _two_ranks(pool: KVPool) -> Iterator[_Ranks]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    shape = (pool.num_layers, pool.num_blocks, pool.block_size, pool.num_kv_heads, pool.head_dim)
    process = context.Process(target=_give, args=(there, shape, pool.dtype), daemon=True)
    process.start()
    try:
        yield _Ranks(pool, here)
    finally:
        here.send(None)
        process.join()


if __name__ == "__main__":
    sys.exit(main())
