"""One rank of one epoch from start to end: mailbox, model, announcement, loop. What starts it may be Ray, a process or a test."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.channel import Mailbox
from cluster.config import Config, ConfigError
from cluster.model import open_model
from cluster.protocol import Give, Take, WorkerFailed, WorkerMessage, WorkerReady
from parallel.mesh import Mesh
from parallel.rendezvous import connect
from workers.serve import Intake, serve_plans

if TYPE_CHECKING:
    from workers.mover import Mover
    from workers.runner import ModelRunner

log = logging.getLogger(__name__)


def run_rank(
    config: Config,
    rank: int,
    epoch: int,
    engine: str,
    store: str,
    secret: str,
    host: str,
    adapt: "Callable[[ModelRunner], None]" = lambda runner: None,
) -> str:
    """Load, announce, serve; returns why it ended.

    engine: the address of its mailbox. store: where the ranks meet (see parallel.rendezvous), "" where there is one only.
    secret: of the application's mailboxes. host: this node's own address. adapt: called with what was loaded, for benchmarks.
    """
    seat = Mesh(config.tp, config.pp).seat(rank)
    with Mailbox[WorkerMessage](WorkerMessage, host, secret=secret) as mailbox:
        try:
            from parallel.membership import Membership  # torch takes seconds to import: after the mailbox, inside the time-out
            from workers.runner import load_runner

            files = open_model(config.model, config.revision)
            meeting = connect(store, epoch, config.load_timeout_s) if store else None
            membership = Membership(seat, meeting, host, mailbox.address, config.load_timeout_s)
            runner = load_runner(files, config, progress=seat.rank == 0, membership=membership)
        except (ConfigError, MemoryError, OSError) as error:
            log.error("could not load: %s", error)
            mailbox.send(engine, WorkerFailed(epoch=epoch, rank=rank, reason=str(error)))
            return str(error)
        adapt(runner)
        mover = None
        if config.pulls:
            from workers.mover import Mover

            mover = Mover(runner.pool, host, epoch, rank, lambda moved: mailbox.send(engine, moved))
        followers = [runner.peers.mailboxes[follower] for follower in seat.followers]
        intake = Intake(mailbox, engine, epoch, rank, followers, move=None if mover is None else _moving(runner, mover))
        try:
            ready = WorkerReady(
                epoch=epoch,
                rank=rank,
                address=mailbox.address,
                num_blocks=runner.num_blocks,
                max_model_len=runner.max_model_len,
                layout=runner.layout,
                store=mover.store if mover is not None else "",
                host_blocks=runner.host_blocks,
            )
            mailbox.send(engine, ready)
            executed = mover.executed if mover is not None else lambda step: None
            return serve_plans(runner, intake, mailbox, engine, seat, epoch, executed)
        finally:
            intake.close()


def _moving(runner: "ModelRunner", mover: "Mover") -> Callable[[Give | Take], None]:
    def move(order: Give | Take) -> None:
        if isinstance(order, Take):
            runner.forget(order.blocks)
        mover.put(order)

    return move
