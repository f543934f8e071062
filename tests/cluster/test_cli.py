"""The command line: one clear line and exit code 2 for whatever the user can mend, before anything is started."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import protect_ray, resolve
from cluster.config import ConfigError
from cluster.model import DEMO_MODEL


def rayline(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "cluster.cli", *words], capture_output=True, text=True, timeout=120, check=False)


def refused(*words: str) -> str:
    """The one line that says why."""
    done = rayline(*words)
    assert done.returncode == 2, done.stderr
    assert done.stdout in ("", "starting m ...\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("rayline: ")
    return line


def test_a_ray_of_our_own_gets_a_token_and_what_the_user_chose_stays() -> None:
    fresh: dict[str, str] = {}
    protect_ray(fresh)
    another: dict[str, str] = {}
    protect_ray(another)
    assert fresh["RAY_AUTH_MODE"] == another["RAY_AUTH_MODE"] == "token"
    assert len(fresh["RAY_AUTH_TOKEN"]) == 64
    assert fresh["RAY_AUTH_TOKEN"] != another["RAY_AUTH_TOKEN"]
    for kept in (
        {"RAY_ADDRESS": "127.0.0.1:6379"},
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/a/file"},
    ):
        environ = dict(kept)
        protect_ray(environ)
        assert environ == kept


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo to break."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "m"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["--tp", "0"], "tp is 0"),
        (["--port", "0"], "port is 0"),
        (["--run-ahead", "on", "--tp", "2"], "run_ahead is for one rank"),
        (["--stage-layers", "3,x"], "stage_layers is '3,x'"),
        (["--pp", "2", "--stage-layers", "1,2,1"], "stage_layers names 3 stages, but pp is 2"),
        (["--name", "a b"], "name is 'a b'"),
        (["--dtype", "int3"], "int3"),
        (["--kv-memory", "much"], "much"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words: list[str], why: str) -> None:
    assert why in refused("serve", *words)


def test_a_taken_port_is_named(model: Path) -> None:
    with socket.socket() as taken, socket.socket() as free:
        for one in (taken, free):
            one.bind(("127.0.0.1", 0))
        taken.listen()
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        line = refused("serve", str(model), "--host", "127.0.0.1", "--port", str(other), "--grpc-port", str(port))
    assert f"port {port} (grpc_port; 0 does without gRPC)" in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_with_a_missing_file_is_refused(model: Path, name: str) -> None:
    (model / name).unlink()
    assert name.split(".")[-1] in refused("serve", str(model))


def test_a_model_of_an_unknown_architecture_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    assert "MambaForCausalLM" in refused("serve", str(model))


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"num_attention_heads": 0}, {"vocab_size": "many"}])
def test_a_config_that_makes_no_sense_is_refused(model: Path, change: dict[str, object]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    assert "config.json" in refused("serve", str(model))
    (model / "config.json").write_text("[]")
    assert "no JSON object" in refused("serve", str(model))


def test_heads_that_do_not_divide_are_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 3}))
    assert "3 key/value heads" in refused("serve", str(model))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tp", "5000"], "tp is 5000, but the model has only 8 heads"),
        (["--pp", "9"], "pp is 9, but the model has only 4 layers"),
        (["--pp", "2", "--stage-layers", "1,1"], "stage_layers is 1,1, but must be 2 numbers of at least 1 that add up to 4"),
    ],
)
def test_a_division_that_the_model_does_not_allow_is_refused(words: list[str], why: str) -> None:
    assert why in refused("serve", str(DEMO_MODEL), *words)


def test_a_truncated_checkpoint_is_refused(model: Path) -> None:
    os.truncate(model / "model.safetensors", 1000)
    assert "model.safetensors" in refused("generate", str(model), "--prompt", "x")


def test_generate_writes_prompt_and_continuation() -> None:
    done = rayline("generate", "--prompt", "def main(", "--max-tokens", "8", "--threads", "1", "--kv-memory", "8MiB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main(")
    assert len(done.stdout) > len("def main(\n")


def test_generate_keeps_keys_and_values_in_fewer_bits() -> None:
    words = ["generate", "--prompt", "import os", "--max-tokens", "8", "--threads", "1", "--kv-memory", "8MiB"]
    done, usual = rayline(*words, "--kv-dtype", "int8"), rayline(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == usual.stdout
    assert "'int7' is not one of" in refused(*words, "--kv-dtype", "int7")


def test_generate_ends_no_sooner_than_min_tokens() -> None:
    """With these stop strings every text ends at its first letter, unless something forbids it."""
    words = ["generate", "--prompt", "import os", "--max-tokens", "12", "--threads", "1", "--kv-memory", "8MiB"]
    stops = [word for letter in "abcdefghijklmnopqrstuvwxyz \n(_" for word in ("--stop", letter)]
    done = rayline(*words, *stops, "--min-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > len("import os\n") + 8
    assert "min_tokens is 13" in refused(*words, "--min-tokens", "13")


def test_file_and_command_line_use_the_same_names(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: here\nmax_num_seqs: 7\nkv_memory: 1GiB\n")
    config = resolve(None, str(file), {"max_num_seqs": 9, "port": None})
    assert (config.model, config.max_num_seqs, config.kv_memory, config.port) == ("here", 9, 1 << 30, 8000)
    file.write_text("modle: here\n")
    with pytest.raises(ConfigError, match="unknown setting 'modle'"):
        resolve(None, str(file), {})
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="name: value"):
        resolve(None, str(file), {})


def test_without_a_model_it_is_the_demo() -> None:
    config = resolve(None, None, {})
    assert (config.model, config.model_name) == (str(DEMO_MODEL), "demo")
    assert resolve("other/", None, {}).model_name == "other"
