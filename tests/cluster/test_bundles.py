"""What ranks ask of the cluster's nodes, and what is said of what is missing."""

import pytest

from cluster.bundles import Node, bundles_for, cpus_needed, missing, with_threads
from cluster.config import Config, Device


def config(device: Device = "cpu", **values: int) -> Config:
    return Config("m", device=device, **values)  # type: ignore[arg-type]


def nodes(*totals: dict[str, float]) -> list[Node]:
    return [Node(f"n{number}", f"10.0.0.{number}", total) for number, total in enumerate(totals)]


def test_tensor_parallel_peers_share_a_bundle_and_stages_spread() -> None:
    asked = bundles_for(config(tp=2, pp=3), nodes({"CPU": 1}, {"CPU": 2}))
    assert (asked.requests, asked.strategy) == ([{"CPU": 2.0}] * 3, "SPREAD")
    assert [asked.index(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert bundles_for(config(device="cuda"), nodes({"GPU": 1})).requests == [{"GPU": 1.0}]
    assert bundles_for(config(threads=4), nodes({"CPU": 4})).requests == [{"CPU": 4.0}]


def test_where_no_node_holds_a_stage_each_rank_has_a_bundle() -> None:
    asked = bundles_for(config(tp=2, pp=2), nodes({"CPU": 1}, {"CPU": 1}, {"GPU": 8}))
    assert (asked.requests, asked.strategy) == ([{"CPU": 1.0}] * 4, "PACK")
    assert [asked.index(rank) for rank in range(4)] == [0, 1, 2, 3]
    assert bundles_for(config(), nodes()).requests == [{"CPU": 1.0}], "one that nobody has can only be waited for"


def test_what_is_missing_is_said_exactly() -> None:
    having = nodes({"GPU": 2}, {"GPU": 4}, {"CPU": 8})
    asked = bundles_for(config(tp=2, pp=2, device="cuda"), having)
    assert missing(asked, having, {"n0": {"GPU": 1.0}, "n1": {"CPU": 1.0}}) == (
        "waiting for resources: 2 bundles of 2 GPU; "
        "free now: node 10.0.0.0 has 1 GPU, node 10.0.0.1 has 0 GPU, node 10.0.0.2 has 0 GPU"
    )
    assert missing(asked, [], {}).endswith("free now: no node is alive")
    assert "1 bundle of 1 CPU;" in missing(bundles_for(config(), []), [], {})
    assert missing(asked, nodes(*[{}] * 100), {}).endswith("92 more have no more than that")


@pytest.mark.parametrize(
    ("cores", "here", "num_nodes", "engines", "threads"),
    [(8, 1, 1, 1, 8), (8, 1, 1, 2, 4), (8, 2, 2, 2, 4), (8, 1, 2, 2, 8), (2, 5, 1, 5, 1), (1, 0, 0, 1, 1)],
)
def test_ranks_of_a_node_share_its_cores(cores: int, here: int, num_nodes: int, engines: int, threads: int) -> None:
    assert with_threads(config(engines=engines), cores, here, num_nodes).threads == threads


def test_threads_are_the_users_and_a_gpu_ranks_own() -> None:
    assert with_threads(config(threads=3), 8, 1, 1).threads == 3
    assert with_threads(config(device="cuda"), 8, 1, 1).threads is None


def test_cpus_of_all_ranks() -> None:
    assert cpus_needed(config(tp=2, pp=2, engines=3)) == 12
    assert cpus_needed(config(threads=2)) == 2
