"""Where KV slots go under each way to reserve them: the waste ledger, on the fake model (no weights, real Batcher and KV manager).

    python -m bench.waste [--trace FILE] [--max-model-len 4096] [--requests 0]

All requests are there at once and wait for the same pool, which is what limits how many run. Ways to reserve, after the baselines
of PagedAttention (Kwon et al. 2023, section 6.1):

    paged               blocks of 16 as tokens come, our shipped default
    max_tokens, exact   room for prompt + max_tokens at admission, where the client asks for just what it will get: the best case
                        ("Oracle"), which no client knows
    max_tokens, pow2    the same, where the client asks for the next power of two of what it will get ("Pow2": at most twice)
    contiguous          one run of max-model-len slots for each sequence ("Max")

Waste = 1 - used / allocated slots, both summed over all iterations, each looked at while its plan is in flight; a slot is used if
it holds the KV of a token that is computed or being computed. A request that ends before its max_tokens is cancelled then, as at a
stop string. Every 100th request's tokens are checked against the fake model's definition.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench import options
from bench.driver import Drive, FakeRunner
from bench.report import Cell, Report, command_line, draw_bars
from bench.workload import Job, Shape
from cluster.batcher import Batcher
from cluster.config import BatchConfig, Reservation
from cluster.protocol import SamplingParams
from workers.fake import fake_output

CHECKED_EVERY = 100


@dataclass(frozen=True)
class Case:
    """A way to reserve, and what clients ask for under it."""

    name: str
    reservation: Reservation
    rounded: bool = False
    """max_tokens is the next power of two of the output's length, else that length."""


CASES = (
    Case("paged (default)", "paged"),
    Case("max_tokens, exact", "max_tokens"),
    Case("max_tokens, pow2", "max_tokens", rounded=True),
    Case("contiguous", "contiguous"),
)


@dataclass
class Usage:
    """Sums over iterations."""

    iterations: int = 0
    allocated: int = 0
    used: int = 0
    running: int = 0
    preemptions: int = 0
    seconds: float = 0.0

    def observe(self, batcher: Batcher) -> None:
        """Look at one iteration's plan in flight."""
        stats = batcher.stats()
        self.iterations += 1
        self.allocated += stats.slots_allocated
        self.used += stats.slots_used
        self.running += stats.running
        self.preemptions = batcher.counters.preemptions

    @property
    def waste(self) -> float:
        """0 to 1."""
        return 1 - self.used / self.allocated if self.allocated else 0.0

    @property
    def mean_running(self) -> float:
        """Sequences per iteration."""
        return self.running / self.iterations if self.iterations else 0.0


def next_power_of_two(value: int) -> int:
    """The smallest that is at least `value`."""
    return 1 << (value - 1).bit_length()


def asking(shapes: Sequence[Shape], case: Case, max_model_len: int) -> list[Job]:
    """The jobs as clients would ask for them; nobody asks for more than fits `max_model_len`."""
    made = []
    for index, shape in enumerate(shapes):
        most = next_power_of_two(shape.output_tokens) if case.rounded else shape.output_tokens
        # The fake model hashes: one number repeated is as good a prompt as any.
        prompt = [index % 997] * shape.prompt_tokens
        made.append(Job(prompt, shape.output_tokens, max_tokens=min(most, max_model_len - shape.prompt_tokens)))
    return made


def account(jobs: Sequence[Job], config: BatchConfig) -> Usage:
    """Run the jobs and sum up the ledger. Raises RuntimeError where a checked request has wrong tokens."""
    usage = Usage()
    began = time.perf_counter()
    drive = Drive(jobs, config, FakeRunner(config.num_blocks, config.block_size), time.perf_counter, observe=usage.observe)
    for index, served in enumerate(drive.run()):
        job = served.job
        wrong = len(served.tokens) != job.output_tokens
        if index % CHECKED_EVERY == 0:
            params = SamplingParams(temperature=0.0, max_tokens=job.output_tokens)
            wrong = wrong or served.tokens != fake_output(job.prompt, params, 0, num_stages=1)
        if wrong:
            raise RuntimeError(f"request {index} has wrong tokens under {config.reservation}")
    drive.batcher.check_integrity()
    usage.seconds = time.perf_counter() - began
    return usage


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    options.add_workload(parser, requests=2000, prompt_scale=1.0, output_scale=1.0)
    parser.add_argument("--max-model-len", type=options.positive, default=4096)
    parser.add_argument("--pool-sequences", type=options.positive, default=16, help="the pool holds so many of max-model-len")
    parser.add_argument("--slots", type=options.positive, default=256, help="most sequences at a time (default: %(default)s)")
    arguments = parser.parse_args(argv)
    report = Report("waste", command_line(argv))
    blocks = arguments.pool_sequences * -(-arguments.max_model_len // BatchConfig.block_size) + 1
    base = BatchConfig(
        num_blocks=blocks,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.slots,
        max_num_batched_tokens=max(BatchConfig.max_num_batched_tokens, arguments.slots),
        prefix_cache="off",
    )
    try:
        shapes = options.workload(arguments, base.max_sequence_tokens, report.say)
    except ValueError as error:
        parser.error(str(error))
    report.say(
        f"pool of {base.pool_tokens} slots in blocks of {base.block_size}, {base.max_num_batched_tokens} tokens an iteration"
    )
    columns = ["", "waste", "sequences running", "iterations", "preemptions", "output tokens / iteration", "s here"]
    rows: list[list[Cell]] = []
    tokens = sum(shape.output_tokens for shape in shapes)
    for case in CASES:
        jobs = asking(shapes, case, arguments.max_model_len)
        usage = account(jobs, dataclasses.replace(base, reservation=case.reservation))
        numbers = [usage.mean_running, usage.iterations, usage.preemptions, tokens / usage.iterations, usage.seconds]
        report.say(f"{case.name}: waste {usage.waste:.2%}")
        rows.append([case.name, f"{usage.waste:.2%}", *numbers])
        report.record(case.name, {**dataclasses.asdict(usage), "waste": usage.waste, "mean_running": usage.mean_running})
    report.table("KV slots, over all iterations", columns, rows)
    report.save(arguments.out)
    panels = {
        "wasted, % of allocated slots": {str(row[0]): float(str(row[1]).rstrip("%")) for row in rows},
        "sequences running, mean": {str(row[0]): float(row[2] or 0) for row in rows},
    }
    draw_bars(arguments.out / "waste.png", f"KV waste, {len(shapes)} requests, max-model-len {arguments.max_model_len}", panels)


if __name__ == "__main__":
    main()
