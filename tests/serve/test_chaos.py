"""Deaths that take long to be noticed: frozen processes, whole nodes. Run by `make chaos`."""

import concurrent.futures
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.model import DEMO_MODEL
from tests.serve.conftest import Server, start_server
from tests.serve.nodes import Nodes

pytestmark = [pytest.mark.serve, pytest.mark.chaos]
TOKENS = 300


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Nodes]:
    """A cluster whose nodes may die."""
    with Nodes(tmp_path, [0, 1, 1, 1]) as running:
        yield running


@pytest.fixture
def pair(cluster: Nodes, tmp_path: Path) -> Iterator[Server]:
    """Two engines on three nodes of one CPU each; the head has none."""
    options = ("--engines", "2", "--dtype", "float32", "--kv-memory", "64MiB", "--step-timeout-s", "10")
    server = start_server(tmp_path / "server", str(DEMO_MODEL), *options, nodes=cluster)
    server.wait_for_at_least("rayline:engine_epochs_total", 2)
    wait_for(lambda: ready(server) == 2)
    yield server
    assert server.stop() == 0, server.log.read_text()
    cluster.wait_until_left({"actors": [], "groups": [], "workers": []})


def ready(server: Server) -> int:
    return server.request("/health")[2].count(b'"ready":2') * 2


def wait_for(reached: Callable[[], bool], timeout_s: float = 120.0) -> float:
    """Seconds until it was."""
    began = time.monotonic()
    while not reached():
        assert time.monotonic() < began + timeout_s
        time.sleep(0.1)
    return time.monotonic() - began


def streamed(server: Server, number: int) -> list[int]:
    """Tokens of one long stream."""
    stream: Any = server.client.completions.create(
        model="demo",
        prompt=f"def f{number % 4}(",
        max_tokens=TOKENS,
        temperature=0.8,
        seed=number % 4,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return [token for chunk in stream for token in chunk.choices[0].token_ids or []]


def all_streams(server: Server, disturb: Callable[[], None]) -> None:
    """30 streams under which something happens; each gives the tokens it gives alone."""
    alone = [streamed(server, number) for number in range(4)]
    with concurrent.futures.ThreadPoolExecutor(30) as clients:
        running = [clients.submit(streamed, server, number) for number in range(30)]
        wait_for(lambda: server.gauge("vllm:num_requests_running") >= 20)
        disturb()
        for number, stream in enumerate(running):
            assert stream.result(timeout=240) == alone[number % 4], number


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_frozen_worker_is_dead_before_the_next_epoch(cluster: Nodes, pair: Server) -> None:
    frozen = cluster.processes("ray::Worker")[0]
    all_streams(pair, lambda: os.kill(frozen, signal.SIGSTOP))
    assert gone(frozen)
    wait_for(lambda: ready(pair) == 2)
    assert len(cluster.left()["groups"]) == 2


def test_a_frozen_engine_is_replaced_and_its_workers_and_group_go(cluster: Nodes, pair: Server) -> None:
    frozen = cluster.processes("ray::EngineActor")[0]
    before = cluster.left()
    all_streams(pair, lambda: os.kill(frozen, signal.SIGSTOP))
    wait_for(lambda: gone(frozen))
    wait_for(lambda: ready(pair) == 2)
    after = cluster.left()
    assert after["actors"] == before["actors"]
    assert len(after["groups"]) == len(after["workers"]) == 2
    assert len(set(after["groups"]) & set(before["groups"])) == 1
    assert len(set(after["workers"]) & set(before["workers"])) == 1


def test_a_scheduler_killed_for_good_is_made_anew_and_finds_its_engines(cluster: Nodes, pair: Server) -> None:
    """At another port, but with the same secret."""
    before = cluster.left()
    (scheduler,) = [actor for actor in before["actors"] if actor.endswith("/scheduler")]
    all_streams(pair, functools.partial(cluster.ask, "kill", scheduler))
    assert len(streamed(pair, 0)) == TOKENS
    wait_for(lambda: ready(pair) == 2)
    assert cluster.left() == before


def test_nodes_die_under_thirty_streams(cluster: Nodes, pair: Server) -> None:
    """Any node but those of the head and of the router, whose clients would have to come again."""
    numbers = [0, 1, 2]
    died = set()
    for kind in ("Worker", "SchedulerActor", "EngineActor"):
        living = {number: cluster.ask("on", number) for number in numbers}
        safe = [number for number, classes in living.items() if not any(c.startswith("ServeReplica") for c in classes)]
        victim = next((number for number in safe if kind in living[number]), None)
        if victim is None:
            continue
        all_streams(pair, functools.partial(cluster.ask, "remove", victim))
        died |= set(living[victim])
        numbers.remove(victim)
        numbers.append(cluster.ask("add", 1))
        wait_for(lambda: ready(pair) == 2)
        assert len(cluster.left()["groups"]) == 2
    assert "Worker" in died
    print("died with their nodes:", died)
