"""Two nodes with addresses of their own, in network namespaces: what works on one machine's loopback only fails here.

Needs root. Creates and removes namespaces of unique names, and ends only processes that it started.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster.config import from_mapping
from cluster.reconcile import namespace_of
from cluster.scheduler import SchedulerConfig
from tests.serve.nodes import Nodes, end_marked, marked, wait_for

ROOT = Path(__file__).parents[2]

MARK = "RAYLINE_TEST_NETNS"
HEAD, OTHER = "10.213.0.1", "10.213.0.2"
OURS = ("ray::Worker", "ray::EngineActor", "ray::SchedulerActor", "ray::ServeReplica")


def why_not() -> str:
    """Why network namespaces can't be had here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"rayline-{os.getpid()}-try"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        subprocess.run(["ip", "netns", "delete", name], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"ip netns does not work: {error}"
    return ""


pytestmark = [pytest.mark.serve, pytest.mark.chaos, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@dataclass
class Net:
    """Two namespaces and the Ray cluster over them."""

    names: tuple[str, str]
    directory: Path
    environment: dict[str, str]

    def inside(self, side: int, *words: str) -> list[str]:
        """A command as run in a namespace. Each side has a directory of its own as Ray's."""
        own = self.directory / str(side)
        own.mkdir(exist_ok=True)
        shell = 'mount --bind "$0" /tmp/ray && exec "$@"'
        return ["ip", "netns", "exec", self.names[side], "sh", "-c", shell, str(own), *words]

    def run(self, side: int, *words: str) -> str:
        """Standard output of a command that succeeds."""
        done = subprocess.run(
            self.inside(side, *words), env=self.environment, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ours(self, side: int) -> dict[int, str]:
        """Ids and titles of processes in that namespace that belong to an application."""
        namespace = os.stat(f"/run/netns/{self.names[side]}").st_ino
        found = {}
        for pid in marked(f"{MARK}={os.getpid()}"):
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                if title.startswith(OURS) and os.stat(f"/proc/{pid}/ns/net").st_ino == namespace:
                    found[pid] = title
            except OSError:
                pass
        return found


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    first, second = names = (f"rayline-{os.getpid()}-a", f"rayline-{os.getpid()}-b")
    bin = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        MARK: str(os.getpid()),
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{bin}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("RAY_ADDRESS", None)
    Path("/tmp/ray").mkdir(exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "veth0", "netns", first, "type", "veth", "peer", "name", "veth0", "netns", second)
        for name, address in zip(names, (HEAD, OTHER), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            for device in ("veth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        made = Net(names, tmp_path, environment)
        node = ("ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats")
        head = (*node, "--head", f"--node-ip-address={HEAD}", "--port=6379")
        other = (*node, f"--address={HEAD}:6379", f"--node-ip-address={OTHER}")
        for side, command in enumerate((head, other)):
            with (tmp_path / f"log{side}").open("wb") as log:
                process = subprocess.Popen(
                    made.inside(side, *command), env=environment, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
                )
            started.append(process)
            if side == 0:
                wait_for_port(made)
        yield made
    finally:
        for process in reversed(started):
            process.terminate()
        end = time.monotonic() + 10
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            time.sleep(0.1)
        end_marked(f"{MARK}={os.getpid()}")
        for process in started:
            process.wait(10)
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def wait_for_port(net: Net, timeout_s: float = 60.0) -> None:
    """Until the head answers, dashboard included."""
    probe = "import socket, sys; socket.create_connection((sys.argv[1], 6379), 1); socket.create_connection(('127.0.0.1', 8265), 1)"
    end = time.monotonic() + timeout_s
    command = net.inside(0, sys.executable, "-c", probe, HEAD)
    while subprocess.run(command, check=False, capture_output=True).returncode != 0:
        assert time.monotonic() < end, (net.directory / "log0").read_text()
        time.sleep(0.5)


CLIENT = """
import json, sys, time, urllib.request
url = sys.argv[1]
end = time.monotonic() + 120
seen = b""
while b'"ready":' + sys.argv[2].encode() not in seen:
    if time.monotonic() > end:
        sys.exit(f"not ready: {seen}")
    time.sleep(0.2)
    try:
        seen = urllib.request.urlopen(url + "/health", timeout=5).read()
    except OSError as error:
        seen = str(error).encode()
body = {"model": "demo", "prompt": "def main(", "max_tokens": 50, "temperature": 0, "stream": True}
body |= {"ignore_eos": True, "return_token_ids": True}
request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
tokens = []
for line in urllib.request.urlopen(request, timeout=60):
    if line.startswith(b"data: {"):
        tokens += json.loads(line[6:])["choices"][0]["token_ids"]
print(json.dumps(tokens))
"""


def test_deploy_over_two_nodes_and_delete_leaves_nothing(net: Net) -> None:
    """deploy/serve.yaml with two engines, one on each node; the same again; with one engine that has a rank on each node, tensor-
    parallel and as two stages. Each time its tokens come from nobody but the set of the settings that were deployed."""
    config = yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())
    (application,) = config["applications"]
    given = {**application["args"], "dtype": "float32", "kv_memory": "8MiB"}
    file = net.directory / "serve.yaml"
    answers = []

    def deploy(ready: int, **changes: object) -> None:
        before = routers(net)
        application["args"] = {**given, **changes}
        file.write_text(yaml.safe_dump(config))
        net.run(0, "serve", "deploy", str(file))
        wanted = namespace_of(application["name"], from_mapping(application["args"]))
        wait_for(lambda: len(routers(net)) == 1 and not routers(net) & before)
        wait_for(lambda: {actor.partition("/")[0] for actor in nodes.left()["actors"]} == {wanted})
        url = f"http://{HEAD}:{config['http_options']['port']}"
        answers.append(json.loads(net.run(1, sys.executable, "-c", CLIENT, url, str(ready))))
        assert workers(net) == [1, 1]

    with Nodes(net.directory, address=f"{HEAD}:6379", prefix=net.inside(0)) as nodes:
        wait_for(lambda: nodes.ask("alive") == [HEAD, OTHER])
        deploy(2, engines=2)
        first = nodes.left()
        assert (len(first["actors"]), len(first["groups"])) == (3, 2)

        deploy(2, engines=2, request_timeout_s=500)
        end = time.monotonic() + SchedulerConfig().leave_s + 3  # the first router's goodbye must have ended nothing
        while time.monotonic() < end:
            assert nodes.left() == first
            time.sleep(0.5)

        for changes in ({"tp": 2}, {"pp": 2}):
            deploy(1, **changes)
            found = nodes.left()
            assert (len(found["actors"]), len(found["groups"])) == (2, 1)
        assert [len(answer) for answer in answers] == [50] * 4
        assert len({tuple(answer) for answer in answers}) == 1, "greedy in fp32: the same whatever it ran on"

        nodes.ask("delete", application["name"])
        nodes.wait_until_left({"actors": [], "groups": [], "workers": []})
        wait_for(lambda: not net.ours(0) | net.ours(1), 10)


def workers(net: Net) -> list[int]:
    """How many run on each side."""
    return [sum(title.startswith("ray::Worker") for title in net.ours(side).values()) for side in (0, 1)]


def routers(net: Net) -> set[int]:
    """Their process ids."""
    return {pid for pid, title in (net.ours(0) | net.ours(1)).items() if title.startswith("ray::ServeReplica")}
