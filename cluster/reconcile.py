"""One set of scheduler and engines per application and settings: found where it exists, made where it does not."""

import dataclasses
import logging
import secrets
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors import EngineActor, SchedulerActor
from cluster.bundles import resource_of
from cluster.config import Config, ConfigError
from cluster.finder import SCHEDULER, find_actor, named_actors
from cluster.nodes import alive_nodes, has_gpus
from cluster.ports import free_ports

_ACTOR_TIMEOUT_S = 60.0
_CHECK_TIMEOUT_S = 30.0
_ATTEMPTS = 10

log = logging.getLogger(__name__)


def namespace_of(application: str, config: Config) -> str:
    """Ray's namespace of the scheduler and engines that serve `config` as the Serve application of that name."""
    return f"{application}-{config.digest}"


def ensure_cluster(config: Config, application: str, secret: str = "", *, coming: bool = False) -> tuple[str, str]:
    """Find the application's scheduler and engines, or start them; returns the scheduler's address and the mailboxes' secret.

    `secret`: the one to use where a scheduler has to be made, for a caller that has a mailbox already. `coming`: the caller is a
    router that is about to say hello, so what is found must not end before. May be called by many processes at once. Does not wait
    for engines to load: until one has, requests queue and /health says 503. Raises ConfigError where the model is missing on a node
    that could run it.
    """
    lease = namespace_of(application, config)
    resolved = on_device(config)
    orphans: dict[str, str | None] = {}
    if find_actor(SCHEDULER, lease) is None:
        check_model(resolved)
        orphans = _secrets_of_engines(lease)
        secret = next((own for own in orphans.values() if own), secret)
    address, secret = _scheduler(resolved, lease, secret or secrets.token_hex(), coming)
    for name, own in orphans.items():
        if own != secret:
            _end_stranger(name, lease)
    for number in range(config.engines):
        name = f"engine-{number}"
        ray.remote(EngineActor).options(name=name, **_always(lease)).remote(resolved, name, address, lease, secret)
    return address, secret


def _always(lease: str) -> dict[str, Any]:
    """Detached, and zero CPUs of Ray's accounting: these actors mostly wait for messages, and must never be queued behind work."""
    return {"num_cpus": 0, "namespace": lease, "lifetime": "detached", "get_if_exists": True, "max_restarts": -1}


def _secrets_of_engines(lease: str) -> dict[str, str | None]:
    """By name; None of one that does not tell. Engines that have lost their scheduler for good keep their mailboxes; a new
    scheduler must be able to speak to them."""
    found: dict[str, str | None] = {}
    for name in named_actors(lease):
        engine = find_actor(name, lease) if name != SCHEDULER else None
        if engine is None:
            continue
        try:
            found[name] = str(ray.get(engine.secret.remote(), timeout=_ACTOR_TIMEOUT_S))
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("%s does not tell its secret: %s", name, error)
            found[name] = None
    return found


def _end_stranger(name: str, lease: str) -> None:
    """For good: an engine with another secret than the scheduler's would never be heard."""
    engine = find_actor(name, lease)
    if engine is not None:
        log.warning("%s does not share the scheduler's secret and is ended", name)
        ray.kill(engine)


def _scheduler(config: Config, lease: str, secret: str, coming: bool) -> tuple[str, str]:
    for attempt in range(_ATTEMPTS):
        options = ray.remote(SchedulerActor).options(name=SCHEDULER, **_always(lease))
        scheduler = options.remote(config, free_ports(1)[0], lease, secret)
        try:
            if coming:
                scheduler.router_comes.remote()
            address, secret = ray.get([scheduler.address.remote(), scheduler.secret.remote()], timeout=_ACTOR_TIMEOUT_S)
            return address, secret
        except ray.exceptions.RayActorError as error:  # the one that was found was just ending, or is between two lives
            log.info("attempt %d: the scheduler does not answer: %s", attempt, error)
            time.sleep(1.0)
        except ray.exceptions.GetTimeoutError:
            log.warning("the scheduler hangs; it is started anew")
            ray.kill(scheduler, no_restart=False)
    raise RuntimeError(f"no scheduler can be started under {lease}")


def on_device(config: Config) -> Config:
    """`config` with its device resolved: the same for all ranks, by whether the cluster has GPUs."""
    if config.device != "auto":
        return config
    return dataclasses.replace(config, device="cuda" if has_gpus() else "cpu")


def check_model(config: Config) -> None:
    """Raise ConfigError, naming node and path, where a node that could host a rank has no such model directory.

    Hub ids are not checked: they are downloaded where they are needed.
    """
    model = config.model
    if not (model.startswith((".", "/", "~")) or is_model(model)):
        return
    here = ray.get_runtime_context().get_node_id()
    look = ray.remote(num_cpus=0, max_retries=0)(is_model)
    asked = {}
    for node in alive_nodes():
        if node.total.get(resource_of(config), 0.0) <= 0 or (node.id == here and is_model(model)):
            continue
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        asked[look.options(scheduling_strategy=pinned).remote(model)] = node
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_CHECK_TIMEOUT_S) if asked else ([], [])
    for answer in answered:
        try:
            there = ray.get(answer, timeout=1.0)
        except ray.exceptions.RayError as error:  # that node just went, most likely
            log.warning("node %s could not be asked for the model: %s", asked[answer].address, str(error).splitlines()[0])
            continue
        if not there:
            raise ConfigError(f"node {asked[answer].address} has no model directory {model}: every node that runs workers needs it")
    for answer in silent:
        log.warning("node %s does not say whether it has the model", asked[answer].address)


def is_model(path: str) -> bool:
    """Whether there is a model directory on this machine."""
    return (Path(path).expanduser() / "config.json").is_file()
