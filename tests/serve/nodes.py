"""A Ray cluster of several nodes on this machine, in a process of its own that is told what to do line by line.

Run as a program it is that process: a JSON list [verb, argument ...] a line in, a JSON value a line out. It ends with its input.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MARK = "RAYLINE_TEST_NODES"
"""Environment variable that all processes of the cluster inherit."""


def free_ports(count: int) -> list[int]:
    """So many different ones, free on all addresses, below those that systems give out by themselves: there Ray takes many."""
    with contextlib.ExitStack() as probes:
        found: list[int] = []
        while len(found) < count:
            probe, port = probes.enter_context(socket.socket()), random.randint(20000, 30000)
            with contextlib.suppress(OSError):
                probe.bind(("0.0.0.0", port))
                found.append(port)
        return found


def marked(mark: str) -> list[int]:
    """Ids of all live processes that have NAME=VALUE in the environment they began with."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            pass  # gone meanwhile, or somebody else's
    return found


def end_marked(mark: str) -> None:
    """Kill all of them, and those that they start meanwhile."""
    while left := marked(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def wait_for(reached: Callable[[], bool], timeout_s: float = 120.0) -> float:
    """Seconds until it was."""
    began = time.monotonic()
    while not reached():
        assert time.monotonic() < began + timeout_s
        time.sleep(0.1)
    return time.monotonic() - began


class Nodes:
    """Starts the cluster and speaks to its process."""

    def __init__(self, directory: Path, cpus: Sequence[int] = (), address: str = "", prefix: Sequence[str] = ()) -> None:
        """One node for each number in `cpus`, the first being the head. Or a driver on the cluster at `address`, for the verbs that
        ask only. `prefix`: of the command that starts the process."""
        self.mark = f"{MARK}={os.getpid()}-{directory.name}"
        self.log = directory / "log"
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value, "RAY_AUTH_MODE": "disabled"}
        environment.pop("RAY_ADDRESS", None)
        with self.log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.serve.nodes", *([address] if address else map(str, cpus))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
                text=True,
            )
        self.environment = {"RAY_ADDRESS": str(self._answer()), "RAY_AUTH_MODE": "disabled"}

    def ask(self, verb: str, *arguments: Any) -> Any:
        """Have the cluster's process do something; its answer. See Cluster below."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def left(self) -> dict[str, list[str]]:
        """Named actors, placement groups and workers that are there."""
        found: dict[str, list[str]] = self.ask("left")
        return found

    def wait_until_left(self, wanted: dict[str, list[str]], timeout_s: float = 30.0) -> None:
        """Until left() is `wanted`."""
        end = time.monotonic() + timeout_s
        while (found := self.left()) != wanted:
            assert time.monotonic() < end, f"left are {found}, not {wanted}"
            time.sleep(0.2)

    def processes(self, title: str) -> list[int]:
        """Ids of processes of the cluster whose title (Ray sets it to the actor's class) begins with `title`."""
        found = []
        for pid in marked(self.mark):
            try:
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                    found.append(pid)
            except OSError:
                pass
        return found

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            end_marked(self.mark)
            self._process.wait()
            raise
        finally:
            self._process.stdout.close()


class Driver:
    """The other side, on a cluster that runs: each public method is a verb."""

    def __init__(self, address: str) -> None:
        import ray

        self.address = address
        ray.init(address=address, namespace="tests", logging_level="ERROR", log_to_driver=False)

    def alive(self) -> list[str]:
        """Addresses of the nodes."""
        import ray

        return sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])

    def left(self) -> dict[str, list[str]]:
        """What exists of ours: Serve's own actors and what has ended don't count."""
        import ray
        from ray.util.placement_group import placement_group_table

        named = ray.util.list_named_actors(all_namespaces=True)
        actors = [f"{actor['namespace']}/{actor['name']}" for actor in named if actor["namespace"] != "serve"]
        groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
        workers = [
            str(actor["Pid"])
            for actor in ray._private.state.actors().values()
            if actor["ActorClassName"] == "Worker" and actor["State"] != "DEAD"
        ]
        return {"actors": sorted(actors), "groups": sorted(groups), "workers": sorted(workers)}

    def kill(self, actor: str) -> None:
        """Of a named actor (as left() tells it), for good."""
        import ray

        namespace, _, name = actor.partition("/")
        ray.kill(ray.get_actor(name, namespace=namespace))

    def deploy(self, name: str, args: dict[str, Any]) -> None:
        """As `serve deploy` does with a YAML file's application of that name."""
        from ray import serve

        from router.app import build

        serve.run(build(args), name=name, route_prefix=f"/{name}")

    def delete(self, name: str) -> None:
        """As `serve delete`."""
        from ray import serve

        serve.delete(name)

    def end(self) -> None:
        """Of the driver."""
        import ray

        ray.shutdown()


class Cluster(Driver):
    """The same on a cluster of its own."""

    def __init__(self, cpus: list[int]) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        settings = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3, "health_check_timeout_ms": 1000}
        head = {"num_cpus": cpus[0], "gcs_server_port": free_ports(1)[0], "_system_config": settings, "include_dashboard": False}
        self._cluster = RayCluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(num_cpus=number) for number in cpus[1:]]
        super().__init__(self._cluster.address)

    def add(self, cpus: int) -> int:
        """Another node; its number."""
        self._nodes.append(self._cluster.add_node(num_cpus=cpus))
        return len(self._nodes) - 1

    def on(self, number: int) -> list[str]:
        """Classes of the actors that live on a node."""
        import ray

        node = self._nodes[number].node_id
        actors = ray._private.state.actors().values()
        return sorted(a["ActorClassName"] for a in actors if a["State"] == "ALIVE" and a["Address"]["NodeID"] == node)

    def remove(self, number: int) -> None:
        """Let a node (not the head) die without a word."""
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)

    def end(self) -> None:
        """Of all nodes."""
        super().end()
        self._cluster.shutdown()


def main() -> None:
    """The program. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cluster = Driver(sys.argv[1]) if ":" in sys.argv[1] else Cluster([int(word) for word in sys.argv[1:]])
    print(json.dumps(cluster.address), file=answers, flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(getattr(cluster, verb)(*arguments)), file=answers, flush=True)
    cluster.end()


if __name__ == "__main__":
    main()
