"""Ray's fake multi-node provider made whole for `ray up`: a head that is created, and commands that run on this machine.

Ray's own one makes workers that are processes here, but takes its head for granted and can't tag a node or run a command on it. The
head is remembered in the file that RAYLINE_FAKE_HEAD names: `ray up` creates it, the autoscaler on the head finds it.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

TIMEOUT_S = 120


class Here(CommandRunnerInterface):  # type: ignore[misc]
    """Runs commands in the words of Ray's own runners, that of containers among them: in a login shell that takes itself for
    interactive, with `~` where HOME says."""

    def run(self, cmd: str | None = None, environment_variables: Mapping[str, object] | None = None, **options: Any) -> str:
        """See CommandRunnerInterface. Raises subprocess.CalledProcessError with the output when the command fails."""
        if cmd is None:
            return ""
        given = environment_variables or {}
        environ = os.environ | {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
        words = ["bash", "-c", " ".join(_with_interactive(cmd))]
        done = subprocess.run(  # without the terminal, which an interactive shell would take for itself
            words,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            start_new_session=True,
        )
        print(f"$ {cmd}\n{done.stdout}{done.stderr}", flush=True)
        done.check_returncode()
        return done.stdout

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file to the node."""
        to = Path(target).expanduser()
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, to)

    def remote_shell_command_str(self) -> str:
        """Nothing to be seen there."""
        return "true"


class Provider(FakeMultiNodeProvider):  # type: ignore[misc]
    """What the cluster's YAML names as provider.module."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._head = Path(os.environ["RAYLINE_FAKE_HEAD"])
        self._nodes = {FAKE_HEAD_NODE_ID: {"tags": json.loads(self._head.read_text())}} if self._head.exists() else {}

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        """The head; workers come by create_node_with_resources_and_labels."""
        assert tags[TAG_RAY_NODE_KIND] == NODE_KIND_HEAD
        self._nodes[FAKE_HEAD_NODE_ID] = {"tags": {}}
        self.set_node_tags(FAKE_HEAD_NODE_ID, tags)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """As EC2 does."""
        with self.lock:
            self._nodes[node_id]["tags"].update(tags)
            if node_id == FAKE_HEAD_NODE_ID:
                self._head.write_text(json.dumps(self._nodes[node_id]["tags"]))

    def get_command_runner(self, *arguments: Any, **options: Any) -> Here:
        """One for all nodes: they are all here."""
        return Here()
