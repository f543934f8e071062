"""The router as a Serve application. Serve's replicas of it are interchangeable; the cluster behind them is found by its name.

Each replica makes sure, when it starts and whenever the scheduler is silent, that the application's scheduler and engines exist: so
`serve deploy` needs nothing but this application, and knows the name it was given.
gRPC comes through Serve's proxy, which a Serve YAML file has to tell of the services:

    grpc_options: {port: 9000, grpc_servicer_functions: [router.grpc_proxy.add_services]}
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
from fastapi import FastAPI
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from cluster.channel import Mailbox
from cluster.config import Config, from_mapping
from cluster.model import open_model
from cluster.protocol import RouterMessage
from cluster.reconcile import ensure_cluster
from kv.names import BlockNames
from router import inference_pb2 as pb
from router.api import build_api
from router.disconnect import Disconnecting
from router.dispatcher import Dispatcher
from router.grpc_service import HealthService, InferenceService, answered, streamed
from router.metrics import RouterMetrics
from router.prepare import ServedModel
from router.tokenizer import load

MAX_ONGOING = 10_000
"""Per replica. Our own queue is bounded cluster-wide; Serve's default of 5 would be a second, tiny one."""
_SILENCE_S = 5.0
_MISSING_S = 60.0
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
    """One replica: an edge of HTTP and gRPC, and its journal. Serve's gRPC proxy calls methods by the names in the .proto files."""

    def __init__(self, config: Config) -> None:
        logging.basicConfig(level=logging.INFO, format="[router] %(levelname)s %(message)s")
        self._config = config
        self._application: str = serve.get_replica_context().app_name
        self._outdated = False
        scheduler, self._secret = ensure_cluster(config, self._application, coming=True)
        self._metrics = RouterMetrics()
        mailbox = Mailbox[RouterMessage](RouterMessage, ray.util.get_node_ip_address(), secret=self._secret)
        names = BlockNames(self._secret, config.block_size).of_prompt if config.by_prefix else None
        self._dispatcher = Dispatcher(mailbox, scheduler, self._metrics.samples, names)
        self._files = open_model(config.model, config.revision, weights=False)
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
            max_beams=config.max_beams,
            apart_by_key=config.prefix_sharing == "api_key",
        )
        self._inference = InferenceService(self._dispatcher, self._tokenizer, model, self._metrics)
        self._health = HealthService(self._dispatcher, model)
        api = build_api(self._dispatcher, self._tokenizer, model, self._metrics)
        api.add_middleware(Disconnecting)
        return api

    async def Generate(
        self, request: pb.GenerationRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        async with aclosing(
            streamed(self._inference.generate(request, grpc_context), pb.GenerateResponse, grpc_context)
        ) as responses:
            async for response in responses:
                yield response

    async def Complete(self, request: pb.GenerationRequest, grpc_context: RayServegRPCContext) -> pb.CompleteResponse:
        return await answered(self._inference.complete(request, grpc_context), pb.CompleteResponse, grpc_context)

    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext) -> pb.TokenizeResponse:
        return await answered(self._inference.tokenize(request), pb.TokenizeResponse, grpc_context)

    async def ListModels(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return await self._inference.list_models()

    async def ClusterStatus(self, request: pb.ClusterStatusRequest, grpc_context: RayServegRPCContext) -> pb.ClusterStatusResponse:
        return await answered(self._inference.cluster_status(), pb.ClusterStatusResponse, grpc_context)

    async def Check(self, request: HealthCheckRequest, grpc_context: RayServegRPCContext) -> HealthCheckResponse:
        return await answered(self._health.check(request), HealthCheckResponse, grpc_context)

    async def List(self, request: HealthListRequest) -> HealthListResponse:
        return await self._health.list()

    async def Watch(self, request: HealthCheckRequest) -> AsyncGenerator[HealthCheckResponse, None]:
        async for response in self._health.watch(request):
            yield response

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        self._dispatcher.check()
        if self._outdated:
            raise RuntimeError("the application's scheduler was made anew by another replica, with another secret")

    async def _find_scheduler(self) -> None:
        """It may be on another node after a death, or have ended by a lease that was over when this replica came. And an engine may
        be missing for good: Ray does not try again where an actor's constructor fails."""
        complete_at = time.monotonic()
        while not self._dispatcher.leaving:
            await asyncio.sleep(_SILENCE_S)
            status = self._dispatcher.status()
            if status is not None and len(status.engines) >= self._config.engines:
                complete_at = time.monotonic()
            if self._dispatcher.silence_s < _SILENCE_S and time.monotonic() - complete_at < _MISSING_S:
                continue
            if self._dispatcher.leaving:
                return
            complete_at = time.monotonic()
            try:
                address, secret = await asyncio.to_thread(ensure_cluster, self._config, self._application, self._secret)
            except Exception as error:  # Ray's are many; the next round tries again
                log.warning("the scheduler is silent, and cannot be found: %s", error)
                continue
            self._outdated = secret != self._secret
            self._dispatcher.scheduler_at(address)

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
