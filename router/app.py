"""The router as a Serve application. Serve's replicas of it are interchangeable; the cluster behind them is found by its name.

Each replica makes sure, when it starts and whenever the scheduler is silent, that the application's scheduler and engines exist: so
`serve deploy` needs nothing but this application, and knows the name it was given.
"""

import asyncio
import logging
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from cluster.channel import Mailbox
from cluster.config import Config, from_mapping
from cluster.model import open_model
from cluster.protocol import RouterMessage
from cluster.reconcile import ensure_cluster
from router.api import build_api
from router.disconnect import Disconnecting
from router.dispatcher import Dispatcher
from router.metrics import RouterMetrics
from router.prepare import ServedModel
from router.tokenizer import load

MAX_ONGOING = 10_000
"""Per replica. Our own queue is bounded cluster-wide; Serve's default of 5 would be a second, tiny one."""
_SILENCE_S = 5.0
_LONGEST_SHUTDOWN_S = 600.0
_MARGIN_S = 5.0

log = logging.getLogger(__name__)


@serve.deployment(
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=MAX_ONGOING,
    health_check_period_s=5,
    graceful_shutdown_wait_loop_s=0.5,
)
@serve.ingress()
class Router:
    """One replica: an HTTP edge and its journal."""

    def __init__(self, config: Config) -> None:
        logging.basicConfig(level=logging.INFO, format="[router] %(levelname)s %(message)s")
        self._config = config
        self._application: str = serve.get_replica_context().app_name
        scheduler = ensure_cluster(config, self._application)
        self._metrics = RouterMetrics()
        mailbox = Mailbox[RouterMessage](RouterMessage, ray.util.get_node_ip_address())
        self._dispatcher = Dispatcher(mailbox, scheduler, self._metrics.samples)
        self._files = open_model(config.model, config.revision)
        self._tokenizer = load(self._files.path)

    def __serve_build_asgi_app__(self) -> FastAPI:
        self._dispatcher.start()
        self._finding = asyncio.get_running_loop().create_task(self._find_scheduler())
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

    async def _find_scheduler(self) -> None:
        """It may be on another node after a death, or have ended by a lease that was over when this replica came."""
        while True:
            await asyncio.sleep(_SILENCE_S)
            if self._dispatcher.silence_s < _SILENCE_S:
                continue
            try:
                self._dispatcher.scheduler_at(await asyncio.to_thread(ensure_cluster, self._config, self._application))
            except Exception as error:  # Ray's are many; the next round tries again
                log.warning("the scheduler is silent, and cannot be found: %s", error)

    async def __del__(self) -> None:
        self._finding.cancel()
        await self._dispatcher.stop()


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's application builder: `args` are Config's settings by name, as under `args:` in a Serve YAML file."""
    return application(from_mapping(args))


def application(config: Config) -> serve.Application:
    """The router, and by its replicas all behind it. A replica that is to go lets its streams end first."""
    bound: serve.Application = Router.options(  # type: ignore[attr-defined]
        num_replicas=config.routers,
        graceful_shutdown_timeout_s=min(config.request_timeout_s, _LONGEST_SHUTDOWN_S) + _MARGIN_S,
    ).bind(config)
    return bound
