"""What keys and values in fewer bits cost and save: accuracy, time of decoding, sequences that fit.

    python -m bench.kv_dtype [MODEL] [--dtype bfloat16] [--text-tokens 8192] [--sequences 16] [--context 512] [--threads 2]

Accuracy: held-out text of the demo model's corpus, in pieces of --context tokens of which each is a sequence of its own; of every
position the next token's distribution with each kv_dtype against the one where keys and values are in float32: the mean
Kullback-Leibler divergence, and how often the likeliest token is the same. Meaningless for a model of random weights.

Time: a step of --sequences decodes over --context tokens each, without the logits; and the seconds of it spent in attention where
the native kernels compute. All kinds take turns; medians, and the median of each turn's ratio to bfloat16.

Room: sequences of --context tokens that --kv-memory holds.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench import options
from bench.report import Cell, Report, command_line
from cluster.config import Config, from_mapping
from cluster.model import DEMO_MODEL, ModelFiles, open_model
from cluster.protocol import NewSequence, SamplingParams
from compress.corpus import collect, standard_library
from kv.formats import DTYPES
from router.tokenizer import load
from workers.draws import DrawSetup
from workers.native.kernels import NativeLayers
from workers.runner import ModelRunner, load_runner
from workers.sequences import SequenceState, Span

KINDS = tuple(DTYPES)
USUAL = "bfloat16"


@dataclass(frozen=True)
class Side:
    """A runner whose pool holds the sequences of the measurement of time."""

    runner: ModelRunner
    decodes: list[Span]

    def step(self) -> tuple[float, float]:
        """Milliseconds of a step, and of it in attention."""
        before, began = self._attention(), time.perf_counter()
        with torch.inference_mode(), self.runner.decoder.kernels.awake():
            self.runner.forward(self.decodes)
        return 1e3 * (time.perf_counter() - began), 1e3 * (self._attention() - before)

    def _attention(self) -> float:
        stack = self.runner.decoder.stack
        return stack.spent()["attention"] if isinstance(stack, NativeLayers) else 0.0


def sequence(ids: Sequence[int], number: int, block_size: int) -> SequenceState:
    """One of these tokens, in blocks of its own."""
    count = -(-len(ids) // block_size)
    blocks = np.arange(1 + number * count, 1 + (number + 1) * count, dtype=np.int32)
    new = NewSequence(choice=0, prompt=[0], emitted=[], params=SamplingParams(seed=number))
    return SequenceState(number, 0, DrawSetup.of(new), len(ids), np.array(ids, dtype=np.int32), len(ids), blocks, count)


@torch.inference_mode()
def distributions(runner: ModelRunner, pieces: Sequence[Sequence[int]]) -> Tensor:
    """[pieces * tokens, vocab] fp32 log-probabilities of what comes next."""
    size = runner.pool.block_size
    rows = [
        runner.decoder.logits(runner.forward([Span(sequence(ids, 0, size), 0, len(ids), True)])).log_softmax(-1) for ids in pieces
    ]
    return torch.cat(rows)


def compared(own: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Mean KL(wanted || own) in nats, and the share of rows whose likeliest token is the same."""
    divergence = (wanted.exp() * (wanted - own)).sum(-1).clamp(min=0)
    return float(divergence.double().mean()), float((own.argmax(-1) == wanted.argmax(-1)).double().mean())


def held_out(files: ModelFiles, count: int, length: int) -> list[list[int]]:
    """Pieces of `length` tokens, `count` tokens together, evenly spread."""
    text = "".join(document.text for document in collect(standard_library()).held_out)
    ids = load(files.path).encode_now(text, add_special_tokens=False)
    pieces = max(1, count // length)
    return [ids[first : first + length] for first in (i * (len(ids) - length) // pieces for i in range(pieces))]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("model", nargs="?", default=str(DEMO_MODEL))
    parser.add_argument("--dtype", default="bfloat16", help="of weights (default: %(default)s)")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--text-tokens", type=options.number, default=8192, help="0: no accuracy (default: %(default)s)")
    parser.add_argument("--sequences", type=options.positive, default=16)
    parser.add_argument("--context", type=options.positive, default=512)
    parser.add_argument("--repetitions", type=options.positive, default=41)
    parser.add_argument("--kv-memory", default="64MiB")
    parser.add_argument("--threads", type=options.positive, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    files, length = open_model(arguments.model), arguments.context
    most = 1 << 20  # sequences: the memory is what bounds them
    settings = {name: getattr(arguments, name) for name in ("model", "dtype", "kernels", "threads", "kv_memory")}
    settings |= {"device": "cpu", "max_num_seqs": most, "max_num_batched_tokens": most}
    configs: dict[str, Config] = {kind: from_mapping(settings | {"kv_dtype": kind}) for kind in KINDS}
    size = configs[USUAL].block_size
    blocks = 1 + arguments.sequences * -(-(length + 1) // size)

    report = Report("kv_dtype", command_line(argv))
    lost: dict[str, tuple[float, float] | tuple[None, None]] = dict.fromkeys(KINDS, (None, None))
    sides: dict[str, Side] = {}
    room: dict[str, int] = {}
    if arguments.text_tokens:
        pieces = held_out(files, arguments.text_tokens, length)
        wanted = distributions(load_runner(files, configs["float32"], num_blocks=blocks), pieces)
    for kind, config in configs.items():
        room[kind] = (load_runner(files, config).num_blocks - 1) // -(-length // size)
        runner = load_runner(files, config, num_blocks=blocks)
        if arguments.text_tokens:
            lost[kind] = compared(distributions(runner, pieces), wanted)
        sides[kind] = Side(runner, decodes(runner, arguments.sequences, length))

    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(arguments.repetitions + 1):
        for place in range(len(KINDS)):
            kind = KINDS[(number + place) % len(KINDS)]
            taken = sides[kind].step()
            if number:
                times[kind].append(taken)
    rows: list[list[Cell]] = []
    for kind in KINDS:
        step, attention = (statistics.median(one[i] for one in times[kind]) for i in (0, 1))
        ratios = [one[0] / usual[0] for one, usual in zip(times[kind], times[USUAL], strict=True)]
        rows.append([kind, *lost[kind], step, statistics.median(ratios), attention, room[kind], room[kind] / room[USUAL]])
    columns = ["kv_dtype", "KL", "same top 1", "step ms", "times bf16", "attention ms", "sequences", "times bf16's"]
    report.table(
        f"{arguments.model}, {arguments.dtype}: {arguments.sequences} decodes over {length} tokens; {arguments.kv_memory} of KV",
        columns,
        rows,
    )
    report.save(arguments.out)


def decodes(runner: ModelRunner, count: int, length: int) -> list[Span]:
    """So many sequences that have `length` tokens in the pool and run one more."""
    spans = []
    with torch.inference_mode():
        for number in range(count):
            ids = torch.randint(3, runner.decoder.shape.vocab_size, (length + 1,)).tolist()
            state = sequence(ids, number, runner.pool.block_size)
            runner.forward([Span(state, 0, length, False)])
            spans.append(Span(state, length, length + 1, True))
    return spans


if __name__ == "__main__":
    main()
