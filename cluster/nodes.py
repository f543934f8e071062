"""What Ray knows of the cluster's nodes."""

import os
from collections.abc import Mapping

import ray

from cluster.bundles import Node


def alive_nodes() -> list[Node]:
    """In the order of their addresses."""
    nodes = [Node(entry["NodeID"], entry["NodeManagerAddress"], entry["Resources"]) for entry in ray.nodes() if entry["Alive"]]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """By node id: what nobody has taken of each resource."""
    free: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    return free


def cores_of(node: Node) -> int:
    """CPU cores that Ray reckons with there; on this node not more than there really are, whatever Ray was told."""
    cores = int(node.total.get("CPU", 0.0))
    if node.id == ray.get_runtime_context().get_node_id():
        cores = min(cores, os.cpu_count() or 1)
    return max(1, cores)


def has_gpus() -> bool:
    """Whether some node has a GPU."""
    return float(ray.cluster_resources().get("GPU", 0.0)) > 0
