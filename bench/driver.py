"""Jobs through a Batcher and a runner, on a clock that moves by what iterations cost and jumps over idle time.

This is cluster/engine.py's loop without its messages (pp = 1: one plan in flight): schedule, execute, update. The runner may be
the model's or the fake one. Requests are handed over at their time of arrival; a Hold in front of a static engine makes batches of
them, as Triton's dynamic batcher does.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.workload import Job
from cluster.batcher import Batcher
from cluster.config import BatchConfig
from cluster.protocol import Request, SamplingParams, StepPlan, StepResult
from kv.manager import KVManager
from workers.fake import FakeStage


class Runner(Protocol):
    """What executes plans."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one iteration."""

    def reset(self) -> None:
        """Forget all sequences."""


class FakeRunner:
    """The fake model as a runner: hashes for activations, no time worth measuring."""

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        self._size = (num_blocks, block_size)
        self.reset()

    def reset(self) -> None:
        """Forget all sequences, and what is in the pool."""
        self._stage = FakeStage(0, 1, *self._size)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one iteration."""
        _, result = self._stage.execute(plan, [])
        assert result is not None, "the only stage is the last one"
        return result


@dataclass(frozen=True)
class Hold:
    """A batch is handed over when the engine is empty and `size` requests wait, or the oldest has waited `wait_s`."""

    size: int
    wait_s: float = 0.0
    together: bool = False
    """Answers return when the whole batch is done, else each when its own last token is drawn."""


@dataclass
class Served:
    """What became of one job. Times are the driver's, in seconds."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    first_s: float | None = None
    """When its first token was drawn."""
    finish_s: float | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to the first token."""
        assert self.first_s is not None, "no token yet"
        return self.first_s - self.job.arrival_s

    @property
    def normalized_latency(self) -> float:
        """Seconds from arrival to the last token, per output token (ORCA, Yu et al. 2022, section 6.2)."""
        assert self.finish_s is not None, "not finished"
        return (self.finish_s - self.job.arrival_s) / self.job.output_tokens


@dataclass(frozen=True)
class Iteration:
    """One round of schedule, execute and update."""

    rows: int
    """Sequences that a token was drawn for, finished ones of a static batch included."""
    useful: int
    """Of these, tokens that a client still wanted."""
    waiting: int
    """Requests that had arrived and were not in the running set."""


@dataclass
class Occupancy:
    """Useful rows per slot and iteration. Iterations that draw no token at all (prefill only) are left out, for all policies."""

    slots: int
    rows: int = 0
    iterations: int = 0

    def add(self, iteration: Iteration) -> None:
        """Count one in."""
        if iteration.rows:
            self.rows += iteration.useful
            self.iterations += 1

    @property
    def share(self) -> float:
        """0 to 1; 0 before the first iteration."""
        return self.rows / (self.slots * self.iterations) if self.iterations else 0.0


class Drive:
    """One run of `jobs` (in order of arrival) under one policy. Iterate over `iterations()`; then look at `served`.

    timer: a clock in seconds, read before and after each iteration. observe: called in each iteration while its plan is in
    flight, outside of what is timed. Greedy, end-of-sequence ignored: a job ends at its number of output tokens, which cancels
    it where the client asked for more, as a stop string does.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        config: BatchConfig,
        runner: Runner,
        timer: Callable[[], float],
        hold: Hold | None = None,
        observe: Callable[[Batcher], None] | None = None,
    ) -> None:
        self.now = 0.0
        self.served = [Served(job) for job in jobs]
        self.batcher = Batcher(config, KVManager(config))
        self._runner = runner
        self._timer = timer
        self._hold = hold
        self._observe = observe
        self._to_come = deque(enumerate(jobs))
        self._held: deque[int] = deque()
        self._unanswered: list[Served] = []

    def run(self) -> list[Served]:
        """To the end."""
        for _ in self.iterations():
            pass
        return self.served

    def iterations(self) -> Iterator[Iteration]:
        """Run until all jobs are done."""
        self._runner.reset()
        while True:
            while self._to_come and self._to_come[0][1].arrival_s <= self.now:
                self._held.append(self._to_come.popleft()[0])
            self._hand_over()
            if self.batcher.num_sequences:
                yield self._iterate()
            elif self._held or self._to_come:
                self.now = self._next_event()
            else:
                return

    def _hand_over(self) -> None:
        count = len(self._held)
        if self._hold is not None:
            due = count >= self._hold.size or (count > 0 and self.now >= self._deadline(self._hold))
            count = min(count, self._hold.size) if due and not self.batcher.num_sequences else 0
        for _ in range(count):
            index = self._held.popleft()
            self.batcher.add(_request(index, self.served[index].job), self.now)

    def _deadline(self, hold: Hold) -> float:
        return self.served[self._held[0]].job.arrival_s + hold.wait_s

    def _next_event(self) -> float:
        times = [self._to_come[0][1].arrival_s] if self._to_come else []
        if self._held and self._hold is not None:
            times.append(self._deadline(self._hold))
        return min(times)

    def _iterate(self) -> Iteration:
        began = self._timer()
        plan = self.batcher.schedule(self.now)
        assert plan is not None, "requests wait, but nothing can run"
        spent = self._timer() - began
        waiting = len(self._held) + len(self.batcher.line)
        if self._observe is not None:
            self._observe(self.batcher)
        began = self._timer()
        deltas = self.batcher.update(self._runner.execute(plan))
        spent += self._timer() - began
        self.now += spent
        for delta in deltas:
            served = self.served[int(delta.request)]
            served.tokens += delta.tokens
            served.first_s = self.now if served.first_s is None and delta.tokens else served.first_s
            if len(served.tokens) == served.job.output_tokens:
                self._unanswered.append(served)
                if delta.finish is None:
                    self.batcher.cancel(delta.request)
        self._answer()
        return Iteration(sum(chunk.sample for chunk in plan.chunks), sum(bool(delta.tokens) for delta in deltas), waiting)

    def _answer(self) -> None:
        if self._hold is not None and self._hold.together and any(s.finish is None for s in self.batcher.running):
            return
        for served in self._unanswered:
            served.finish_s = self.now
        self._unanswered.clear()


def _request(index: int, job: Job) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=job.asked)
    return Request(id=str(index), attempt=0, reply_to="", prompt=job.prompt, emitted=[[]], finished=[False], params=params)
