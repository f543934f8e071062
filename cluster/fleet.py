"""An engine's workers on Ray: one placement group per epoch, an actor per rank in it, and the proof that the old ones are dead.

    start -> [placing] -- the group has its resources --> [running] -- a worker ends --> Died
    kill  -> actors and group go; the next start is carried out when every old process is confirmed dead

All of it happens in a thread of its own, one command after the other, because Ray's answers take their time: the engine's loop only
hands over commands and takes events.
"""

import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.bundles import Bundles, Node, bundles_for, missing, resource_of, with_threads
from cluster.config import Config
from cluster.nodes import alive_nodes, cores_of, free_resources
from cluster.processes import Process, ended, this_process
from parallel.rendezvous import StoreServer

CONFIRM_S = 15.0
"""How long the next epoch waits for an old process that does not go. Ray itself takes 5 s for a frozen one."""
_POLL_S = 0.1
_PATIENCE_S = 2.0
"""A group that has no resources by then has not just been asked for."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Died:
    """A worker of `epoch` ended, or could not be started."""

    epoch: int
    reason: str


@dataclass(frozen=True)
class Waiting:
    """The workers of `epoch` can't start yet. An empty reason: they can now."""

    epoch: int
    reason: str


Event = Died | Waiting


@dataclass
class _Crew:
    """One epoch's workers."""

    epoch: int
    bundles: Bundles
    group: PlacementGroup
    asked_at: float
    waited: bool = False
    told_at: float = 0.0
    workers: list[Any] = field(default_factory=list)
    """By rank; empty as long as the group has no resources."""
    runs: dict[Any, int] = field(default_factory=dict)
    """The run() of each rank that has not ended."""
    asked: dict[Any, int] = field(default_factory=dict)
    """The question, which process it is, of each rank that has not answered."""
    processes: dict[int, Process] = field(default_factory=dict)


class Fleet:
    """The workers of one engine. start() and kill() return at once; poll() tells what happened since."""

    def __init__(self, config: Config, engine: str, application: str, address: str, secret: str) -> None:
        """`application`: its namespace, which begins the names of its placement groups. `address`, `secret`: of the engine's
        mailbox."""
        self._config = config
        self._name = f"{application}/{engine}"
        self._application = application
        self._address, self._secret = address, secret
        self._store: StoreServer | None = None
        self._crew: _Crew | None = None
        self._commands: queue.SimpleQueue[int | str] = queue.SimpleQueue()
        """Epochs to start, and reasons to kill."""
        self._events: deque[Event] = deque()
        threading.Thread(target=self._run, name="fleet", daemon=True).start()

    def start(self, epoch: int) -> None:
        """Start all ranks for `epoch`, once those of the epoch before are confirmed dead."""
        self._commands.put(epoch)

    def kill(self, reason: str) -> None:
        """Kill all ranks, frozen ones too."""
        self._commands.put(reason)

    def poll(self) -> list[Event]:
        """What happened since the last call, in order."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                command = self._commands.get(timeout=_POLL_S)
            except queue.Empty:
                command = None
            epoch = command if isinstance(command, int) else self._crew.epoch if self._crew else 0
            try:
                if command is None:
                    self._look()
                else:
                    self._end()
                if isinstance(command, int):
                    self._begin(command)
            except Exception as error:  # Ray's are many; whichever it was, the engine has to hear that this epoch has no workers
                log.exception("workers of epoch %d", epoch)
                self._events.append(Died(epoch, f"{type(error).__name__}: {_first_line(error)}"))
                time.sleep(1.0)

    def _begin(self, epoch: int) -> None:
        bundles = bundles_for(self._config, alive_nodes())
        if bundles.ranks < self._config.tp:
            log.warning("no node has %d %s: tensor-parallel peers are spread over nodes", self._config.tp, bundles.resource)
        if self._config.num_ranks > 1:  # a new one for each epoch: what a dying rank leaves in it must not meet the next ones
            self._store = StoreServer(ray.util.get_node_ip_address())
        group = placement_group(bundles.requests, strategy=bundles.strategy, name=f"{self._name}-{epoch}")
        self._crew = _Crew(epoch, bundles, group, time.monotonic())
        self._look()

    def _look(self) -> None:
        crew = self._crew
        if crew is None:
            return
        if not crew.workers:
            self._place(crew, placement_group_table(crew.group))
            return
        for answered in ray.wait(list(crew.asked), num_returns=len(crew.asked), timeout=0)[0] if crew.asked else []:
            rank = crew.asked.pop(answered)
            try:
                crew.processes[rank] = ray.get(answered, timeout=1.0)
            except ray.exceptions.RayError as error:
                log.info("worker %d does not say which process it is: %s", rank, _first_line(error))
        for over in ray.wait(list(crew.runs), num_returns=1, timeout=0)[0] if crew.runs else []:
            rank = crew.runs.pop(over)
            try:
                reason = str(ray.get(over, timeout=1.0))
            except ray.exceptions.RayError as error:
                reason = _first_line(error)
            self._events.append(Died(crew.epoch, f"worker {rank} ended: {reason}"))

    def _place(self, crew: _Crew, table: dict[str, Any]) -> None:
        state, now = table.get("state"), time.monotonic()
        if state == "CREATED":
            if crew.waited:
                self._events.append(Waiting(crew.epoch, ""))
            self._start_workers(crew, table["bundles_to_node_id"])
        elif state not in ("PENDING", "PREPARED", "RESCHEDULING"):
            self._crew = None
            self._events.append(Died(crew.epoch, f"the placement group is {state}"))
        elif now > crew.asked_at + _PATIENCE_S and now > crew.told_at + 1.0:
            crew.waited, crew.told_at = True, now
            self._events.append(Waiting(crew.epoch, missing(crew.bundles, alive_nodes(), free_resources())))

    def _start_workers(self, crew: _Crew, where: dict[int, str]) -> None:
        from workers.worker import Worker

        nodes = {node.id: node for node in alive_nodes()}
        store = "" if self._store is None else self._store.address
        for rank in range(self._config.num_ranks):
            index = crew.bundles.index(rank)
            config = self._config_on(nodes.get(where[index]), list(nodes.values()))
            options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
            options["num_gpus" if crew.bundles.resource == "GPU" else "num_cpus"] = crew.bundles.per_rank
            strategy = PlacementGroupSchedulingStrategy(crew.group, placement_group_bundle_index=index)
            actor: Any = ray.remote(**options)(Worker)
            worker = actor.options(scheduling_strategy=strategy).remote(
                config, rank, crew.epoch, self._address, store, self._secret
            )
            crew.workers.append(worker)
            crew.asked[worker.__ray_call__.remote(_process_of)] = rank
            crew.runs[worker.run.remote()] = rank

    def _config_on(self, node: Node | None, nodes: list[Node]) -> Config:
        """The settings of a rank there: its threads are a share of the node's cores."""
        if node is None or self._config.threads is not None:
            return self._config
        resource = resource_of(self._config)
        ranks = 0.0  # of all engines of the application: where threads are to be shared out, each takes one CPU
        for group in placement_group_table().values():
            if group["state"] == "CREATED" and group["name"].startswith(f"{self._application}/"):
                taken = [group["bundles"][index] for index, at in group["bundles_to_node_id"].items() if at == node.id]
                ranks += sum(bundle.get(resource, 0.0) for bundle in taken)
        hosts = sum(other.total.get(resource, 0.0) > 0 for other in nodes)
        return with_threads(self._config, cores_of(node), int(ranks), hosts)

    def _end(self) -> None:
        """Kill, and wait until they are gone: a frozen process would go on writing, and hold the device's memory."""
        crew, self._crew = self._crew, None
        if crew is None:
            return
        try:
            left = self._kill(crew)
        except Exception:  # Ray's are many, and a cluster that just lost a node gives them all
            log.exception("epoch %d: its processes are not confirmed dead", crew.epoch)
            left = 0
        finally:
            remove_placement_group(crew.group)  # which kills what is left in it
        if left:
            log.error("epoch %d: %d of its processes are not confirmed dead", crew.epoch, left)

    def _kill(self, crew: _Crew) -> int:
        """How many are not confirmed dead."""
        for answered in ray.wait(list(crew.asked), num_returns=len(crew.asked), timeout=0)[0] if crew.asked else []:
            try:
                crew.processes[crew.asked.pop(answered)] = ray.get(answered, timeout=1.0)
            except ray.exceptions.RayError:
                continue
        for worker in crew.workers:
            ray.kill(worker)
        left = ended(crew.processes.values(), CONFIRM_S)
        # Those that never said which process they are: what Ray says of them has to do.
        unknown = [run for run, rank in crew.runs.items() if rank not in crew.processes]
        silent = ray.wait(unknown, num_returns=len(unknown), timeout=CONFIRM_S)[1] if unknown else []
        return len(left) + len(silent)


def _process_of(worker: object) -> Process:
    return this_process()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
