"""What a mailbox's secret costs: one plan at a time between two processes, in the clear and encrypted, in turn.

    python -m bench.channel [--bytes 2048] [--messages 500] [--rounds 20] [--out DIR]

The other process answers each plan at once. Both read the same monotonic clock, so the way there is known apart from the way back.
Latencies include packing, unpacking and waking the other process; CPU time is that of both, their ZeroMQ threads included.
"""

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from statistics import median, quantiles

import msgspec

from bench import options
from bench.report import Cell, Report, command_line, draw_bars
from cluster.channel import Mailbox
from cluster.protocol import Chunk, StepPlan, StepResult

HOST = "127.0.0.1"
LIMIT_S = 60.0
SECRETS = {"plain": "", "curve": "a secret of this benchmark"}


def plan(size: int) -> StepPlan:
    """A plan of decodes of about `size` bytes on the wire, as an engine sends one every iteration."""
    one = len(msgspec.msgpack.encode(_decode(0)))
    chunks = [_decode(number) for number in range(max(1, size // one))]
    return StepPlan(epoch=1_750_000_000_000, step=1000, admitted=[], chunks=chunks, copies=[], finished=[])


def _decode(number: int) -> Chunk:
    return Chunk(seq=100_000 + number, start=1000, num_tokens=1, new_blocks=[], tokens=[], sample=True)


def answer(secret: str, to: str, ready: "Connection[str, None]") -> None:
    """The other process: says when each plan came. Ends with a plan that is empty, or when none came for LIMIT_S."""
    with Mailbox[StepPlan](StepPlan, HOST, secret=secret) as mailbox:
        ready.send(mailbox.address)
        while (got := mailbox.receive(LIMIT_S)) is not None and got.chunks:
            came = time.monotonic()
            cpu_s = time.process_time()
            mailbox.send(to, StepResult(epoch=got.epoch, step=got.step, results=[], compute_s=came, error=str(cpu_s)))


@dataclass
class Side:
    """A mailbox of this process and one of another process, and what was measured between them."""

    secret: str
    one_way_us: list[float] = field(default_factory=list)
    round_trip_us: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    """Of both processes, a round trip; one mean for each round."""

    def __post_init__(self) -> None:
        self._mailbox = Mailbox[StepResult](StepResult, HOST, secret=self.secret)
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        self._process = context.Process(target=answer, args=(self.secret, self._mailbox.address, theirs), daemon=True)
        self._process.start()
        if not mine.poll(LIMIT_S):
            raise RuntimeError("the other process did not start")
        self._peer: str = mine.recv()

    def run(self, sent: StepPlan, messages: int) -> None:
        """One round; its first round trip, after a pause, is not counted."""
        theirs, ours = self._trip(sent, counted=False), time.process_time()
        for _ in range(messages - 1):
            self._trip(sent)
        there = self._trip(sent)
        self.cpu_us.append((there - theirs + time.process_time() - ours) * 1e6 / messages)

    def _trip(self, sent: StepPlan, counted: bool = True) -> float:
        began = time.monotonic()
        self._mailbox.send(self._peer, sent)
        back = self._mailbox.receive(LIMIT_S)
        ended = time.monotonic()
        if back is None:
            raise RuntimeError("no answer")
        if counted:
            self.one_way_us.append((back.compute_s - began) * 1e6)
            self.round_trip_us.append((ended - began) * 1e6)
        return float(back.error or 0)

    def close(self) -> None:
        """End the other process."""
        self._mailbox.send(self._peer, StepPlan(epoch=0, step=0, admitted=[], chunks=[], copies=[], finished=[]))
        self._process.join(LIMIT_S)
        self._mailbox.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("--bytes", type=options.positive, default=2048, help="size of a plan (default: %(default)s)")
    parser.add_argument("--messages", type=options.positive, default=500, help="round trips of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=options.positive, default=20, help="of each side (default: %(default)s)")
    arguments = parser.parse_args(argv)
    report = Report("channel", command_line(argv))
    sent = plan(arguments.bytes)
    report.say(f"plans of {len(msgspec.msgpack.encode(sent))} bytes, {len(sent.chunks)} decodes")
    sides = {kind: Side(secret) for kind, secret in SECRETS.items()}
    for _ in range(arguments.rounds):
        for side in sides.values():
            side.run(sent, arguments.messages)
    columns = ["", "one way, us", "round trip, us", "p10", "p99", "CPU us a round trip, both"]
    rows: list[list[Cell]] = []
    for kind, side in sides.items():
        parts = quantiles([*side.round_trip_us, side.round_trip_us[-1]], n=100)
        rows.append([kind, median(side.one_way_us), median(side.round_trip_us), parts[9], parts[98], median(side.cpu_us)])
        side.close()
    report.table("medians", columns, rows)
    report.save(arguments.out)
    panels = {column: {str(row[0]): float(row[place] or 0) for row in rows} for place, column in ((1, columns[1]), (5, columns[5]))}
    draw_bars(arguments.out / "channel.png", f"A plan of {arguments.bytes} bytes between two processes", panels)


if __name__ == "__main__":
    main()
