"""Where an iteration's time goes: what `rayline bench --profile` prints.

    rayline bench MODEL [--requests 64] [--prompt-tokens 144 --output-tokens 72] [--profile] [any setting of `rayline serve`]

Requests are generated greedily by the engine in this process, all at once, end-of-sequence ignored; without --prompt-tokens and
--output-tokens they are prompts of 32 to 256 tokens and outputs of 16 to 128. With --profile each part of an iteration is timed
from outside, by wrapping the functions that do it:

    schedule     the batcher: making a plan, and taking in its result
    transport    what the cluster adds: plan and result, packed, sent and received by two mailboxes on this machine (encrypted)
    metadata     what the plan's differences come to: block tables, positions, slots, what attention must know
    linears, attention, other operators   in the layers, by the native kernels' own clocks; one line, layers, with torch's
    lm_head      the last norm, and logits of the rows that are drawn from
    sampling     from logits to tokens
    detokenize   from tokens to text, as the router does it
    the rest     what no line above has
"""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import Cell, Report
from bench.workload import Job, Shape, jobs, uniform_shapes
from cluster.channel import Mailbox
from cluster.offline import LLM
from cluster.protocol import SamplingParams, StepPlan, StepResult
from router.choice import Choice
from workers.native.kernels import NativeLayers

OUTSIDE_THE_MODEL = ("schedule", "transport", "metadata", "sampling", "detokenize", "the rest")
"""What is not the model: it should be little."""
_ROUND_TRIPS = 200


@dataclass
class Profile:
    """Seconds by part, and the plans and results that they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)
    iterations: list[tuple[StepPlan, StepResult]] = field(default_factory=list)

    def wrap(self, owner: Any, name: str, part: str) -> Callable[[], None]:
        """Time owner.name from now on as `part`. Returns what undoes it."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

        own = vars(owner).get(name) if not isinstance(owner, type) else function
        object.__setattr__(owner, name, timed) if not isinstance(owner, type) else setattr(owner, name, timed)

        def undo() -> None:
            if isinstance(owner, type):
                setattr(owner, name, function)
            elif own is None:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, own)

        return undo

    def take(self, part: str, *others: str) -> float:
        """Seconds of `part` without those of `others`, which are inside it."""
        return self.seconds.get(part, 0.0) - sum(self.seconds.get(other, 0.0) for other in others)


def run(llm: LLM, asked: Sequence[Job], report: Report, *, profile: bool, repetitions: int) -> None:
    """Generate all of `asked` so often, and tell how fast it was; with `profile`, where the time went in the last run."""
    params = [SamplingParams(max_tokens=job.output_tokens, temperature=0.0) for job in asked]
    prompts = [job.prompt for job in asked]
    tokens = sum(job.output_tokens for job in asked)
    llm.generate(prompts[:1], SamplingParams(max_tokens=4, temperature=0.0), ignore_eos=True)  # warm
    walls = []
    found = Profile()
    for last in [False] * (repetitions - 1) + [True]:
        undo = _instrument(llm, found) if profile and last else []
        began = time.perf_counter()
        llm.generate(prompts, params, ignore_eos=True)
        walls.append(time.perf_counter() - began)
        for restore in undo:
            restore()
    wall = statistics.median(walls)
    report.say(f"{tokens} output tokens in {wall:.2f} s: {tokens / wall:.1f} tok/s, {1000 * wall / tokens:.2f} ms each")
    report.record("wall_s", walls)
    if profile:
        _tell(found, walls[-1], report)


def workload(requests: int, prompt_tokens: int | None, output_tokens: int | None, vocab_size: int) -> list[Job]:
    """What is asked."""
    if prompt_tokens is None and output_tokens is None:
        return jobs(uniform_shapes(requests), vocab_size)
    return jobs([Shape(prompt_tokens or 128, output_tokens or 128)] * requests, vocab_size)


def _instrument(llm: LLM, found: Profile) -> list[Callable[[], None]]:
    """Wrap what an iteration consists of. Returns what undoes it."""
    runner = llm.runner
    execute = runner.execute

    def kept(plan: StepPlan) -> StepResult:
        result = execute(plan)
        found.iterations.append((plan, result))
        return result

    stack = runner.decoder.stack
    before = stack.spent() if isinstance(stack, NativeLayers) else {}

    def count() -> None:
        if isinstance(stack, NativeLayers):
            found.seconds |= {part: seconds - before[part] for part, seconds in stack.spent().items()}

    object.__setattr__(runner, "execute", kept)
    wrapped = [
        (llm.batcher, "schedule", "schedule"),
        (llm.batcher, "update", "update"),
        (runner, "execute", "execute"),
        (stack, "run", "layers"),
        (runner.decoder, "forward", "decoder"),
        (runner.decoder, "logits", "lm_head"),
        (runner, "_draw", "draw"),
        (Choice, "feed", "detokenize"),
        (Choice, "take", "detokenize"),
    ]
    undo = [found.wrap(owner, name, part) for owner, name, part in wrapped]
    return [count, *reversed(undo), lambda: object.__delattr__(runner, "execute")]


def _tell(found: Profile, wall: float, report: Report) -> None:
    count = len(found.iterations)
    transport = transported(found.iterations[:: max(1, count // _ROUND_TRIPS)]) * count
    native = "linears" in found.seconds
    inside = ["linears", "attention", "rows"] if native else []
    parts = {
        "schedule": found.take("schedule") + found.take("update"),
        "transport": transport,
        "metadata": found.take("execute", "decoder", "draw")
        + found.take("decoder", "layers")
        + found.take("layers", *inside) * native,
        **(
            {"linears": found.take("linears"), "attention": found.take("attention"), "other operators": found.take("rows")}
            if native
            else {}
        ),
        **({} if native else {"layers": found.take("layers")}),
        "lm_head": found.take("lm_head"),
        "sampling": found.take("draw", "lm_head"),
        "detokenize": found.take("detokenize"),
    }
    parts["the rest"] = max(0.0, wall - sum(seconds for part, seconds in parts.items() if part != "transport"))
    total = wall + transport
    rows: list[list[Cell]] = [[part, 1000 * seconds / count, 100 * seconds / total] for part, seconds in parts.items()]
    tokens = sum(chunk.num_tokens for plan, _ in found.iterations for chunk in plan.chunks)
    title = f"{count} iterations of {tokens / count:.1f} tokens, {1000 * total / count:.2f} ms each"
    report.table(title, ["", "ms per iteration", "%"], rows)
    outside = sum(parts[part] for part in OUTSIDE_THE_MODEL)
    report.say(f"outside the model: {outside / total:.1%}")
    report.record("profile", {"seconds": parts, "outside_share": outside / total, "iterations": count})


def transported(iterations: Sequence[tuple[StepPlan, StepResult]]) -> float:
    """Seconds for a plan to a worker and its result back, through two mailboxes of this machine: median."""
    secret = "profile"
    ready, times = threading.Event(), []
    with Mailbox[StepResult](StepResult, "127.0.0.1", secret=secret) as engine:
        address: list[str] = []

        def worker() -> None:
            with Mailbox[StepPlan](StepPlan, "127.0.0.1", secret=secret) as mailbox:
                address.append(mailbox.address)
                ready.set()
                for _, result in iterations:
                    if mailbox.receive(5.0) is None:
                        return
                    mailbox.send(engine.address, result)

        thread = threading.Thread(target=worker)
        thread.start()
        ready.wait()
        for plan, _ in iterations:
            began = time.perf_counter()
            engine.send(address[0], plan)
            if engine.receive(5.0) is None:
                break
            times.append(time.perf_counter() - began)
        thread.join()
    return statistics.median(times) if times else 0.0
