"""What an engine's ranks ask of the cluster, and what is said when it has not got it. No I/O."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.config import Config

_NODES_NAMED = 8


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    address: str
    total: Mapping[str, float]
    """What it has of each of Ray's resources, taken or not."""


@dataclass(frozen=True)
class Bundles:
    """A placement group to ask for: `count` bundles, each with the resources of `ranks` consecutive ranks."""

    resource: str
    per_rank: float
    ranks: int
    count: int
    strategy: str

    @property
    def requests(self) -> list[dict[str, float]]:
        """As Ray takes them."""
        return [{self.resource: self.per_rank * self.ranks}] * self.count

    def index(self, rank: int) -> int:
        """The bundle that `rank` belongs in."""
        return rank // self.ranks

    def __str__(self) -> str:
        return f"{self.count} bundle{'s' * (self.count > 1)} of {self.per_rank * self.ranks:g} {self.resource}"


def resource_of(config: Config) -> str:
    """The resource that a rank takes. `config.device` must have been resolved."""
    return "GPU" if config.device == "cuda" else "CPU"


def cpus_needed(config: Config) -> int:
    """By all ranks of all engines, if they run on CPUs."""
    return config.engines * config.num_ranks * (config.threads or 1)


def bundles_for(config: Config, nodes: Iterable[Node]) -> Bundles:
    """One bundle per stage, so that its tensor-parallel peers share a node, and the stages spread over nodes.

    Where no node, however idle, could hold a stage: a bundle per rank, as close together as they go.
    """
    resource = resource_of(config)
    per_rank = float(config.threads or 1) if resource == "CPU" else 1.0
    largest = max((node.total.get(resource, 0.0) for node in nodes), default=0.0)
    if config.tp > 1 and 0 < largest < config.tp * per_rank:  # with none at all, larger ones may come
        return Bundles(resource, per_rank, 1, config.num_ranks, "PACK")
    return Bundles(resource, per_rank, config.tp, config.pp, "SPREAD")


def missing(bundles: Bundles, nodes: Iterable[Node], free: Mapping[str, Mapping[str, float]]) -> str:
    """What is waited for and what there is. `free`: by node id, its resources that nobody has taken."""
    having = sorted(nodes, key=lambda node: (-free.get(node.id, {}).get(bundles.resource, 0.0), node.address, node.id))
    said = [f"node {node.address} has {free.get(node.id, {}).get(bundles.resource, 0.0):g} {bundles.resource}" for node in having]
    if len(said) > _NODES_NAMED:
        said = [*said[:_NODES_NAMED], f"{len(said) - _NODES_NAMED} more have no more than that"]
    return f"waiting for resources: {bundles}; free now: {', '.join(said) or 'no node is alive'}"


def with_threads(config: Config, cores: int, ranks_here: int, num_nodes: int) -> Config:
    """`config` for a rank on a node of `cores` cores: where the user set no threads, an even share of them.

    ranks_here: of this application, placed on that node so far. num_nodes: nodes among which its ranks are shared out in the end;
    so a rank that is placed first does not take what its neighbours will need.
    """
    if config.threads is not None or resource_of(config) != "CPU":
        return config
    expected = math.ceil(config.engines * config.num_ranks / max(1, num_nodes))
    return dataclasses.replace(config, threads=max(1, cores // max(ranks_here, expected, 1)))
