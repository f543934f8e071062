"""What the Batcher itself takes in an iteration of many decodes. No model, no processes, no network.

    python -m bench.scheduling [--sequences 64,256] [--iterations 300] [--out DIR]

So many sequences decode together; each iteration is scheduled, answered with a token for each, and taken in. CPU time of the one
thread, in microseconds.
"""

from collections.abc import Sequence

from bench import options
from bench.report import Report, command_line
from bench.times import Times
from cluster.batcher import Batcher
from cluster.config import BatchConfig
from cluster.protocol import ChunkResult, Request, SamplingParams, StepResult
from kv.manager import KVManager

PROMPT_TOKENS = 100


def measure(sequences: int, iterations: int) -> tuple[Times, Times]:
    """Of schedule() and of update(), one sample an iteration, all of them decoding. Raises RuntimeError where one does not run."""
    longest = PROMPT_TOKENS + iterations + 2
    blocks = 1 + sequences * (longest // 16 + 2)
    config = BatchConfig(
        num_blocks=blocks, max_model_len=longest, max_num_seqs=sequences, max_num_batched_tokens=sequences * PROMPT_TOKENS
    )
    batcher = Batcher(config, KVManager(config))
    for i in range(sequences):
        prompt = [i * PROMPT_TOKENS + k for k in range(PROMPT_TOKENS)]
        params = SamplingParams(seed=i, max_tokens=iterations + 1)
        request = Request(id=str(i), attempt=0, reply_to="", prompt=prompt, emitted=[[]], finished=[False], params=params)
        batcher.add(request, float(i))
    scheduling, taking_in = Times(), Times()
    for step in range(iterations + 1):
        first = step == 0
        with Times() if first else scheduling:
            plan = batcher.schedule(0.0)
        if plan is None or len(plan.chunks) != sequences:
            raise RuntimeError(f"not all of {sequences} sequences run")
        result = StepResult(epoch=0, step=plan.step, results=[ChunkResult(chunk.seq, [5], []) for chunk in plan.chunks])
        with Times() if first else taking_in:
            batcher.update(result)
    return scheduling, taking_in


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = options.parser(__doc__)
    parser.add_argument("--sequences", type=options.numbers, default=[64, 256], metavar="N,N")
    parser.add_argument("--iterations", type=options.positive, default=300)
    arguments = parser.parse_args(argv)
    report = Report("scheduling", command_line(argv))
    rows = []
    for sequences in arguments.sequences:
        scheduling, taking_in = measure(sequences, arguments.iterations)
        rows.append([sequences, scheduling.median, scheduling.p99, taking_in.median, taking_in.p99])
    report.table("an iteration in which all sequences decode", ["sequences", "schedule, us", "p99", "update, us", "p99"], rows)
    report.save(arguments.out)


if __name__ == "__main__":
    main()
