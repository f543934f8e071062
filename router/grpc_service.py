"""The gRPC interface: inference.proto's methods and the standard health service. No Ray in here; router/app.py puts them behind
Serve, whose proxy answers reflection itself."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from router import inference_pb2 as pb
from router.errors import ApiError, as_api_error
from router.generation import Generator
from router.grpc_messages import Writer, blamed, generation_request, model_of, status_of, timeout_of, tokenize_request, usage_of
from router.metrics import RouterMetrics
from router.offload import offloaded
from router.overview import Overview
from router.prepare import Preparer, ServedModel, new_id
from router.run import Run
from router.schemas import ChatRequest
from router.tokenizer import Tokenizer

SERVICE = "rayline.v1.Inference"
MAX_REQUEST_BYTES = 32 * 2**20
"""A larger request is answered RESOURCE_EXHAUSTED."""
WATCH_S = 0.5
WATCHED_S = 60.0
"""How often a watched state of health is looked at."""

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


_Answer = TypeVar("_Answer")


class Context(Protocol):
    """What is needed of a call's context; Serve's has it."""

    def invocation_metadata(self) -> Any: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, bytes]]) -> None: ...


class Refused(Exception):
    """Ends a call with a status other than OK."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self._error = error

    def tell(self, context: Context) -> None:
        """Make it the call's status. A field to blame is named in the details and, for programs, as a google.rpc.BadRequest."""
        code = _CODES.get(self._error.status, grpc.StatusCode.INTERNAL)
        field, details = blamed(self._error)
        context.set_code(code)
        context.set_details(details)
        if field is not None:
            status = status_pb2.Status(code=code.value[0], message=details)
            violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=details)
            status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
            context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])


async def answered(answer: Awaitable[_Answer], empty: type[_Answer], context: Context) -> _Answer:
    """The answer to a call; or, with the refusal as the call's status, an empty one, which is not sent.

    Serve logs whatever a method raises as a failure of the server, with two tracebacks: so nothing is raised.
    """
    try:
        return await answer
    except Refused as refusal:
        refusal.tell(context)
        return empty()


async def streamed(
    messages: AsyncGenerator[_Answer, None], empty: type[_Answer], context: Context
) -> AsyncGenerator[_Answer, None]:
    """As answered(), of a stream. Serve takes the status from the context as it was with the last message: an empty one is sent."""
    async with aclosing(messages):
        try:
            async for message in messages:
                yield message
        except Refused as refusal:
            refusal.tell(context)
            yield empty()


class InferenceService:
    """The methods of rayline.v1.Inference. Each may raise Refused."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, model: ServedModel, metrics: RouterMetrics) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._model = model
        self._metrics = metrics
        self._overview = Overview(generator, model)
        self._preparer = Preparer(model, tokenizer, self._overview.context)

    async def generate(
        self, request: pb.GenerationRequest, context: Context, remaining_s: float | None = None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """One message a step; closing it cancels the generation. `remaining_s`: seconds to the call's deadline, where they are
        known (Serve keeps them to itself, and cancels the call)."""
        with _refusing():
            id, run, writer = await self._begin(request, context, remaining_s, streamed=True)
        with _refusing(run.size_param):
            async with aclosing(run.increments()) as increments:
                async for news in increments:
                    response = await offloaded(writer.size(news), writer.step, id, news)
                    if run.finished:
                        response.usage.CopyFrom(usage_of(run))
                    if response.outputs:
                        yield response

    async def complete(
        self, request: pb.GenerationRequest, context: Context, remaining_s: float | None = None
    ) -> pb.CompleteResponse:
        """All of it at once; cancelling it cancels the generation."""
        with _refusing():
            id, run, writer = await self._begin(request, context, remaining_s, streamed=False)
        with _refusing(run.size_param):
            outputs = await run.outputs()
            size = writer.size(enumerate(gained for _, gained in outputs)) + len(outputs[0][0].scores)
            return await offloaded(size, writer.whole, id, self._model.name, outputs, usage_of(run))

    async def _begin(
        self, request: pb.GenerationRequest, context: Context, remaining_s: float | None, *, streamed: bool
    ) -> tuple[str, Run, Writer]:
        _check_size(request)
        timeout_s = timeout_of(request, remaining_s, self._model.timeout_s)
        asked = generation_request(request, streamed=streamed)
        id = new_id("grpc")
        authorization = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
        if isinstance(asked, ChatRequest):
            job, logprobs = await self._preparer.chat(asked, id, authorization), asked.alternatives
        else:
            job, logprobs = await self._preparer.completion(asked, id, authorization), asked.logprobs
        limited = [dataclasses.replace(generation, timeout_s=timeout_s) for generation in job.generations]
        job = dataclasses.replace(job, generations=limited)
        vocabulary = self._tokenizer.vocabulary
        return id, Run(job, self._generator, vocabulary, self._metrics), Writer(vocabulary, logprobs, asked.prompt_logprobs)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """A text's tokens, or a chat's."""
        with _refusing():
            _check_size(request)
            tokens = await self._preparer.tokens(tokenize_request(request))
            named = tokens if request.return_token_strs else []
            strings = await offloaded(len(named), lambda: list(map(self._tokenizer.vocabulary.token_string, named)))
            return pb.TokenizeResponse(token_ids=tokens, token_strs=strings, max_model_len=self._overview.context())

    async def list_models(self) -> pb.ListModelsResponse:
        """The one model."""
        return pb.ListModelsResponse(models=[model_of(self._overview.card())])

    async def cluster_status(self) -> pb.ClusterStatusResponse:
        """The engines."""
        with _refusing():
            status, health = self._generator.status(), self._overview.health()
            if status is None:
                raise ApiError(503, str(health.reason))
            return status_of(status, health)


class HealthService:
    """grpc.health.v1.Health, which says what /health says: of the server as a whole ("") and of the inference service alike."""

    def __init__(self, generator: Generator, model: ServedModel) -> None:
        self._overview = Overview(generator, model)

    async def check(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for a service that isn't served."""
        with _refusing():
            if request.service not in ("", SERVICE):
                raise ApiError(404, f"'{request.service}' is not served.", param="service")
            return self._state(request.service)

    async def list(self) -> health_pb2.HealthListResponse:
        """The states of all services."""
        return health_pb2.HealthListResponse(statuses={name: self._state(name) for name in ("", SERVICE)})

    async def watch(self, request: health_pb2.HealthCheckRequest) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The state now and whenever it changes, for a minute: clients then watch anew, perhaps at another replica. A stream that
        never ends would keep its replica from ending."""
        last, end = None, time.monotonic() + WATCHED_S
        while time.monotonic() < end and not self._overview.leaving:
            if (state := self._state(request.service)) != last:
                last = state
                yield state
            await asyncio.sleep(WATCH_S)

    def _state(self, service: str) -> health_pb2.HealthCheckResponse:
        known = health_pb2.HealthCheckResponse
        if service not in ("", SERVICE):
            return known(status=known.SERVICE_UNKNOWN)
        return known(status=known.SERVING if self._overview.health().status == "ok" else known.NOT_SERVING)


@contextmanager
def _refusing(size_param: str = "prompt") -> Iterator[None]:
    """What is raised inside, as Refused."""
    try:
        yield
    except Exception as failure:
        raise Refused(as_api_error(failure, size_param)) from None


def _check_size(request: pb.GenerationRequest | pb.TokenizeRequest) -> None:
    if request.ByteSize() > MAX_REQUEST_BYTES:
        raise ApiError(413, f"The request is larger than {MAX_REQUEST_BYTES} bytes.")
