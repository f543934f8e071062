"""Starting and ending a served model on Ray: the detached scheduler and engines, and the router in front of them."""

import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import ray
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.schema import LoggingConfig

from cluster.actors import EngineActor, SchedulerActor, end_actors
from cluster.config import Config, ConfigError
from cluster.engine import LOAD_FAILED

APPLICATION = "rayline"
NAMESPACE = "rayline"
_ACTOR_TIMEOUT_S = 60.0


def ensure_cluster(config: Config) -> tuple[str, str]:
    """Find the application's scheduler and engines, or start them; returns the scheduler's address and the mailboxes' secret.

    Does not wait for engines to load: until one has, requests queue and /health says 503.
    """
    # Zero CPUs of Ray's accounting: these actors wait for messages most of the time, and must never be queued behind work.
    always = {"num_cpus": 0, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    scheduler = (
        ray.remote(SchedulerActor)
        .options(name="scheduler", max_restarts=-1, **always)
        .remote(config, _free_port(), NAMESPACE, secrets.token_hex())
    )
    address, secret = ray.get([scheduler.address.remote(), scheduler.secret.remote()], timeout=_ACTOR_TIMEOUT_S)
    for number in range(config.engines):
        name = f"engine-{number}"
        ray.remote(EngineActor).options(name=name, max_restarts=-1, **always).remote(config, name, address, secret)
    return address, secret


@contextmanager
def served(config: Config, stop: threading.Event) -> Iterator[str]:
    """Serve `config.model` over HTTP and gRPC while the context lasts; yields HTTP's base URL. SIGINT and SIGTERM set `stop`.

    Uses the Ray cluster that RAY_ADDRESS names, else starts one on this machine (authenticated as protect_ray() says, if it was
    called before Ray was imported). Raises ConfigError where a port is taken.
    """
    _check_port(config.host, config.port)
    if config.grpc_port:
        _check_port("0.0.0.0", config.grpc_port, " (grpc_port; 0 does without gRPC)")
    ours = "RAY_ADDRESS" not in os.environ
    _stop_on_signals(stop)
    ray.init(
        address="local" if ours else None,
        namespace=NAMESPACE,
        include_dashboard=False if ours else None,
        logging_level=logging.WARNING,
    )
    _stop_on_signals(stop)  # ray.init puts a handler of its own in the place of SIGTERM's
    try:
        from router.app import application

        scheduler, secret = ensure_cluster(config)
        _go_on(stop)
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        where = "HeadOnly" if ours else "EveryNode"
        services = ["router.grpc_proxy.add_services"]
        grpc = gRPCOptions(port=config.grpc_port, grpc_servicer_functions=services) if config.grpc_port else None
        serve.start(where, {"host": config.host, "port": config.port}, grpc_options=grpc, logging_config=quiet)
        _go_on(stop)
        serve.run(application(config, scheduler, secret), name=APPLICATION, route_prefix="/", logging_config=quiet)
        host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
        yield f"http://{host}:{config.port}"
    finally:
        try:
            if ours:
                serve.shutdown()
            else:
                serve.delete(APPLICATION)
            end_actors(NAMESPACE)
        finally:
            ray.shutdown()


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
            last = str(json.loads(error.read()).get("reason"))
            if LOAD_FAILED in last:
                raise ConfigError(last) from None
        except OSError as error:
            last = str(error)
        stop.wait(0.1)
    if not stop.is_set():
        raise ConfigError(f"not healthy after {timeout_s:.0f} s: {last}")


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


def _check_port(host: str, port: int, hint: str = "") -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}{hint}: {error.strerror}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
