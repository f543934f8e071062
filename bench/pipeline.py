"""A pipeline of real workers, mailboxes and hand-overs of hidden states in which a sleep stands for the layers: does it stay full?

    python -m bench.pipeline [--stages 4] [--fixed-ms 4] [--token-ms 1] [--repetitions 3] [--out DIR]

Each stage is a process of its own with a part of a small random Llama. Only its layers' arithmetic is replaced, by a sleep of
fixed + tokens x token time: two cores then hold a pipeline as long as one likes. Everything else is what serves: the engine's state
machine, the Batcher, plans over encrypted mailboxes, hidden states over gloo, the sampler. Compared are as many plans in flight as
there are stages (what ships), one more (--plans-in-flight), and one plan in flight that takes all sequences (what a pipeline
without ORCA's section 4.2 does), in turn. The bubble is taken from the stages' own account of when they computed, and again from
the sleeps alone, for which all of our own work counts as idle.
"""

import dataclasses
import functools
import multiprocessing
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench import options
from bench.report import Cell, Report, command_line
from bench.timeline import Span, bubble, draw
from cluster.actions import KillWorkers, Send
from cluster.channel import Mailbox
from cluster.config import BatchConfig, Config, batch_settings
from cluster.engine import Engine
from cluster.epoch import EngineConfig
from cluster.protocol import Deltas, EngineMessage, Request, SamplingParams, StageTimes, Submit, WorkerReady
from parallel.rendezvous import StoreServer
from workers.rank import run_rank

if TYPE_CHECKING:
    from workers.runner import ModelRunner

HOST, SECRET, EPOCH = "127.0.0.1", "a secret of this benchmark", 1
HIDDEN, VOCAB = 512, 512
"""A small vocabulary: a real split gives the stage with the lm_head fewer layers, here all stages sleep alike."""
ROUTER, SCHEDULER = "router", "scheduler"
START_S, RUN_S = 180.0, 300.0


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--stages", type=options.positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--fixed-ms", type=options.factor, default=4.0, help="of a stage for any plan (default: %(default)s)")
    parser.add_argument("--token-ms", type=options.factor, default=1.0, help="of a stage for each token (default: %(default)s)")
    parser.add_argument("--output-tokens", type=options.positive, default=96, help="of each request (default: %(default)s)")
    parser.add_argument("--long-prompt", type=options.positive, default=2048, help="the single one's tokens (default: %(default)s)")
    parser.add_argument("--repetitions", type=options.positive, default=3, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    report = Report("pipeline", command_line(argv))
    sleep = Sleep(arguments.fixed_ms / 1000, arguments.token_ms / 1000)
    report.say(f"{arguments.stages} stages, each {arguments.fixed_ms:g} ms + {arguments.token_ms:g} ms a token")
    with tempfile.TemporaryDirectory() as directory, Pipeline(arguments.stages, sleep, Path(directory)) as pipeline:
        decode(pipeline, arguments, report)
        single(pipeline, arguments, report)
    report.save(arguments.out)


def decode(pipeline: "Pipeline", arguments: Namespace, report: Report) -> None:
    """Steady decoding of 64 and of 16 requests."""
    rows: list[list[Cell]] = []
    for requests in (64, 16):
        runs: dict[int, list[Steady]] = {pipeline.num_stages: [], pipeline.num_stages + 1: [], 1: []}
        for _ in range(arguments.repetitions):
            for in_flight, done in runs.items():
                done.append(steady(pipeline, in_flight, requests, arguments.output_tokens))
        base = statistics.median(run.tokens_per_s for run in runs[1])
        for in_flight, done in runs.items():
            middle = [statistics.median(getattr(run, name) for run in done) for name in ("tokens_per_s", "bubble", "not_sleeping")]
            rows.append([f"{requests} requests, {in_flight} in flight", *middle, middle[0] / base])
            last = done[-1]
            path = arguments.out / f"pipeline-{requests}x{in_flight}.png"
            draw(path, f"{requests} requests, {in_flight} plans in flight", last.spans[: 40 * pipeline.num_stages], last.start)
    columns = ["steady decoding", "tokens/s", "bubble", "not in a sleep", "against one in flight"]
    report.table(f"medians of {arguments.repetitions} runs each, in turn", columns, rows)


def single(pipeline: "Pipeline", arguments: Namespace, report: Report) -> None:
    """The prefill of one long prompt, whose chunks follow each other through the stages."""
    rows: list[list[Cell]] = []
    runs: dict[int, list[tuple[float, float, int]]] = {pipeline.num_stages: [], pipeline.num_stages + 1: [], 1: []}
    for _ in range(arguments.repetitions):
        for in_flight, done in runs.items():
            trace = pipeline.run(in_flight, [ask("long", arguments.long_prompt, 1)], until=lambda trace: trace.finished == 1)
            begin, end = min(s.start for s in trace.spans), max(s.end for s in trace.spans)
            done.append((end - begin, bubble(trace.spans, pipeline.num_stages, begin, end), len({s.step for s in trace.spans})))
    base = statistics.median(run[0] for run in runs[1])
    for in_flight, done in runs.items():
        seconds, idle, chunks = (statistics.median(column) for column in zip(*done, strict=True))
        rows.append([f"{in_flight} in flight", seconds, idle, chunks, base / seconds])
    columns = [f"one prompt of {arguments.long_prompt} tokens", "seconds", "bubble", "chunks", "against one in flight"]
    report.table("from the first stage's start to the last one's end", columns, rows)


@dataclass(frozen=True)
class Steady:
    """The part of a run in which all requests decode."""

    tokens_per_s: float
    bubble: float
    not_sleeping: float
    spans: list[Span]
    start: float


def steady(pipeline: "Pipeline", in_flight: int, requests: int, output_tokens: int) -> Steady:
    """`requests` of one length at once, watched from when each has four tokens until one lacks but four."""
    asked = [ask(f"r{number}", 16, output_tokens) for number in range(requests)]
    trace = pipeline.run(in_flight, asked, until=lambda trace: trace.finished == requests)
    start, end = trace.at_least[4], trace.first_at[output_tokens - 4]
    tokens = sum(1 for at in trace.tokens_at if start < at <= end)
    spans = [span for span in trace.spans if span.end > start and span.start < end]
    slept = [dataclasses.replace(span, end=span.start + pipeline.sleep.seconds(span.tokens)) for span in spans]
    stages = pipeline.num_stages
    return Steady(tokens / (end - start), bubble(spans, stages, start, end), bubble(slept, stages, start, end), spans, start)


def ask(id: str, prompt: int, max_tokens: int) -> Request:
    """A greedy request of so many tokens."""
    return Request(
        id=id,
        attempt=0,
        reply_to=ROUTER,
        prompt=[(7 * i + len(id)) % VOCAB for i in range(prompt)],
        emitted=[[]],
        finished=[False],
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
    )


# --- workers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sleep:
    """What the layers of a stage take, in seconds."""

    fixed_s: float
    token_s: float

    def seconds(self, num_tokens: int) -> float:
        """For a plan."""
        return self.fixed_s + self.token_s * num_tokens

    def adapt(self, runner: "ModelRunner") -> None:
        """Replace the layers by sleeping. What came from the stage before goes on to the next one."""
        import torch

        from workers.decoder import Decoder, TokenBatch

        decoder = runner.decoder
        time_of = self.seconds

        @dataclass(frozen=True)
        class Sleeping(Decoder):
            def forward(self, batch: TokenBatch, pool: object, hidden: torch.Tensor | None) -> torch.Tensor:
                time.sleep(time_of(len(batch.ids)))
                if hidden is None:
                    assert self.embedding is not None
                    hidden = self.embedding(batch.ids)
                return hidden

        values = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(Decoder)}
        runner.model.decoder = Sleeping(**values)


def write_model(path: Path, layers: int) -> None:
    """A small random Llama: its hidden states have a size worth handing on, its layers are never computed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": layers, "vocab_size": VOCAB}
    LlamaForCausalLM(
        LlamaConfig(num_attention_heads=8, num_key_value_heads=1, max_position_embeddings=8192, **shape)
    ).save_pretrained(path)


@dataclass
class Trace:
    """What became of one run. Unix times in seconds."""

    counts: dict[str, int] = field(default_factory=dict)
    """Tokens by request."""
    tokens_at: list[float] = field(default_factory=list)
    first_at: dict[int, float] = field(default_factory=dict)
    """When a first request had so many tokens."""
    at_least: dict[int, float] = field(default_factory=dict)
    """When every request had so many."""
    finished: int = 0
    spans: list[Span] = field(default_factory=list)

    def take(self, message: Deltas, now: float) -> None:
        """Count tokens."""
        for delta in message.deltas:
            self.counts[delta.request] = count = self.counts[delta.request] + len(delta.tokens)
            self.tokens_at += [now] * len(delta.tokens)
            self.first_at.setdefault(count, now)
            self.finished += delta.finish is not None
        self.at_least.setdefault(min(self.counts.values()), now)


class Pipeline:
    """Worker processes of one engine, and engines run on them one after the other."""

    def __init__(self, num_stages: int, sleep: Sleep, directory: Path) -> None:
        self.num_stages = num_stages
        self.sleep = sleep
        write_model(directory, num_stages)
        self._config = Config(
            str(directory),
            dtype="float32",
            device="cpu",
            pp=num_stages,
            kv_memory=64 << 20,
            max_num_seqs=64,
            threads=1,
            prefix_cache="off",
        )
        self._store = StoreServer(HOST)
        self._mailbox = Mailbox[EngineMessage](EngineMessage, HOST, secret=SECRET)
        start = functools.partial(
            run_rank, self._config, epoch=EPOCH, engine=self._mailbox.address, store=self._store.address, secret=SECRET, host=HOST
        )
        context = multiprocessing.get_context("spawn")
        self._workers = [
            context.Process(target=start, kwargs={"rank": rank, "adapt": sleep.adapt}, daemon=True) for rank in range(num_stages)
        ]
        for worker in self._workers:
            worker.start()
        self._ready = self._wait_until_ready()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()
        self._mailbox.close()

    def run(self, in_flight: int, requests: Sequence[Request], until: Callable[[Trace], bool]) -> Trace:
        """A new engine that keeps `in_flight` plans in the pipeline, until all is as `until` wants it and all times are told."""
        blocks, longest = min(r.num_blocks for r in self._ready), self._ready[0].max_model_len
        batch: BatchConfig = dataclasses.replace(batch_settings(self._config, blocks, longest), plans_in_flight=in_flight)
        settings = EngineConfig("bench", self._mailbox.address, SCHEDULER, batch, num_ranks=self.num_stages)
        engine = Engine(settings, EPOCH, time.monotonic())
        trace = Trace(counts={request.id: 0 for request in requests})
        first: list[EngineMessage] = [*self._ready, *(Submit(EPOCH, request) for request in requests)]
        for message in first:
            engine.receive(message, time.monotonic())
        end = time.monotonic() + RUN_S
        told = dict.fromkeys(range(self.num_stages), -1)
        """By stage: the last step whose time is known."""
        while not (until(trace) and set(told.values()) == {engine.metrics.steps - 1}):
            if time.monotonic() > end:
                raise RuntimeError(f"not done after {RUN_S:.0f} s")
            for action in engine.take_actions():
                if isinstance(action, KillWorkers):
                    raise RuntimeError(action.reason)
                if isinstance(action, Send):
                    if isinstance(action.message, Deltas):
                        trace.take(action.message, time.time())
                    elif action.address not in (ROUTER, SCHEDULER):
                        self._mailbox.send(action.address, action.message)
            received = self._mailbox.receive(0.2)
            if isinstance(received, StageTimes):
                trace.spans += [Span(received.stage, t.step, t.start, t.end, t.num_tokens) for t in received.times]
                told[received.stage] = received.times[-1].step
            if received is not None:
                engine.receive(received, time.monotonic())
            engine.tick(time.monotonic())
        trace.spans.sort(key=lambda span: (span.step, span.stage))
        return trace

    def _wait_until_ready(self) -> list[WorkerReady]:
        ready: dict[int, WorkerReady] = {}
        end = time.monotonic() + START_S
        while len(ready) < self.num_stages:
            message = self._mailbox.receive(0.5)
            if isinstance(message, WorkerReady):
                ready[message.rank] = message
            elif message is not None or time.monotonic() > end or not all(worker.is_alive() for worker in self._workers):
                raise RuntimeError(f"the workers did not start: {message}")
        return [ready[rank] for rank in range(self.num_stages)]


if __name__ == "__main__":
    main()
