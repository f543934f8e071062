"""Starting and ending a served model on Ray: the detached scheduler and engines, and the router in front of them."""

import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.schema import LoggingConfig

from cluster.actors import end_actors
from cluster.bundles import cpus_needed
from cluster.config import Config, ConfigError
from cluster.engine import LOAD_FAILED
from cluster.finder import SCHEDULER, find_actor, leases_of
from cluster.reconcile import ensure_cluster, namespace_of

_SERVE_NAMESPACE = "serve"
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
_STOP_TIMEOUT_S = 60.0
_ANSWER_S = 10.0

log = logging.getLogger(__name__)


@contextmanager
def served(config: Config, stop: threading.Event) -> Iterator[str]:
    """Serve `config.model` over HTTP and gRPC while the context lasts; yields HTTP's base URL. SIGINT and SIGTERM set `stop`.

    Uses the Ray cluster that RAY_ADDRESS names, and its Serve proxies if they run, else starts one on this machine (authenticated
    as protect_ray() says, if it was called before Ray was imported). Raises ConfigError where a port is taken, or the name or route
    prefix by another application of that cluster.
    """
    ours = "RAY_ADDRESS" not in os.environ
    if ours:
        _check_ports(config)
    _stop_on_signals(stop)
    lease = namespace_of(config.name, config)
    ray.init(
        address="local" if ours else None,
        namespace=lease,
        include_dashboard=False if ours else None,
        logging_level=logging.WARNING,
        **(_local_resources(config) if ours else {}),
    )
    _stop_on_signals(stop)  # ray.init puts a handler of its own in the place of SIGTERM's
    found_serve = find_actor(_CONTROLLER, _SERVE_NAMESPACE) is not None
    deployed = False
    try:
        if not ours and not found_serve:
            _check_ports(config)
        _check_name(config, lease)
        from router.app import application

        deployed = True
        ensure_cluster(config, config.name)
        _go_on(stop)
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        where = "HeadOnly" if ours else "EveryNode"
        services = ["router.grpc_proxy.add_services"]
        grpc = gRPCOptions(port=config.grpc_port, grpc_servicer_functions=services) if config.grpc_port else None
        if not found_serve:
            serve.start(where, {"host": config.host, "port": config.port}, grpc_options=grpc, logging_config=quiet)
        _go_on(stop)
        try:
            serve.run(application(config), name=config.name, route_prefix=config.route_prefix, logging_config=quiet)
        except (serve.exceptions.RayServeException, ValueError, RuntimeError) as error:
            raise ConfigError(f"Serve does not take the application: {_last_line(error)}") from error
        yield _url(config)
    finally:
        try:
            if deployed:
                _end_application(config.name, lease)
            if not found_serve and not serve.status().applications:
                _end_serve()
        finally:
            ray.shutdown()


def _local_resources(config: Config) -> dict[str, Any]:
    """For a Ray of our own: CPUs for all ranks, however few the machine has. Where it has enough, Ray counts them itself."""
    needed = cpus_needed(config)
    return {"num_cpus": needed} if needed > ray._private.utils.get_num_cpus() else {}


def _check_name(config: Config, lease: str) -> None:
    """Raise ConfigError where the cluster serves something else by this name. The same is taken over: its owner may have died.

    What is left of others by this name, killed before Serve knew of them, is ended.
    """
    if config.name in serve.status().applications and find_actor(SCHEDULER, lease) is None:
        raise ConfigError(
            f"this cluster already serves an application called '{config.name}' with other settings: "
            "take another --name and --route-prefix, or end that one first"
        )
    for other in leases_of(config.name):
        if other != lease and config.name not in serve.status().applications:
            if _maker_lives(other):
                raise ConfigError(f"an application called '{config.name}' with other settings is just being started")
            end_actors(other)


def _maker_lives(lease: str) -> bool:
    """Whether the command that made the scheduler of this namespace still runs."""
    scheduler = find_actor(SCHEDULER, lease)
    if scheduler is None:
        return False
    try:
        maker = ray.get(scheduler.job.remote(), timeout=_ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):
        return False
    return any(job["JobID"] == maker and not job["IsDead"] for job in ray._private.state.jobs())


def _end_application(name: str, lease: str) -> None:
    """Streams that still run are ended; nothing of ours is left."""
    scheduler = find_actor(SCHEDULER, lease)
    if scheduler is not None:
        scheduler.stop.remote()
    try:
        if name in serve.status().applications:
            serve.delete(name)
    except TimeoutError as error:  # a replica that does not end; it finds its engines gone, and makes none anew
        log.warning("Serve still ends the application: %s", error)
    finally:
        end_actors(lease)


def _end_serve() -> None:
    """As serve.shutdown(), which reports the controller's end, its very purpose, as an error."""
    controller = find_actor(_CONTROLLER, _SERVE_NAMESPACE)
    if controller is None:
        return
    controller.graceful_shutdown.remote(False)  # its answer is not waited for: it may end before, and Ray would try again for long
    end = time.monotonic() + _STOP_TIMEOUT_S
    while find_actor(_CONTROLLER, _SERVE_NAMESPACE) is not None and time.monotonic() < end:
        time.sleep(0.1)


def _url(config: Config) -> str:
    """Of a proxy: this node's if it has one. The proxies' own host and port count, where they ran before."""
    options = serve.context._get_global_client().http_config
    proxies = serve.status().proxies
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    if options.host in ("0.0.0.0", "::") and ray.get_runtime_context().get_node_id() not in proxies:
        host = next((node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in proxies), host)
    return f"http://{host}:{options.port}{config.route_prefix.rstrip('/')}"


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def wait_until_healthy(url: str, timeout_s: float, stop: threading.Event) -> None:
    """Return when /health answers 200, or `stop` is set.

    Raises ConfigError with the reason when the workers could not load, which they would fail at again, and after `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < end and not stop.is_set():
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except urllib.error.HTTPError as error:
            last = _reason(error.read())
            if LOAD_FAILED in last:
                raise ConfigError(last) from None
        except OSError as error:
            last = str(error)
        stop.wait(0.1)
    if not stop.is_set():
        raise ConfigError(f"not healthy after {timeout_s:.0f} s: {last}")


def _reason(body: bytes) -> str:
    """Of an answer of /health; a proxy's own answers are plain text."""
    try:
        return str(json.loads(body)["reason"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:200] or "no reason given"


def _stop_on_signals(stop: threading.Event) -> None:
    """The first signal sets `stop`; the second ends this process at once, and the Ray processes that it started with it."""

    def stopping(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopping)


def _go_on(stop: threading.Event) -> None:
    if stop.is_set():
        raise KeyboardInterrupt


def _check_ports(config: Config) -> None:
    _check_port(config.host, config.port)
    if config.grpc_port:
        _check_port("0.0.0.0", config.grpc_port, " (grpc_port; 0 does without gRPC)")


def _check_port(host: str, port: int, hint: str = "") -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}{hint}: {error.strerror}") from None
