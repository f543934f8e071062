"""The Ray actors of the control plane: thin shells that carry messages to the state machines and their actions out.

Each runs one thread that owns the state machine and the mailbox. Actors are named under the application and detached: they outlive
the process that made them, and end with the application's lease (see GlobalScheduler.lease_over), or at once by end_actors().
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ray
import zmq

from cluster.actions import KillWorkers, Send, StartWorkers
from cluster.channel import Mailbox
from cluster.config import Config, batch_settings
from cluster.engine import Engine
from cluster.epoch import EngineConfig
from cluster.finder import SCHEDULER, Finder, find_actor, named_actors
from cluster.fleet import Died, Fleet, Waiting
from cluster.protocol import EngineMessage, SchedulerMessage, StageTimes
from cluster.recorder import Recorder
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from kv.names import BlockNames

TICK_S = 0.2
_ORPHANED_S = 120.0
"""An engine whose application has had no scheduler for so long ends."""

log = logging.getLogger(__name__)


class SchedulerActor:
    """The GlobalScheduler behind a mailbox."""

    def __init__(self, config: Config, port: int, lease: str, secret: str) -> None:
        """`port`: the same over restarts, where it can be had. `lease`: Ray's namespace of the application. `secret`: that of all
        its mailboxes."""
        logging.basicConfig(level=logging.INFO, format="[scheduler] %(levelname)s %(message)s")
        host = ray.util.get_node_ip_address()
        try:
            self._mailbox = Mailbox[SchedulerMessage](SchedulerMessage, host, port, secret)
        except zmq.ZMQError as error:  # restarted on another node, say: engines and routers look the new address up
            log.warning("port %d: %s; taking another one", port, error)
            self._mailbox = Mailbox[SchedulerMessage](SchedulerMessage, host, secret=secret)
        settings = SchedulerConfig(
            max_queue=config.max_queue, placement=config.placement, block_size=config.block_size, kv_pull=config.pulls
        )
        self._scheduler = GlobalScheduler(settings, time.monotonic())
        self._lease, self._secret = lease, secret
        self._stop, self._coming = threading.Event(), threading.Event()
        for name in named_actors(lease):
            if name != SCHEDULER:
                self._scheduler.expect(name, time.monotonic())
        _start(self._run, SCHEDULER)

    def address(self) -> str:
        """Of its mailbox."""
        return self._mailbox.address

    def secret(self) -> str:
        """Of the application's mailboxes: that of the scheduler that was created first."""
        return self._secret

    def job(self) -> str:
        """Ray's id of the job whose process made this actor."""
        return str(ray.get_runtime_context().get_job_id())

    def router_comes(self) -> None:
        """See GlobalScheduler.router_comes."""
        self._coming.set()

    def stop(self) -> None:
        """Have all routers end their requests and take no more."""
        self._stop.set()

    def _run(self) -> None:
        next_tick = 0.0
        while True:
            message = self._mailbox.receive(TICK_S)
            now = time.monotonic()
            if self._coming.is_set():  # before the message, which may be that router's hello
                self._coming.clear()
                self._scheduler.router_comes(now)
            if message is not None:
                self._scheduler.receive(message, now)
            if now >= next_tick:
                next_tick = now + TICK_S
                self._scheduler.counted(SCHEDULER, self._mailbox.samples(SCHEDULER))
                self._scheduler.tick(now)
                if self._scheduler.lease_over(now):
                    self._end()
                    return
            if self._stop.is_set():
                self._stop.clear()
                self._scheduler.stop()
            for send in self._scheduler.take_messages():
                self._mailbox.send(send.address, send.message)
            for kill in self._scheduler.take_kills():
                threading.Thread(target=self._restart, args=(kill.engine,), daemon=True).start()

    def _restart(self, name: str) -> None:
        actor = find_actor(name, self._lease)
        if actor is not None:
            log.warning("%s is silent: its process is killed and started anew", name)
            ray.kill(actor, no_restart=False)

    def _end(self) -> None:
        log.info("no router is left: the application's engines and this scheduler end")
        end_actors(self._lease, but=SCHEDULER)
        ray.kill(ray.get_runtime_context().current_actor)


class EngineActor:
    """An Engine behind a mailbox, and the owner of its workers and their placement group: they die with it."""

    def __init__(self, config: Config, name: str, scheduler: str, lease: str, secret: str) -> None:
        """`scheduler`: its address as of now. `lease`: Ray's namespace of the application. `secret`: that of all its mailboxes."""
        logging.basicConfig(level=logging.INFO, format=f"[{name}] %(levelname)s %(message)s")
        self._mailbox = Mailbox[EngineMessage](EngineMessage, ray.util.get_node_ip_address(), secret=secret)
        self._secret = secret
        settings = EngineConfig(
            name=name,
            address=self._mailbox.address,
            scheduler=scheduler,
            batch=batch_settings(config, num_blocks=2, max_model_len=1),  # the workers will say how much they hold
            num_ranks=config.num_ranks,
            step_timeout_s=config.step_timeout_s,
            worker_timeout_s=config.worker_timeout_s,
            load_timeout_s=config.load_timeout_s,
            names=BlockNames(secret, config.block_size) if config.by_prefix else None,
            pull_timeout_s=config.kv_pull_timeout_s if config.pulls else None,
        )
        self._engine = Engine(settings, time.time_ns() // 1_000_000, time.monotonic())
        self._fleet = Fleet(config, name, lease, self._mailbox.address, secret)
        self._finder = Finder(lease)
        self._recorder = Recorder(Path(config.timeline), name) if config.timeline is not None else None
        _start(self._run, name)

    def address(self) -> str:
        """Of its mailbox."""
        return self._mailbox.address

    def secret(self) -> str:
        """Of its mailbox."""
        return self._secret

    def _run(self) -> None:
        next_tick = 0.0
        while True:
            self._carry_out()
            message = self._mailbox.receive(TICK_S)
            now = time.monotonic()
            if message is not None:
                self._engine.receive(message, now)
            if isinstance(message, StageTimes) and self._recorder is not None:
                self._recorder.write(message)
            if now >= next_tick:
                next_tick = now + TICK_S
                self._look_around(now)
                self._engine.metrics.channel = self._mailbox.samples(self._engine.config.name)
                self._engine.tick(now)

    def _carry_out(self) -> None:
        for action in self._engine.take_actions():
            match action:
                case Send():
                    self._mailbox.send(action.address, action.message)
                case StartWorkers():
                    self._fleet.start(action.epoch)
                case KillWorkers():
                    log.warning("epoch %d ends: %s", action.epoch, action.reason)
                    self._fleet.kill(action.reason)

    def _look_around(self, now: float) -> None:
        for event in self._fleet.poll():
            match event:
                case Died():
                    self._engine.workers_died(event.epoch, event.reason, now)
                case Waiting():
                    self._engine.workers_wait(event.epoch, event.reason, now)
        if self._finder.address is not None:
            self._engine.scheduler_at(self._finder.address, now)
        if self._finder.missing_s > _ORPHANED_S:
            log.error("the application has had no scheduler for %.0f s: this engine ends", _ORPHANED_S)
            ray.kill(ray.get_runtime_context().current_actor)


def _start(run: Callable[[], None], name: str) -> None:
    """Run the actor's loop in a thread. An exception that leaves it ends the process, so that Ray starts the actor anew: a state
    machine that failed half-way is not to be trusted, and an actor without its loop would look alive for ever."""

    def guarded() -> None:
        try:
            run()
        except BaseException:
            log.critical("the loop failed; the process ends", exc_info=True)
            os._exit(1)

    threading.Thread(target=guarded, name=name, daemon=True).start()


def end_actors(lease: str, but: str = "") -> None:
    """Kill the actors named under `lease`, except the one called `but`. Engines' workers and placement groups die with them."""
    for name in named_actors(lease):
        actor = find_actor(name, lease) if name != but else None
        if actor is not None:
            ray.kill(actor)
