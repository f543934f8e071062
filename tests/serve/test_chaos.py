"""Deaths that take long to be noticed: frozen processes, whole nodes. Run by `make chaos`."""

import concurrent.futures
import functools
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.model import DEMO_MODEL
from tests.serve.conftest import Server, start_server
from tests.serve.nodes import Nodes, wait_for

pytestmark = [pytest.mark.serve, pytest.mark.chaos]
TOKENS = 300
STEM = [300 + place % 97 for place in range(160)]
"""All prompts begin with it, so that engines pull its KV from each other, and some die over it."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Nodes]:
    """A cluster whose nodes may die: a head without CPUs and three nodes of two."""
    with Nodes(tmp_path, [0, 2, 2, 2]) as running:
        yield running


@pytest.fixture(params=["1", "2"], ids=["pp1", "pp2"])
def pair(cluster: Nodes, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Two engines, with all time-outs as they come: of one worker, and of two stages each on a node of its own."""
    options = ("--engines", "2", "--pp", request.param, "--dtype", "float32", "--kv-memory", "64MiB")
    server = start_server(tmp_path / "server", str(DEMO_MODEL), *options, nodes=cluster)
    server.wait_for_at_least("rayline:engine_epochs_total", 2)
    wait_for(lambda: ready(server) == 2)
    yield server
    assert server.stop() == 0, server.log.read_text()
    cluster.wait_until_left({"actors": [], "groups": [], "workers": []})


def ready(server: Server) -> int:
    return server.request("/health")[2].count(b'"ready":2') * 2


@dataclass
class Stream:
    """What a client saw."""

    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    """When each chunk came, monotonic seconds."""

    def pause(self, since: float) -> float:
        """The longest wait for a chunk that ended after `since`, in seconds."""
        return max((after - before for before, after in itertools.pairwise(self.at) if after > since), default=0.0)


def streamed(server: Server, number: int) -> Stream:
    """One long stream."""
    seen = Stream()
    stream: Any = server.client.completions.create(
        model="demo",
        prompt=[*STEM, number % 4],
        max_tokens=TOKENS,
        temperature=0.8,
        seed=number % 4,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    for chunk in stream:
        seen.tokens += chunk.choices[0].token_ids or []
        seen.at.append(time.monotonic())
    return seen


def all_streams(server: Server, what: str, disturb: Callable[[], None]) -> float:
    """30 streams under which something happens; each gives the tokens it gives alone. Prints how long that took; returns when an
    engine's epoch was seen to end, in seconds after it (0 if none did)."""
    alone = [streamed(server, number).tokens for number in range(4)]
    assert all(len(tokens) == TOKENS for tokens in alone)
    with concurrent.futures.ThreadPoolExecutor(30) as clients:
        running = [clients.submit(streamed, server, number) for number in range(30)]
        wait_for(lambda: server.gauge("vllm:num_requests_running") >= 20)
        epochs, noticed = server.gauge("rayline:engine_epochs_total"), 0.0
        began = time.monotonic()
        disturb()
        while not all(stream.done() for stream in running):
            if not noticed and server.gauge("rayline:engine_epochs_total") > epochs:
                noticed = time.monotonic() - began
            time.sleep(0.1)
        seen = [stream.result() for stream in running]
    for number, stream in enumerate(seen):
        assert stream.tokens == alone[number % 4], number
    wait_for(lambda: ready(server) == 2)
    whole = time.monotonic() - began
    pauses = sorted(stream.pause(began) for stream in seen)
    print(
        f"{what}: noticed after {noticed:.1f} s; the streams' longest pause {pauses[-1]:.1f} s, median {pauses[15]:.1f} s; "
        f"two engines again after {whole:.1f} s; {server.gauge('rayline:kv_pulls_total'):.0f} pulls"
    )
    return noticed


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_killed_worker(cluster: Nodes, pair: Server) -> None:
    killed = cluster.processes("ray::Worker")[-1]
    assert all_streams(pair, "a worker killed", lambda: os.kill(killed, signal.SIGKILL)) < 10
    assert len(cluster.left()["groups"]) == 2


def test_a_frozen_worker_is_dead_before_the_next_epoch(cluster: Nodes, pair: Server) -> None:
    frozen = cluster.processes("ray::Worker")[-1]
    assert all_streams(pair, "a worker frozen", lambda: os.kill(frozen, signal.SIGSTOP)) < 12, "8 s, and the way to /metrics"
    assert gone(frozen)
    assert len(cluster.left()["groups"]) == 2


def test_a_frozen_engine_is_replaced_and_its_workers_and_group_go(cluster: Nodes, pair: Server) -> None:
    frozen = cluster.processes("ray::EngineActor")[0]
    before = cluster.left()
    all_streams(pair, "an engine frozen", lambda: os.kill(frozen, signal.SIGSTOP))
    wait_for(lambda: gone(frozen))
    wait_for(lambda: ready(pair) == 2)
    after = cluster.left()
    assert after["actors"] == before["actors"]
    for kind, of_each_engine in (("groups", 1), ("workers", len(before["workers"]) // 2)):
        assert len(after[kind]) == 2 * of_each_engine
        assert len(set(after[kind]) & set(before[kind])) == of_each_engine, "the other engine's"


def test_a_scheduler_killed_for_good_is_made_anew_and_finds_its_engines(cluster: Nodes, pair: Server) -> None:
    """At another port, but with the same secret."""
    before = cluster.left()
    (scheduler,) = [actor for actor in before["actors"] if actor.endswith("/scheduler")]
    all_streams(pair, "the scheduler killed for good", functools.partial(cluster.ask, "kill", scheduler))
    assert len(streamed(pair, 0).tokens) == TOKENS
    assert cluster.left() == before


def test_nodes_die_under_thirty_streams(cluster: Nodes, pair: Server) -> None:
    """Any node but those of the head and of the router, whose clients would have to come again."""
    numbers, kinds = [0, 1, 2], ("Worker", "SchedulerActor", "EngineActor")
    died = set()
    for kind in kinds:
        living = {number: cluster.ask("on", number) for number in numbers}
        safe = [number for number, classes in living.items() if not any(c.startswith("ServeReplica") for c in classes)]
        victim = next((number for number in safe if kind in living[number]), None)
        if victim is None:
            continue
        all_streams(pair, f"a node removed, with {', '.join(living[victim])}", functools.partial(cluster.ask, "remove", victim))
        died |= set(living[victim])
        numbers.remove(victim)
        numbers.append(cluster.ask("add", 2))
        assert len(cluster.left()["groups"]) == 2
    hit, spared = ([kind for kind in kinds if (kind in died) == wanted] for wanted in (True, False))
    print(
        f"nodes removed had: {', '.join(hit) or 'none of ours'}; only beside the router, so not hit: {', '.join(spared) or 'none'}"
    )
    assert "Worker" in died
