"""What the control plane costs: a plan from the engine to the last of several idle stages, by mailboxes and by Ray actor calls.

    python -m bench.hops [--stages 4] [--bytes 2048] [--messages 200] [--rounds 10] [--out DIR]

Ours is what serves: each stage's intake thread passes the plan on before anything else is done with it, over encrypted mailboxes.
The other side is the same chain of Ray actors, each of which calls the next one and waits for nobody. Both carry the same bytes,
one plan at a time, in turn; all processes are on this machine and read one monotonic clock.
"""

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

import msgspec

from bench import options
from bench.channel import HOST, LIMIT_S, plan
from bench.report import Cell, Report, command_line, draw_bars
from cluster.channel import Mailbox
from cluster.protocol import StepPlan, StepResult, WorkerMessage
from cluster.structs import replace
from workers.serve import Intake

SECRET = "a secret of this benchmark"


def stage(engine: str, epoch: int, followers: list[str], address: "Connection[str, None]") -> None:
    """A stage that has nothing to compute; the last one tells the engine when each plan came. Ends when none came for LIMIT_S."""
    with Mailbox[WorkerMessage](WorkerMessage, HOST, secret=SECRET) as mailbox:
        address.send(mailbox.address)
        intake = Intake(mailbox, engine, epoch, 0, followers, silence_s=LIMIT_S)
        while (got := intake.plans.get()) is not None:
            came = time.monotonic()
            if not followers:
                mailbox.send(engine, StepResult(epoch=epoch, step=got.step, results=[], compute_s=came))
        intake.close()


class Mailboxes:
    """A chain of stages as processes of their own."""

    def __init__(self, num_stages: int, sent: StepPlan) -> None:
        self._sent = sent
        self._mailbox = Mailbox[StepResult](StepResult, HOST, secret=SECRET)
        context = multiprocessing.get_context("spawn")
        self._processes = []
        following: list[str] = []
        for _ in range(num_stages):  # from the last to the first, for each must know the next
            mine, theirs = context.Pipe(duplex=False)
            arguments = (self._mailbox.address, sent.epoch, following, theirs)
            self._processes.append(context.Process(target=stage, args=arguments, daemon=True))
            self._processes[-1].start()
            if not mine.poll(LIMIT_S):
                raise RuntimeError("a stage did not start")
            following = [mine.recv()]
        self._first = following[0]

    def hop(self) -> float:
        """Seconds from sending a plan to its receipt by the last stage."""
        began = time.monotonic()
        self._mailbox.send(self._first, self._sent)
        back = self._mailbox.receive(LIMIT_S)
        if back is None:
            raise RuntimeError("the plan did not arrive")
        return back.compute_s - began

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join()
        self._mailbox.close()


class Link:
    """A Ray actor of the other chain."""

    def __init__(self, following: Any) -> None:
        self._following = following
        self._arrivals: dict[int, float] = {}

    def pass_on(self, number: int, frame: bytes) -> None:
        """On to the next, or here is the end."""
        if self._following is None:
            self._arrivals[number] = time.monotonic()
        else:
            self._following.pass_on.remote(number, frame)

    def arrival(self, number: int) -> float | None:
        """When it came, if it has."""
        return self._arrivals.pop(number, None)


class ActorCalls:
    """The same chain as Ray actors, on a Ray of its own."""

    def __init__(self, num_stages: int, sent: StepPlan) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        import ray

        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
        self._ray = ray
        self._frame = msgspec.msgpack.encode(sent)
        self._number = 0
        actor = ray.remote(num_cpus=0)(Link)
        chain: list[Any] = [None]
        for _ in range(num_stages):
            chain.append(actor.remote(chain[-1]))
        self._last, self._first = chain[1], chain[-1]
        ray.get([link.arrival.remote(-1) for link in chain[1:]], timeout=LIMIT_S)

    def hop(self) -> float:
        """Seconds from the first call to the last actor's receipt."""
        self._number += 1
        began = time.monotonic()
        self._first.pass_on.remote(self._number, self._frame)
        while (came := self._ask()) is None:
            if time.monotonic() > began + LIMIT_S:
                raise RuntimeError("the plan did not arrive")
        return float(came) - began

    def _ask(self) -> float | None:
        time.sleep(0.02)  # the question must not run beside what it asks for
        came: float | None = self._ray.get(self._last.arrival.remote(self._number), timeout=LIMIT_S)
        return came

    def close(self) -> None:
        """End that Ray."""
        self._ray.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--stages", type=options.positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--bytes", type=options.positive, default=2048, help="size of a plan (default: %(default)s)")
    parser.add_argument("--messages", type=options.positive, default=200, help="plans of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=options.positive, default=10, help="of each side (default: %(default)s)")
    parser.add_argument("--without-ray", action="store_true", help="measure our side only")
    arguments = parser.parse_args(argv)
    report = Report("hops", command_line(argv))
    sent = replace(plan(arguments.bytes), step=0)  # a step that may come at any time
    sides: dict[str, Mailboxes | ActorCalls] = {"mailboxes": Mailboxes(arguments.stages, sent)}
    if not arguments.without_ray:
        sides["Ray actor calls"] = ActorCalls(arguments.stages, sent)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                side.hop()  # after the pause
                taken[name] += [side.hop() * 1e6 for _ in range(arguments.messages)]
    finally:
        for side in sides.values():
            side.close()
    rows: list[list[Cell]] = []
    ours = median(taken["mailboxes"])
    for name, times in taken.items():
        parts = quantiles(times, n=100)
        rows.append([name, median(times), parts[9], parts[98], median(times) / ours])
    columns = ["", "median, us", "p10", "p99", "against mailboxes"]
    report.table(f"a plan to the last of {arguments.stages} idle stages", columns, rows)
    report.save(arguments.out)
    panels = {"median, us": {str(row[0]): float(row[1] or 0) for row in rows}}
    draw_bars(arguments.out / "hops.png", f"A plan of {arguments.bytes} bytes to the last of {arguments.stages} stages", panels)


if __name__ == "__main__":
    main()
