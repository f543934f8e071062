"""`ray up` from one end to the other on this machine: the commands of deploy/ray/aws.yaml, with Ray's fake multi-node provider."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_configs import login_path
from tests.serve.nodes import end_marked, free_ports

pytestmark = pytest.mark.serve

ROOT = Path(__file__).parents[2]
MARK = "RAYLINE_TEST_RAY_UP"
UP_S = 120
WORKER_S = 120

# Prints the number of live nodes once it is 2, or after the time it is given, and what only the worker has.
LOOK = """
import sys, time, ray
ray.init(sys.argv[1], logging_level=40, log_to_driver=False)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end and sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
print(sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources().get("fake"))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """HOME of all that the test starts. Its path is short, as Ray's sockets want it; its processes end with it."""
    path = Path(tempfile.mkdtemp(prefix="ray-up-"))
    try:
        yield path
    finally:
        end_marked(f"{MARK}={path}")
        shutil.rmtree(path)


def fake(config: dict[str, Any], home: Path, port: int) -> dict[str, Any]:
    """A cloud's cluster on this machine: other nodes and ports, the same files and commands."""
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    for ours, here in (
        ("/opt/rayline", str(ROOT)),
        ("--port=6379", f"--port={port} --num-cpus=1 --temp-dir={home}/ray --include-dashboard=false"),
        (
            "--object-manager-port=8076",
            " ".join(f"--{name}={number}" for name, number in zip(PORTS, free_ports(len(PORTS)), strict=True)),
        ),
    ):
        assert ours in start
        start = start.replace(ours, here)
    provider = {"type": "external", "module": "tests.deploy.fake_provider.Provider", "use_node_id_as_ip": True}
    types = {
        "ray.head.default": {"node_config": {}, "resources": {"CPU": 1}},
        "worker": {"node_config": {}, "resources": {"CPU": 1, "fake": 1}, "min_workers": 1, "max_workers": 1},
    }
    return {
        "cluster_name": config["cluster_name"],
        "max_workers": 1,
        "provider": {**provider, "gcs_address": f"127.0.0.1:{port}"},
        "head_node_type": "ray.head.default",
        "available_node_types": types,
        "file_mounts": {there: here.replace("~", str(home / "user")) for there, here in config["file_mounts"].items()},
        "setup_commands": config["setup_commands"],
        "head_start_ray_commands": [start],
        "worker_start_ray_commands": [],
        **{
            name: [] for name in ("head_setup_commands", "worker_setup_commands", "initialization_commands", "cluster_synced_files")
        },
        "auth": {},
        "docker": {},
        "idle_timeout_minutes": 5,
        "upscaling_speed": 1.0,
    }


PORTS = ("ray-client-server-port", "dashboard-agent-listen-port", "object-manager-port")


def test_ray_up_starts_a_head_which_starts_a_worker(home: Path) -> None:
    (port,), token = free_ports(1), "0123456789abcdef" * 4
    config = fake(yaml.safe_load((ROOT / "deploy/ray/aws.yaml").read_text()), home, port)
    (home / "user/.ray").mkdir(parents=True)
    (home / "user/.ray/auth_token").write_text(token)  # the user's; the nodes get it by file_mounts
    commands = Path(sys.executable).parent
    (home / ".bash_profile").write_text(login_path().replace("/opt/venv/bin", str(commands)))  # for the image's /etc/profile.d
    (home / "cluster.yaml").write_text(yaml.safe_dump(config))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {
        MARK: str(home),
        "HOME": str(home),
        "PATH": f"{commands}:{environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAYLINE_FAKE_HEAD": str(home / "head.json"),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 51 + "0" * 5,
        "RAY_UP_enable_autoscaler_v2": "0",
        "RAY_enable_autoscaler_v2": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_agent_register_timeout_ms": "120000",  # a node takes its time on a busy machine
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "up", "--yes", "--no-config-cache", str(home / "cluster.yaml")]
    log = home / "log"
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environ, timeout=UP_S, check=False)
    assert done.returncode == 0, log.read_text()
    assert (home / ".ray/auth_token").read_text() == token
    assert "RAY_AUTH_MODE=token" in (home / ".bashrc").read_text()

    look = [sys.executable, "-c", LOOK, f"127.0.0.1:{port}", str(WORKER_S)]
    client = {name: value for name, value in environ.items() if name != "RAY_OVERRIDE_NODE_ID_FOR_TESTING"}
    client["RAY_AUTH_MODE"] = "token"
    seen = subprocess.run(look, capture_output=True, text=True, env=client, timeout=WORKER_S + 60, check=False)
    assert seen.stdout.split() == ["2", "1.0"], seen.stderr + log.read_text()
