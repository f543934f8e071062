"""The Ray actors of the control plane: thin shells that carry messages to the state machines and their actions out.

Each runs one thread that owns the state machine and the mailbox. Actors are named under the application and detached: they outlive
the process that made them, and end with the application's lease (see GlobalScheduler.lease_over), or at once by end_actors().
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from cluster.channel import Mailbox
from cluster.config import Config, batch_settings
from cluster.engine import Engine, EngineConfig, KillWorkers, Send, StartWorkers
from cluster.protocol import EngineMessage, SchedulerMessage
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from parallel.rendezvous import StoreServer

TICK_S = 0.2
_KILL_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class SchedulerActor:
    """The GlobalScheduler behind a mailbox."""

    def __init__(self, config: Config, port: int, lease: str, secret: str) -> None:
        """`port`: fixed, so that a restarted scheduler is found again. `lease`: Ray's namespace of the application. `secret`: that
        of all its mailboxes."""
        logging.basicConfig(level=logging.INFO, format="[scheduler] %(levelname)s %(message)s")
        self._mailbox = Mailbox[SchedulerMessage](SchedulerMessage, ray.util.get_node_ip_address(), port, secret)
        settings = SchedulerConfig(max_queue=config.max_queue, placement=config.placement)
        self._scheduler = GlobalScheduler(settings, time.monotonic())
        self._lease = lease
        self._secret = secret
        _start(self._run, "scheduler")

    def address(self) -> str:
        """Of its mailbox."""
        return self._mailbox.address

    def secret(self) -> str:
        """Of the application's mailboxes: that of the scheduler that was created first."""
        return self._secret

    def _run(self) -> None:
        next_tick = 0.0
        while True:
            message = self._mailbox.receive(TICK_S)
            now = time.monotonic()
            if message is not None:
                self._scheduler.receive(message, now)
            if now >= next_tick:
                next_tick = now + TICK_S
                self._scheduler.counted("scheduler", self._mailbox.samples("scheduler"))
                self._scheduler.tick(now)
                if self._scheduler.lease_over(now):
                    self._end()
                    return
            for send in self._scheduler.take_messages():
                self._mailbox.send(send.address, send.message)

    def _end(self) -> None:
        log.info("no router is left: the application's engines and this scheduler end")
        end_actors(self._lease, but="scheduler")
        ray.kill(ray.get_runtime_context().current_actor)


class EngineActor:
    """An Engine behind a mailbox, and the owner of its workers: they die with it."""

    def __init__(self, config: Config, name: str, scheduler: str, secret: str) -> None:
        logging.basicConfig(level=logging.INFO, format=f"[{name}] %(levelname)s %(message)s")
        self._config, self._secret = config, secret
        self._workers: list[Any] = []
        self._running: dict[Any, int] = {}
        """The run() of each worker -> its epoch. It ends when the worker does."""
        self._mailbox = Mailbox[EngineMessage](EngineMessage, ray.util.get_node_ip_address(), secret=secret)
        settings = EngineConfig(
            name=name,
            address=self._mailbox.address,
            scheduler=scheduler,
            batch=batch_settings(config, num_blocks=2, max_model_len=1),  # the workers will say how much they hold
            num_ranks=config.tp * config.pp,
            step_timeout_s=config.step_timeout_s,
            worker_timeout_s=config.worker_timeout_s,
            load_timeout_s=config.load_timeout_s,
        )
        self._store = StoreServer(ray.util.get_node_ip_address()) if settings.num_ranks > 1 else None
        self._engine = Engine(settings, time.time_ns() // 1_000_000, time.monotonic())
        _start(self._run, name)

    def address(self) -> str:
        """Of its mailbox."""
        return self._mailbox.address

    def _run(self) -> None:
        next_tick = 0.0
        while True:
            self._carry_out()
            message = self._mailbox.receive(TICK_S)
            now = time.monotonic()
            if message is not None:
                self._engine.receive(message, now)
            if now >= next_tick:
                next_tick = now + TICK_S
                self._look_at_workers(now)
                self._engine.metrics.channel = self._mailbox.samples(self._engine.config.name)
                self._engine.tick(now)

    def _carry_out(self) -> None:
        for action in self._engine.take_actions():
            match action:
                case Send():
                    self._mailbox.send(action.address, action.message)
                case StartWorkers():
                    self._start_workers(action.epoch)
                case KillWorkers():
                    log.warning("epoch %d ends: %s", action.epoch, action.reason)
                    self._kill_workers()

    def _start_workers(self, epoch: int) -> None:
        from workers.worker import Worker

        gpus = 1 if self._config.device == "cuda" else 0
        actor = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0)(Worker)
        store = self._store.address if self._store else ""
        for rank in range(self._config.tp * self._config.pp):
            worker = actor.remote(self._config, rank, epoch, self._mailbox.address, store, self._secret)
            self._workers.append(worker)
            self._running[worker.run.remote()] = epoch

    def _kill_workers(self) -> None:
        """Kill, and wait until they are gone: a frozen process would go on writing, and hold the device's memory."""
        for worker in self._workers:
            ray.kill(worker)
        ends = list(self._running)
        alive = ray.wait(ends, num_returns=len(ends), timeout=_KILL_TIMEOUT_S)[1] if ends else []
        if alive:
            log.error("%d workers are not confirmed dead after %.0f s", len(alive), _KILL_TIMEOUT_S)
        self._workers, self._running = [], {}

    def _look_at_workers(self, now: float) -> None:
        if not self._running:
            return
        for ended in ray.wait(list(self._running), num_returns=1, timeout=0)[0]:
            epoch = self._running.pop(ended)
            try:
                reason = ray.get(ended, timeout=1.0)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[0]
            self._engine.workers_died(epoch, f"a worker ended: {reason}", now)


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
    """Kill the actors named under `lease`, except the one called `but`. Engines' workers die with them."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == lease and actor["name"] != but:
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=lease))
            except ValueError:
                log.info("%s was gone already", actor["name"])
