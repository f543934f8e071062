"""A client of the gRPC interface, for threads and for asyncio.

    with Client("localhost:9000") as client:
        for event in client.generate("def main(argv):", max_tokens=64):
            print(event.text, end="")

It needs grpcio and protobuf, and of Rayline the generated messages only.
"""

from collections.abc import AsyncGenerator, Generator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from router import inference_pb2 as pb
from router.client_messages import (
    Completion,
    Engine,
    Event,
    Model,
    Output,
    Parameters,
    PositionLogprobs,
    Prompt,
    RaylineError,
    Speculation,
    Status,
    TokenizeParameters,
    TokenLogprob,
    Tokens,
    Turn,
    Usage,
    completion_of,
    events_of,
    explained,
    generation_request,
    models_of,
    status_of,
    tokenize_request,
    tokens_of,
)
from router.inference_pb2_grpc import InferenceStub

__all__ = [
    "AsyncClient",
    "Client",
    "Completion",
    "Engine",
    "Event",
    "Model",
    "Output",
    "Parameters",
    "PositionLogprobs",
    "Prompt",
    "RaylineError",
    "Speculation",
    "Status",
    "TokenLogprob",
    "TokenizeParameters",
    "Tokens",
    "Turn",
    "Usage",
]

_OPTIONS = [("grpc.max_receive_message_length", 256 * 2**20)]


class _Connected:
    """A channel to one server, and what every call takes along."""

    _grpc: Any
    """The module that opens channels: grpc or grpc.aio."""

    def __init__(
        self,
        target: str,
        *,
        application: str = "rayline",
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str | None = None,
    ) -> None:
        """`target`: host:port. `application`: the Serve application's name. `timeout_s`: of calls that name none; None: no limit
        but the server's. `credentials`: for TLS. `api_key`: sent as `authorization: Bearer ...`."""
        if credentials is None:
            self._channel = self._grpc.insecure_channel(target, _OPTIONS)
        else:
            self._channel = self._grpc.secure_channel(target, credentials, _OPTIONS)
        self._stub = InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s
        key = (("authorization", f"Bearer {api_key}"),) if api_key is not None else ()
        self._metadata = (("application", application), *key)


class Client(_Connected):
    """Calls of one server; threads may share it. Methods raise RaylineError."""

    _grpc = grpc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and the calls that still go on."""
        self._channel.close()

    def generate(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Generator[Event, None, None]:
        """Events as they come. The call begins with the first one that is asked for; closing the generator cancels it."""
        request = generation_request(prompt, parameters, self._timeout_s)
        with explained():
            call = self._stub.Generate(request, timeout=_timeout_s(request), metadata=self._metadata)
            try:
                for response in call:
                    yield from events_of(response)
            finally:
                call.cancel()

    def complete(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Completion:
        """The whole answer."""
        request = generation_request(prompt, parameters, self._timeout_s)
        return completion_of(self._call(self._stub.Complete, request, _timeout_s(request)))

    def tokenize(self, prompt: str | Sequence[Turn], **parameters: Unpack[TokenizeParameters]) -> Tokens:
        """The tokens of a text or a chat."""
        return tokens_of(self._call(self._stub.Tokenize, tokenize_request(prompt, parameters), parameters.get("timeout_s")))

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """What is served."""
        return models_of(self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s))

    def status(self, *, timeout_s: float | None = None) -> Status:
        """The cluster's engines."""
        return status_of(self._call(self._stub.ClusterStatus, pb.ClusterStatusRequest(), timeout_s))

    def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        with explained():
            return method(request, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=self._metadata)


class AsyncClient(_Connected):
    """As Client, for asyncio: to be made where the event loop runs. Cancelling a task cancels its call."""

    _grpc = grpc.aio

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection, and the calls that still go on."""
        await self._channel.close()

    async def generate(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> AsyncGenerator[Event, None]:
        """As Client's."""
        request = generation_request(prompt, parameters, self._timeout_s)
        with explained():
            call = self._stub.Generate(request, timeout=_timeout_s(request), metadata=self._metadata)
            try:
                async for response in call:
                    for event in events_of(response):
                        yield event
            finally:
                call.cancel()

    async def complete(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Completion:
        """As Client's."""
        request = generation_request(prompt, parameters, self._timeout_s)
        return completion_of(await self._call(self._stub.Complete, request, _timeout_s(request)))

    async def tokenize(self, prompt: str | Sequence[Turn], **parameters: Unpack[TokenizeParameters]) -> Tokens:
        """As Client's."""
        return tokens_of(await self._call(self._stub.Tokenize, tokenize_request(prompt, parameters), parameters.get("timeout_s")))

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """As Client's."""
        return models_of(await self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> Status:
        """As Client's."""
        return status_of(await self._call(self._stub.ClusterStatus, pb.ClusterStatusRequest(), timeout_s))

    async def _call(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        with explained():
            return await method(request, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=self._metadata)


def _timeout_s(request: pb.GenerationRequest) -> float | None:
    """The call's deadline; what is no time at all is the server's to refuse."""
    return request.timeout_s if request.timeout_s > 0 else None
