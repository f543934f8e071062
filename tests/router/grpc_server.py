"""The gRPC services on a plain grpc.aio server, with a fake cluster behind them."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from router.grpc_service import HealthService, InferenceService, Refused
from router.inference_pb2_grpc import add_InferenceServicer_to_server
from router.metrics import RouterMetrics
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import FakeGenerator, Script

PATIENCE_S = 10.0
"""How long a test waits for what should come at once."""


def _unary(answer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def method(request: Any, context: Any) -> Any:
        try:
            return await answer(request, context)
        except Refused as refusal:
            await context.abort(refusal.code, refusal.details)

    return method


def _stream(answer: Callable[[Any, Any], AsyncGenerator[Any, None]]) -> Callable[[Any, Any], Any]:
    async def method(request: Any, context: Any) -> Any:
        try:
            async with aclosing(answer(request, context)) as messages:
                async for message in messages:
                    yield message
        except Refused as refusal:
            await context.abort(refusal.code, refusal.details)

    return method


class GrpcApi:
    """A server in a thread of its own."""

    def __init__(self, tokenizer: Tokenizer, served: ServedModel, script: Script = lambda _: (), engines: int | None = 1) -> None:
        self.generator = FakeGenerator(script, engines)
        service, health = (
            InferenceService(self.generator, tokenizer, served, RouterMetrics()),
            HealthService(self.generator, served),
        )
        self._inference = SimpleNamespace(
            Generate=_stream(lambda request, context: service.generate(request, context.time_remaining())),
            Complete=_unary(lambda request, context: service.complete(request, context.time_remaining())),
            Tokenize=_unary(lambda request, _: service.tokenize(request)),
            ListModels=_unary(lambda *_: service.list_models()),
            ClusterStatus=_unary(lambda *_: service.cluster_status()),
        )
        self._health = SimpleNamespace(
            Check=_unary(lambda request, _: health.check(request)),
            List=_unary(lambda *_: health.list()),
            Watch=_stream(lambda request, _: health.watch(request)),
        )
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
