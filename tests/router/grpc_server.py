"""The gRPC services on a plain grpc.aio server, with a fake cluster behind them."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router import inference_pb2 as pb
from router.grpc_service import HealthService, InferenceService, answered, streamed
from router.inference_pb2_grpc import add_InferenceServicer_to_server
from router.metrics import RouterMetrics
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import FakeGenerator, Script

PATIENCE_S = 10.0
"""How long a test waits for what should come at once."""


class _Inference:
    """As router/app.py, and with the deadline, which Serve does not tell."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def Generate(self, request: Any, context: Any) -> Any:
        responses = streamed(self._service.generate(request, context, context.time_remaining()), pb.GenerateResponse, context)
        async with aclosing(responses):
            async for response in responses:
                yield response

    async def Complete(self, request: Any, context: Any) -> Any:
        return await answered(self._service.complete(request, context, context.time_remaining()), pb.CompleteResponse, context)

    async def Tokenize(self, request: Any, context: Any) -> Any:
        return await answered(self._service.tokenize(request), pb.TokenizeResponse, context)

    async def ListModels(self, request: Any, context: Any) -> Any:
        return await self._service.list_models()

    async def ClusterStatus(self, request: Any, context: Any) -> Any:
        return await answered(self._service.cluster_status(), pb.ClusterStatusResponse, context)


class _Health:
    def __init__(self, service: HealthService) -> None:
        self._service = service

    async def Check(self, request: Any, context: Any) -> Any:
        return await answered(self._service.check(request), health_pb2.HealthCheckResponse, context)

    async def List(self, request: Any, context: Any) -> Any:
        return await self._service.list()

    async def Watch(self, request: Any, context: Any) -> Any:
        async for response in self._service.watch(request):
            yield response


class GrpcApi:
    """A server in a thread of its own."""

    def __init__(self, tokenizer: Tokenizer, served: ServedModel, script: Script = lambda _: (), engines: int | None = 1) -> None:
        self.generator = FakeGenerator(script, engines)
        service, health = (
            InferenceService(self.generator, tokenizer, served, RouterMetrics()),
            HealthService(self.generator, served),
        )
        self._inference = _Inference(service)
        self._health = _Health(health)
        self._listening = threading.Event()
        self._stopped = threading.Event()
        self.target = ""

    @contextmanager
    def serving(self) -> Iterator[str]:
        """host:port, for as long as the context lasts."""
        thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        thread.start()
        assert self._listening.wait(PATIENCE_S)
        try:
            yield self.target
        finally:
            self._stopped.set()
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    async def _serve(self) -> None:
        server = grpc.aio.server()
        add_InferenceServicer_to_server(self._inference, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._listening.set()
        await asyncio.to_thread(self._stopped.wait)
        await server.stop(None)


async def first(events: AsyncGenerator[Any, None]) -> Any:
    """The first item; the rest is called off."""
    try:
        return await anext(events)
    finally:
        await events.aclose()
