"""The ranks of bench.collectives as Ray actors: one for each rank of a mesh, on a GPU where there are some, placed as workers are.

with attached(cpus=4) as resources:
    check_mesh(Mesh(2, 2), "cpu")
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from bench.collectives import Case, ExchangeError, Measured, Outcome, Rank, cases, check
from parallel.membership import Membership
from parallel.mesh import Mesh, Seat
from parallel.rendezvous import StoreServer, connect

JOIN_S = 300.0
"""Until all ranks have a process, have imported torch and formed their groups."""
EXCHANGE_S = 60.0
"""For one exchange."""
CASE_S = 180.0
"""For all repetitions of one; the exchange's own time-out comes first, unless a rank hangs where no time-out reaches."""


@contextmanager
def attached(cpus: int) -> Iterator[dict[str, float]]:
    """On the Ray cluster that RAY_ADDRESS names, else on one of its own on this machine, with at least `cpus` CPUs to give out.
    Yields what the cluster has of each resource, in all."""
    ours = "RAY_ADDRESS" not in os.environ
    more = {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False} if ours else {}
    ray.init(address="local" if ours else None, logging_level=logging.WARNING, **more)
    try:
        yield dict(ray.cluster_resources())
    finally:
        ray.shutdown()


class RankActor:
    """A rank in a process of its own."""

    def __init__(self, seat: Seat, store: str, epoch: int, device: str, exchange_s: float) -> None:
        """See parallel.rendezvous.connect; `device`: as Config's."""
        import torch

        from workers.device import resolve_device

        torch.set_num_threads(1)
        member = Membership(seat, connect(store, epoch, JOIN_S), ray.util.get_node_ip_address(), "", JOIN_S)
        self._rank = Rank(member, resolve_device(device), exchange_s)

    def ready(self) -> bool:
        """All ranks have joined."""
        return True

    def run(self, case: Case) -> Outcome:
        """See Rank.run."""
        return self._rank.run(case)


def check_mesh(mesh: Mesh, device: str, todo: Sequence[Case] | None = None, exchange_s: float = EXCHANGE_S) -> list[Measured]:
    """All exchanges on `mesh`, each rank on a `device` ("cpu", "cuda") of its own. Raises ExchangeError."""
    store = StoreServer(ray.util.get_node_ip_address())
    resource = "GPU" if device == "cuda" else "CPU"
    group, ranks_a_bundle = _reserve(mesh, resource)
    actors: list[Any] = []
    try:
        option = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": 1}
        actor: Any = ray.remote(max_restarts=0, **option)(RankActor)
        for rank in range(mesh.size):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank // ranks_a_bundle)
            actors.append(actor.options(scheduling_strategy=strategy).remote(mesh.seat(rank), store.address, 1, device, exchange_s))
        try:
            ray.get([actor.ready.remote() for actor in actors], timeout=JOIN_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ExchangeError(f"forming groups of {mesh.tp}x{mesh.pp} ranks: {_last_line(error)}") from error

        def run(case: Case) -> list[Outcome]:
            outcomes: list[Outcome] = ray.get([actor.run.remote(case) for actor in actors], timeout=CASE_S)
            return outcomes

        return check(mesh, cases(mesh) if todo is None else todo, run)
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


def _reserve(mesh: Mesh, resource: str) -> tuple[Any, int]:
    """A placement group as the fleet of an engine asks for it, and how many ranks each bundle holds: a stage on one node, stages
    spread over nodes; where no node holds a stage, as close together as they go."""
    most = max((node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    whole = most >= mesh.tp
    bundles = [{resource: mesh.tp}] * mesh.pp if whole else [{resource: 1}] * mesh.size
    group = placement_group(bundles, strategy="SPREAD" if whole else "PACK")
    if not group.wait(JOIN_S):
        remove_placement_group(group)
        raise ExchangeError(f"{mesh.tp}x{mesh.pp} ranks: {mesh.size} {resource} were not free within {JOIN_S:.0f} s")
    return group, mesh.tp if whole else 1


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[-1]
