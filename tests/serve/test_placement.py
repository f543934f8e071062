"""Where engines are placed and what is left of them, on a cluster of three nodes, by the command that users start."""

import concurrent.futures
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.config import Config
from cluster.model import DEMO_MODEL
from tests.serve.conftest import Server, start_server
from tests.serve.nodes import Nodes, wait_for

pytestmark = pytest.mark.serve
SMALL = ("--dtype", "float32", "--kv-memory", "8MiB")
NOTHING: dict[str, list[str]] = {"actors": [], "groups": [], "workers": []}


@pytest.fixture(scope="module")
def pair(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines of the demo, with keys and values in int8."""
    log = tmp_path_factory.mktemp("pair") / "log"
    server = start_server(log, str(DEMO_MODEL), "--engines", "2", "--kv-dtype", "int8", *SMALL, nodes=nodes)
    yield server
    if server.process.poll() is None:
        server.stop()


def rayline(nodes: Nodes, *words: str, directory: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cluster.cli", "serve", *words, "--host", "127.0.0.1"]
    here = os.getcwd()
    environment = {**os.environ, **nodes.environment, "PYTHONPATH": here}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=directory or here)


def test_two_engines_share_the_requests(nodes: Nodes, pair: Server) -> None:
    pair.wait_for_at_least("rayline:engine_epochs_total", 2)
    before = iterations(pair)

    def ask(number: int) -> Any:
        return pair.client.completions.create(
            model="demo", prompt=f"def f{number}(", max_tokens=50, extra_body={"ignore_eos": True}
        )

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        assert all(answer.usage.completion_tokens == 50 for answer in clients.map(ask, range(8)))
    pair.wait_for_at_least("rayline:computed_tokens_total", 400)
    took = [after - before.get(engine, 0.0) for engine, after in iterations(pair).items()]
    assert len(took) == 2
    assert min(took) > 25
    left = nodes.left()
    lease = left["actors"][0].split("/")[0]
    assert left["actors"] == [f"{lease}/{name}" for name in ("engine-0", "engine-1", "scheduler")]
    assert [name.rsplit("-", 1)[0] for name in left["groups"]] == [f"{lease}/engine-0", f"{lease}/engine-1"]
    assert len(left["workers"]) == 2


def test_requests_that_begin_alike_go_where_their_kv_is(nodes: Nodes, pair: Server) -> None:
    """One after the other: whoever computed a stem has it, and is asked for it again."""
    stems = [[7 + number] * 80 for number in range(4)]
    cached = []
    for turn in range(3):
        for stem in stems:
            prompt = [*stem, 300 + turn]
            answer = pair.client.completions.create(model="demo", prompt=prompt, max_tokens=4, temperature=0)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0] * 4 + [80] * 8
    pair.wait_for_at_least("vllm:prefix_cache_hits_total", 640)


def test_an_engine_pulls_the_kv_that_another_one_has(nodes: Nodes, pair: Server) -> None:
    """So many want the same stem that its holder is passed over: the other one takes it from there, and says the same. A pull that
    takes longer than computing, as the first one may while ranks still meet, is given up: then it is tried with another stem."""

    def ask(stem: list[int]) -> Any:
        body = {"ignore_eos": True}
        answer: Any = pair.client.completions.create(
            model="demo", prompt=stem, max_tokens=40, temperature=0, seed=1, extra_body=body
        )
        return answer.choices[0].text

    pulled, limit = "rayline:kv_pulled_tokens_total", time.monotonic() + 120
    for first in itertools.count():
        stem = [first, *([11, 200, 44, 9][place % 4] + place for place in range(160))]
        wanted = ask(stem)
        with concurrent.futures.ThreadPoolExecutor(24) as clients:
            assert list(clients.map(ask, [stem] * 24)) == [wanted] * 24
        if pair.gauge(pulled) >= 144 or time.monotonic() > limit:
            break
    pair.wait_for_at_least(pulled, 144)
    pair.wait_for_at_least("rayline:kv_loans_total", 1)


def iterations(server: Server) -> dict[str, float]:
    lines = server.request("/metrics")[2].decode().splitlines()
    found = [line for line in lines if line.startswith("rayline:iterations_total{")]
    return {line.split('engine="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in found}


def test_a_second_command_of_the_same_name_and_other_settings_is_refused(nodes: Nodes, pair: Server) -> None:
    before = nodes.left()
    done = rayline(nodes, "--max-num-seqs", "3")
    assert done.returncode == 2, done.stderr
    assert "already serves an application called 'rayline' with other settings" in done.stderr.splitlines()[-1]
    assert nodes.left() == before


@pytest.mark.chaos
def test_two_commands_with_names_of_their_own_share_a_proxy(nodes: Nodes, pair: Server, tmp_path: Path) -> None:
    before = nodes.left()
    port = int(pair.url.rsplit(":", 1)[1])
    other = start_server(tmp_path / "log", *SMALL, "--name", "other", nodes=nodes, port=port, prefix="/other")
    try:
        assert [model.id for model in other.client.models.list()] == ["demo"]
        answer = other.client.completions.create(model="demo", prompt="x", max_tokens=3, stream=True)
        assert len(list(answer)) >= 1
    finally:
        assert other.stop() == 0, other.log.read_text()
    nodes.wait_until_left(before, timeout_s=5.0)
    assert pair.request("/health")[0] == 200


@pytest.mark.chaos
def test_a_command_of_the_same_name_waits_for_the_death_of_one_that_starts(nodes: Nodes, pair: Server, tmp_path: Path) -> None:
    """Two that start at the same moment don't end each other's set; what is left of a dead one is ended."""
    before = nodes.left()
    named = ("--name", "raced", "--route-prefix", "/raced")
    port = pair.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "cluster.cli", "serve", *SMALL, *named, "--host", "127.0.0.1", "--port", port]
    with (tmp_path / "first").open("wb") as output:
        first = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **nodes.environment})
    wait_for(lambda: any(actor.startswith("raced-") for actor in nodes.left()["actors"]))
    first.send_signal(signal.SIGSTOP)
    try:
        done = rayline(nodes, *named, "--port", port, "--max-num-seqs", "3")
        assert done.returncode == 2, done.stderr
        assert "an application called 'raced' with other settings is just being started" in done.stderr.splitlines()[-1]
    finally:
        first.kill()
        first.wait()
    second = start_server(tmp_path / "log", *SMALL, *named[:2], "--max-num-seqs", "3", nodes=nodes, port=int(port), prefix=named[3])
    assert len([actor for actor in nodes.left()["actors"] if actor.startswith("raced-")]) == 2
    assert second.stop() == 0, second.log.read_text()
    nodes.wait_until_left(before, timeout_s=5.0)


def test_what_is_missing_is_said_and_ends_the_command(nodes: Nodes, pair: Server) -> None:
    before = nodes.left()
    done = rayline(nodes, "--threads", "3", "--load-timeout-s", "4", "--name", "wide", "--route-prefix", "/wide")
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert "waiting for resources: 1 bundle of 3 CPU; free now: node " in said
    assert said.count(" CPU,") + said.endswith(" CPU") == 3, said
    nodes.wait_until_left(before, timeout_s=5.0)


def test_a_node_without_the_model_is_named(nodes: Nodes, pair: Server, tmp_path: Path) -> None:
    before = nodes.left()
    (tmp_path / "m").symlink_to(DEMO_MODEL)
    own = "/proc/self/cwd/m"  # a path that only a process in that directory has
    done = rayline(nodes, own, "--name", "nowhere", directory=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"has no model directory {own}" in done.stderr.splitlines()[-1]
    assert nodes.left() == before


def test_a_second_deploy_makes_no_second_set_and_delete_leaves_nothing(nodes: Nodes, pair: Server) -> None:
    before = nodes.left()
    settings = {"model": str(DEMO_MODEL), "served_model_name": "demo", "dtype": "float32", "kv_memory": "8MiB"}
    lease = f"deployed-{Config(**settings | {'kv_memory': 8 << 20}).digest}"  # type: ignore[arg-type]
    nodes.ask("deploy", "deployed", settings)
    while len((first := nodes.left())["workers"]) <= len(before["workers"]):
        time.sleep(0.1)  # deployed is not yet placed
    assert set(first["actors"]) - set(before["actors"]) == {f"{lease}/engine-0", f"{lease}/scheduler"}
    pids = sorted(nodes.processes("ray::SchedulerActor") + nodes.processes("ray::EngineActor"))
    client = openai.OpenAI(base_url=f"{pair.url}/deployed/v1", api_key="none", max_retries=0)
    stream: Any = client.completions.create(model="demo", prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    with client, concurrent.futures.ThreadPoolExecutor(1) as reader:
        chunks = reader.submit(list, stream)
        nodes.ask("deploy", "deployed", {**settings, "served_model_name": "again"})
        assert chunks.result(timeout=60)[-1].choices[0].finish_reason == "length", "a redeploy cuts no stream"
    assert nodes.left()["actors"] == first["actors"]
    assert sorted(nodes.processes("ray::SchedulerActor") + nodes.processes("ray::EngineActor")) == pids
    nodes.ask("deploy", "deployed", {**settings, "max_num_seqs": 3})
    assert len(set(nodes.left()["actors"]) - set(first["actors"])) == 2, "other settings have a set of their own"
    nodes.ask("delete", "deployed")
    nodes.wait_until_left(before)


def test_ctrl_c_under_a_stream_is_quick_and_leaves_nothing(nodes: Nodes, pair: Server) -> None:
    stream: Any = pair.client.completions.create(
        model="demo", prompt="x", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    os.killpg(pair.process.pid, signal.SIGINT)
    assert pair.process.wait(20) == 0, pair.log.read_text()
    pair.client.close()
    nodes.wait_until_left(NOTHING, timeout_s=5.0)
    assert nodes.processes("ray::Worker") == nodes.processes("ray::EngineActor") == nodes.processes("ray::Serve") == []
