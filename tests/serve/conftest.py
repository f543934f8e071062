"""One served demo model for all tests that need Ray: started by the command that users start it by, on a free port."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.model import DEMO_MODEL
from router.client import Client
from tests.serve.nodes import Nodes, free_ports, marked

START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60
MARK = "RAYLINE_TEST_SERVER"
"""Environment variable that all processes of a server inherit: its port."""


@dataclass
class Server:
    """A running `rayline serve`."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path
    grpc_port: int

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        """To be closed by the caller."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def grpc_client(self) -> Client:
        """To be closed by the caller."""
        return Client(f"127.0.0.1:{self.grpc_port}", timeout_s=120)

    def request(self, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a GET, or of a POST of JSON."""
        request = urllib.request.Request(self.url + path, data=body, headers={"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """(status, decoded answer) of a POST."""
        status, _, content = self.request(path, json.dumps(body).encode())
        return status, json.loads(content)

    def gauge(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.request("/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def wait_for(self, name: str, value: float, timeout_s: float = 30) -> None:
        """Until a metric has a value. Metrics follow with the next heartbeat."""
        self._wait(name, lambda seen: seen == value, f"not {value}", timeout_s)

    def wait_for_at_least(self, name: str, value: float, timeout_s: float = 30) -> None:
        """Until a counter has grown to a value; what earlier requests counted may still be on its way."""
        self._wait(name, lambda seen: seen >= value, f"not {value} or more", timeout_s)

    def _wait(self, name: str, reached: Callable[[float], bool], wanted: str, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while not reached(seen := self.gauge(name)):
            assert time.monotonic() < end, f"{name} is {seen}, {wanted}"
            time.sleep(0.1)

    def is_healthy(self) -> bool:
        """Whether /health says so; a proxy that is just starting may close the connection half-way."""
        try:
            return self.request("/health")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def processes(self) -> list[int]:
        """Ids of all live processes that this server started, itself included."""
        return marked(f"{MARK}={urllib.parse.urlsplit(self.url).port}")

    def stop(self) -> int:
        """Ctrl-C, as a terminal sends it; the exit status."""
        self.client.close()
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_TIMEOUT_S)


def start_server(log: Path, *options: str, nodes: Nodes | None = None, port: int = 0, prefix: str = "") -> Server:
    """`rayline serve` with `options`, ready to answer. On a cluster of its own, or on `nodes`; at a free port, or at `port`."""
    free, grpc_port = free_ports(2)
    port = port or free
    command = [sys.executable, "-m", "cluster.cli", "serve", *options, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--grpc-port", str(grpc_port)]
    mark = {**os.environ, MARK: str(port)}
    if nodes is not None:
        mark |= nodes.environment
    if "--threads" not in options:  # more of them wait for each other on a machine that others use
        command += ["--threads", "1"]
    if prefix:
        command += ["--route-prefix", prefix]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=mark)
    server = Server(process, f"http://127.0.0.1:{port}{prefix}", log, grpc_port)
    end = time.monotonic() + START_TIMEOUT_S
    try:
        while not server.is_healthy():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, f"not healthy after {START_TIMEOUT_S} s:\n{log.read_text()}"
            time.sleep(0.2)
    except BaseException:  # the next test should not find it
        if process.poll() is None:
            server.stop()
        raise
    return server


@pytest.fixture(scope="session", params=["haproxy", "serve"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Behind either proxy the demo in fp32, behind one of them with speculation. The pool has 100 blocks, fewer than 64 streams
    need, so that preemption is part of the game."""
    log = tmp_path_factory.mktemp("serve") / "log"
    kv_memory = 101 * 16 * 4 * 2 * 4 * 4 * 32  # blocks x block_size x layers x (K, V) x bytes x kv_heads x head_dim
    words = [str(DEMO_MODEL), "--served-model-name", "demo", "--dtype", "float32", "--kv-memory", str(kv_memory)]
    others = {"haproxy": ["--haproxy", "on"], "serve": ["--haproxy", "off", "--speculative", "lookup"]}
    running = start_server(log, *words, *others[request.param])
    yield running
    if running.process.poll() is None:
        assert running.stop() == 0, log.read_text()


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A Ray cluster of three nodes with two CPUs each, all on this machine."""
    with Nodes(tmp_path_factory.mktemp("nodes"), [2, 2, 2]) as running:
        yield running
