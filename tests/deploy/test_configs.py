"""What stands under deploy/ is read by the code that will read it, Ray's schemas and our settings; pods and the image by shape."""

import os
import re
import shlex
import subprocess
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import Config, from_mapping
from cluster.model import DEMO_MODEL, open_model

with warnings.catch_warnings():  # Ray Serve's own
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema


ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PORT = 8000


def loaded(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(path.read_text())
    return read


def service() -> dict[str, Any]:
    return loaded(DEPLOY / "kuberay/rayservice.yaml")


def applications() -> list[dict[str, Any]]:
    return [loaded(DEPLOY / "serve.yaml"), yaml.safe_load(service()["spec"]["serveConfigV2"])]


@pytest.mark.parametrize("config", applications(), ids=["serve.yaml", "rayservice.yaml"])
def test_serve_takes_what_is_deployed_and_its_arguments_are_settings(config: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.name == "rayline"
    assert (application.import_path, application.route_prefix) == ("router.app:build", "/")
    assert schema.http_options.port == PORT
    settings = from_mapping(application.args)
    assert settings.model_name == "demo"
    assert open_model(str(ROOT / settings.model), None).path == DEMO_MODEL


def test_both_files_deploy_the_same() -> None:
    ours, kubernetes = applications()
    assert ours == kubernetes


def test_settings_that_stand_there_as_examples_exist() -> None:
    text = (DEPLOY / "serve.yaml").read_text()
    examples = {name: yaml.safe_load(value) for name, value in re.findall(r"^ {6}# ([a-z_]+): (\S+)$", text, re.MULTILINE)}
    assert set(examples) >= {"device", "tp", "pp", "engines"}
    for name, value in examples.items():
        from_mapping({"model": "m", name: value})


@pytest.mark.parametrize("path", sorted((DEPLOY / "ray").glob("*.yaml")), ids=lambda path: path.name)
def test_ray_up_takes_the_cluster(path: Path) -> None:
    config = prepare_config(loaded(path))
    validate_config(config)
    assert config["max_workers"] >= sum(kind["min_workers"] for kind in config["available_node_types"].values()) >= 1
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for role in ("head", "worker"):
        (start,) = [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start, "a node without would be open to all, or could not join"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"]), "for what is run there by hand"


def test_clouds_start_the_image() -> None:
    """In it, what a node runs lies where the Dockerfile puts it."""
    (home,) = re.findall(r"^WORKDIR (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for name in ("aws", "gcp"):
        config = loaded(DEPLOY / f"ray/{name}.yaml")
        for role in ("head", "worker"):
            (start,) = [command for command in config[f"{role}_start_ray_commands"] if "ray start" in command]
            assert f"cd {home} && " in start
        assert {config["docker"]["head_image"], config["docker"]["worker_image"]} <= images()
    pods = service()["spec"]["rayClusterConfig"]
    groups = [pods["headGroupSpec"], *pods["workerGroupSpecs"]]
    assert {group["template"]["spec"]["containers"][0]["image"] for group in groups} <= images()


def images() -> set[str]:
    """What the Dockerfile says it is built as, in the registry that the files name in a registry's place."""
    tags = re.findall(r"docker build .*-t (\S+)", (DEPLOY / "Dockerfile").read_text())
    return {f"registry.example.com/{tag}" for tag in tags}


def test_the_service_is_one_that_kuberay_takes() -> None:
    """By its reference: the fields that stand there, and a token for Ray."""
    file = service()
    assert (file["apiVersion"], file["kind"]) == ("ray.io/v1", "RayService")
    assert set(file["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = file["spec"]["rayClusterConfig"]
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) == {"rayStartParams", "template"}
    assert set(workers) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert set(container) == {"name", "image", "ports", "resources"}
        assert PORT in [port["containerPort"] for port in container["ports"]]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"], "or Ray counts cores and memory that others may take"
        assert int(limits["cpu"]) >= 1
        assert re.fullmatch(r"\d+Gi", limits["memory"])


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined, comments dropped."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines()]


def copied() -> set[str]:
    sources = set()
    for name, rest in instructions():
        if name == "COPY":
            *words, _ = [word for word in shlex.split(rest) if not word.startswith("--")]
            sources |= set(words)
    return sources


def test_the_image_holds_all_packages_and_its_sources_exist() -> None:
    known = {"ARG", "FROM", "RUN", "USER", "ENV", "WORKDIR", "COPY", "EXPOSE", "CMD"}
    assert {name for name, _ in instructions()} <= known
    assert all((ROOT / source).exists() for source in copied())
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {name.split(".")[0] for name in pyproject["tool"]["setuptools"]["packages"]} | {"deploy"} <= copied()


def login_path() -> str:
    """What the image's login shells are told of PATH, last of all."""
    (line,) = [rest for name, rest in instructions() if name == "RUN" and "/etc/profile.d/" in rest]
    found = re.fullmatch(r"echo '(PATH=\S+)' > /etc/profile\.d/\w+\.sh", line)
    assert found is not None, line
    return found[1]


def test_a_login_shell_finds_what_the_image_holds(tmp_path: Path) -> None:
    """That is what `ray up` runs every command in; Debian's /etc/profile sets PATH without asking what it was."""
    (venv,) = [words[-1] for name, rest in instructions() if name == "RUN" for words in re.findall(r"(-m venv) (\S+)", rest)]
    (path,) = re.findall(r"PATH=(\S+)", next(rest for name, rest in instructions() if name == "ENV" and "PATH=" in rest))
    assert path == f"{venv}/bin:$PATH"
    (tmp_path / ".bash_profile").write_text(login_path())
    command = ["bash", "-c", " ".join(_with_interactive("echo $PATH"))]
    environ = {"HOME": str(tmp_path), "PATH": os.defpath}
    shell = subprocess.run(
        command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, start_new_session=True
    )
    assert shell.stdout.strip().split(":")[0] == f"{venv}/bin"


def test_the_image_holds_what_ray_and_kuberay_run_in_it() -> None:
    """rsync and ps by `ray up`, wget by the probes that KubeRay's operator adds to pods, ssh by a head that starts workers."""
    (install,) = [rest for name, rest in instructions() if name == "RUN" and "apt-get install" in rest]
    assert {"bash", "openssh-client", "procps", "rsync", "wget"} <= set(install.split())


def test_the_image_names_the_ports_of_both_interfaces() -> None:
    (exposed,) = [rest.split() for name, rest in instructions() if name == "EXPOSE"]
    assert {str(Config("m").port), str(Config("m").grpc_port)} <= set(exposed)


def test_the_builder_is_given_what_is_copied_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied()


def test_the_image_is_built_for_cpus_or_cuda() -> None:
    arguments = dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")
    assert arguments["DEVICE"] == "cpu"
    (install,) = [rest for name, rest in instructions() if name == "RUN" and "--editable" in rest]
    (extra,) = re.findall(r'test "\$DEVICE" = cuda && echo \'\[(\w+)\]\'', install)
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    (python,) = [rest for name, rest in instructions() if name == "FROM"]
    assert python.startswith("python:${PYTHON}-")
    assert tuple(map(int, arguments["PYTHON"].split("."))) >= (3, 11)
