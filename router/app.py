"""The router as a Serve application. Serve's replicas of it are interchangeable; the cluster behind them is found by its name.

`serve deploy` and `rayline serve` both come in by build(): the first replica set that is deployed starts scheduler and engines.
"""

import logging
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from cluster.channel import Mailbox
from cluster.config import Config, from_mapping
from cluster.launch import ensure_cluster
from cluster.model import open_model
from cluster.protocol import RouterMessage
from router.api import build_api
from router.disconnect import Disconnecting
from router.dispatcher import Dispatcher
from router.metrics import RouterMetrics
from router.prepare import ServedModel
from router.tokenizer import load

MAX_ONGOING = 10_000
"""Per replica. Our own queue is bounded cluster-wide; Serve's default of 5 would be a second, tiny one."""


@serve.deployment(
    ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING, health_check_period_s=5, graceful_shutdown_timeout_s=5
)
@serve.ingress()
class Router:
    """One replica: an HTTP edge and its journal."""

    def __init__(self, config: Config, scheduler: str, secret: str) -> None:
        logging.basicConfig(level=logging.INFO, format="[router] %(levelname)s %(message)s")
        self._config = config
        self._metrics = RouterMetrics()
        mailbox = Mailbox[RouterMessage](RouterMessage, ray.util.get_node_ip_address(), secret=secret)
        self._dispatcher = Dispatcher(mailbox, scheduler, self._metrics.samples)
        self._files = open_model(config.model, config.revision)
        self._tokenizer = load(self._files.path)

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._dispatcher.start()
        shape, config = self._files.shape, self._config
        model = ServedModel(
            name=config.model_name,
            max_model_len=config.max_model_len or shape.max_position_embeddings,
            vocab_size=shape.vocab_size,
            eos_token_ids=self._files.eos_token_ids,
            timeout_s=config.request_timeout_s,
            root=config.model,
        )
        api = build_api(self._dispatcher, self._tokenizer, model, self._metrics)
        api.add_middleware(Disconnecting)
        return api

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        self._dispatcher.check()

    async def __del__(self) -> None:
        await self._dispatcher.stop()


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's application builder: `args` are Config's settings by name, as under `args:` in a Serve YAML file."""
    config = from_mapping(args)
    scheduler, secret = ensure_cluster(config)
    return application(config, scheduler, secret)


def application(config: Config, scheduler: str, secret: str) -> serve.Application:
    """The router for a cluster whose scheduler is at address `scheduler` and whose mailboxes share `secret`."""
    bound: serve.Application = Router.options(num_replicas=config.routers).bind(config, scheduler, secret)  # type: ignore[attr-defined]
    return bound
