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
from cluster.bundles import Bundles, bundles_for, missing
from cluster.config import Config
from cluster.nodes import alive_nodes, free_resources
from parallel.membership import Membership
from parallel.mesh import Mesh, Seat
from parallel.rendezvous import StoreServer, connect

PLACE_S = 600.0
"""Until the cluster has room for all ranks; it may have to start nodes."""
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
    bundles, group = _reserve(mesh, device)
    actors: list[Any] = []
    try:
        option = {"num_gpus": 1, "num_cpus": 0} if bundles.resource == "GPU" else {"num_cpus": 1}
        actor: Any = ray.remote(max_restarts=0, **option)(RankActor)
        for rank in range(mesh.size):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundles.index(rank))
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


def _reserve(mesh: Mesh, device: str) -> tuple[Bundles, Any]:
    """What an engine of that mesh asks for, and its placement group."""
    config = Config("none", tp=mesh.tp, pp=mesh.pp, device="cuda" if device == "cuda" else "cpu")
    bundles = bundles_for(config, alive_nodes())
    group = placement_group(bundles.requests, strategy=bundles.strategy)
    if not group.wait(PLACE_S):
        remove_placement_group(group)
        raise ExchangeError(f"{mesh.tp}x{mesh.pp} ranks: {missing(bundles, alive_nodes(), free_resources())}")
    return bundles, group


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[-1]
