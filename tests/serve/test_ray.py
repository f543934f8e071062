"""Ray itself: one that the server starts is closed to strangers, one that is there already is used as it is."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import STOP_TIMEOUT_S, Server, start_server
from tests.serve.nodes import free_ports

pytestmark = pytest.mark.serve


def contents(pid: int, name: str) -> bytes:
    """A file that the kernel keeps of a process; empty of one that has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def settings(pid: int) -> dict[str, str]:
    """A process's environment when it was started; nothing of one that has ended."""
    pairs = contents(pid, "environ").decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def complete(server: Server) -> str:
    """A short answer."""
    return server.client.completions.create(model="demo", prompt="def ", max_tokens=4, temperature=0).choices[0].text


def test_a_ray_of_our_own_wants_a_token(server: Server) -> None:
    """All of Ray's processes inherit it from the server; what Ray does with a token is Ray's to test."""
    found = {pid: settings(pid) for pid in server.processes() if pid != server.process.pid}
    # A process that changes its title writes over its environment: what can still be read of it may be a part.
    rays = {pid: named for pid, named in found.items() if "RAY_AUTH_TOKEN" in named}
    assert len(rays) > 2
    (token,) = {named["RAY_AUTH_TOKEN"] for named in rays.values() if len(named["RAY_AUTH_TOKEN"]) == 64}
    assert len(token) == 64
    (gcs,) = [named for pid, named in rays.items() if b"gcs_server" in contents(pid, "cmdline")]
    assert gcs["RAY_AUTH_MODE"] == "token"


def test_mailboxes_count_what_they_drop_and_refuse(server: Server) -> None:
    processes = {"router", "scheduler", "engine-0"}
    refused = re.compile(r'rayline:connections_refused_total{model_name="demo",process="(.*?)"} 0\.0')
    dropped = re.compile(r'rayline:messages_dropped_total{direction="(in|out)",model_name="demo",process="(.*?)"}')
    end = time.monotonic() + 10
    while True:  # the first totals come with heartbeats
        counted = server.request("/metrics")[2].decode()
        if set(refused.findall(counted)) == processes and len(dropped.findall(counted)) == 2 * len(processes):
            return
        assert time.monotonic() < end, counted
        time.sleep(0.2)


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A plain `ray start --head`, without authentication; its address is in RAY_ADDRESS."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    port, client_port, agent_port = free_ports(3)
    address = f"127.0.0.1:{port}"
    words = ["--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"]
    words += [f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}"]
    log = tmp_path / "ray"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words]
        running = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while b"Ray runtime started" not in log.read_bytes():
            assert running.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield address
    finally:
        running.terminate()
        try:
            running.wait(STOP_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def test_a_plain_ray_that_is_there_is_used_and_left_running(head: str, tmp_path: Path) -> None:
    server = start_server(tmp_path / "log", "--threads", "1", "--kv-memory", "8MiB")
    try:
        assert complete(server)
    finally:
        status = server.stop()
    assert status == 0, server.log.read_text()
    look = f"import ray; ray.init({head!r}, logging_level=40); print(len(ray.nodes()), ray.util.list_named_actors(True))"
    seen = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True).stdout
    assert seen.startswith("1 ")
    assert "rayline" not in seen
