"""Operating-system processes of actors: which they are, and that they are really gone, frozen ones too."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

GRACE_S = 0.5
"""What Ray is given to end a process before it is killed."""
_POLL_S = 0.02


@dataclass(frozen=True)
class Process:
    """One process of the cluster; `started` (clock ticks since its machine's boot) tells it from a later one of the same pid."""

    node: str
    """Ray's id of its node."""
    pid: int
    started: int


def this_process() -> Process:
    """The calling one. Inside of an actor or a task of Ray."""
    pid = os.getpid()
    return Process(ray.get_runtime_context().get_node_id(), pid, _started(pid) or 0)


def ended(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Kill `processes`, on whatever nodes they are, and wait until they are gone; returns those that are not after `timeout_s`.

    A process of a node that Ray says is dead counts as gone. Waits; call it where that harms nobody.
    """
    by_node: dict[str, list[Process]] = {}
    for process in processes:
        by_node.setdefault(process.node, []).append(process)
    end = time.monotonic() + timeout_s
    here = by_node.pop(ray.get_runtime_context().get_node_id(), [])
    asked = {_on(node).remote(theirs, timeout_s): node for node, theirs in by_node.items()}
    left = end_here(here, timeout_s)
    while asked:
        for done in ray.wait(list(asked), num_returns=1, timeout=max(0.0, min(0.5, end - time.monotonic())))[0]:
            node = asked.pop(done)
            try:
                left += ray.get(done, timeout=1.0)
            except ray.exceptions.RayError:  # the node died meanwhile, or could not start a process
                if _alive(node):
                    left += by_node[node]
        dead = [ref for ref, node in asked.items() if not _alive(node)]
        for ref in dead:
            del asked[ref]
        if time.monotonic() >= end:
            return left + [process for node in asked.values() for process in by_node[node]]
    return left


def end_here(processes: list[Process], timeout_s: float) -> list[Process]:
    """The same for processes of this machine."""
    began = time.monotonic()
    left = [process for process in processes if _runs(process)]
    while left and time.monotonic() < began + timeout_s:
        if time.monotonic() > began + GRACE_S:
            for process in left:
                _kill(process)
        time.sleep(_POLL_S)
        left = [process for process in left if _runs(process)]
    return left


def _on(node: str) -> Any:
    """end_here() as a task on `node`, beside all that Ray accounts for."""
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(end_here)


def _alive(node: str) -> bool:
    return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())


def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def _runs(process: Process) -> bool:
    return _started(process.pid) == process.started


def _started(pid: int) -> int | None:
    """None for a process that is gone, or has ended and is not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
