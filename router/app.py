"""The router as a Serve application. Serve's replicas of it are interchangeable; the cluster behind them is found by its name.

`serve deploy` and `rayline serve` both come in by build(): the first replica set that is deployed starts scheduler and engines.
gRPC comes through Serve's proxy, which a Serve YAML file has to tell of the services:

    grpc_options: {port: 9000, grpc_servicer_functions: [router.grpc_proxy.add_services]}
"""

import logging
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
from cluster.launch import ensure_cluster
from cluster.model import open_model
from cluster.protocol import RouterMessage
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


@serve.deployment(
    ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING, health_check_period_s=5, graceful_shutdown_timeout_s=5
)
@serve.ingress()
class Router:
    """One replica: an edge of HTTP and gRPC, and its journal. Serve's gRPC proxy calls methods by the names in the .proto files."""

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
        self._inference = InferenceService(self._dispatcher, self._tokenizer, model, self._metrics)
        self._health = HealthService(self._dispatcher, model)
        api = build_api(self._dispatcher, self._tokenizer, model, self._metrics)
        api.add_middleware(Disconnecting)
        return api

    async def Generate(
        self, request: pb.GenerationRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        async with aclosing(streamed(self._inference.generate(request), pb.GenerateResponse, grpc_context)) as responses:
            async for response in responses:
                yield response

    async def Complete(self, request: pb.GenerationRequest, grpc_context: RayServegRPCContext) -> pb.CompleteResponse:
        return await answered(self._inference.complete(request), pb.CompleteResponse, grpc_context)

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
