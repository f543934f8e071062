"""The HTTP interface: OpenAI's endpoints, health and metrics. No Ray in here; router/app.py puts it behind Serve."""

import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from router.errors import ApiError, as_api_error
from router.formats import ChatFormat, CompletionFormat, Shown
from router.generation import Generator
from router.metrics import RouterMetrics, render
from router.offload import offloaded
from router.overview import Overview
from router.prepare import Preparer, ServedModel, new_id, unknown_model
from router.replies import StreamReply, WholeReply
from router.responses import Detokenized, ModelList, Tokenized, Version
from router.run import Run
from router.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, GenerationRequest, TokenizeRequest, parse
from router.tokenizer import Tokenizer

MAX_BODY_BYTES = 32 * 2**20
"""A larger body is answered 413: about 8 million tokens of text."""

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def build_api(generator: Generator, tokenizer: Tokenizer, model: ServedModel, metrics: RouterMetrics) -> FastAPI:
    """The application. All it knows of the cluster comes through `generator`; what it counts goes to `metrics`."""
    app = FastAPI(title="Rayline", redirect_slashes=False)

    overview = Overview(generator, model)
    preparer = Preparer(model, tokenizer, overview.context)

    def spelled(tokens: list[int]) -> list[str]:
        return [tokenizer.vocabulary.token_string(token) for token in tokens]

    def reply(run: Run, form: CompletionFormat | ChatFormat, asked: GenerationRequest) -> Response:
        return StreamReply(run, form, asked.include_usage) if asked.stream else WholeReply(run, form)

    @app.post("/v1/completions", openapi_extra=_body_of("CompletionRequest"))
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        id = new_id("cmpl")
        run = Run(
            await preparer.completion(asked, id, request.headers.get("authorization", "")), generator, tokenizer.vocabulary, metrics
        )
        shown = Shown(asked.logprobs, asked.prompt_logprobs, asked.return_token_ids, asked.include_usage, asked.echo)
        return reply(run, CompletionFormat(id, int(time.time()), model.name, tokenizer.vocabulary, shown), asked)

    @app.post("/v1/chat/completions", openapi_extra=_body_of("ChatRequest"))
    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        id = new_id("chatcmpl")
        run = Run(
            await preparer.chat(asked, id, request.headers.get("authorization", "")), generator, tokenizer.vocabulary, metrics
        )
        shown = Shown(asked.alternatives, asked.prompt_logprobs, asked.return_token_ids, asked.include_usage)
        return reply(run, ChatFormat(id, int(time.time()), model.name, tokenizer.vocabulary, shown), asked)

    @app.post("/tokenize", openapi_extra=_body_of("TokenizeRequest"))
    async def tokenize(request: Request) -> Response:
        asked = parse(TokenizeRequest, await _body(request))
        tokens = await preparer.tokens(asked)
        strings = await offloaded(len(tokens), spelled, tokens) if asked.return_token_strs else None
        return _json(Tokenized(count=len(tokens), max_model_len=overview.context(), tokens=tokens, token_strs=strings))

    @app.post("/detokenize", openapi_extra=_body_of("DetokenizeRequest"))
    async def detokenize(request: Request) -> Response:
        asked = parse(DetokenizeRequest, await _body(request))
        return _json(Detokenized(await preparer.text(asked)))

    @app.get("/version")
    async def version() -> Response:
        return _json(Version(_version()))

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json(ModelList(data=[overview.card()]))

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        if name != model.name:
            raise unknown_model(name)
        return _json(overview.card())

    @app.get("/health")
    async def health() -> Response:
        found = overview.health()
        return _json(found, 200 if found.status == "ok" else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(render(generator.status(), model.name), media_type=_METRICS_TYPE)

    _answer_errors(app)
    _describe_bodies(app)
    return app


async def _body(request: Request) -> bytes:
    """The body as JSON text. Raises ApiError where it is declared as something else (415) or too large (413)."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(415, f"The body must be application/json, not {media_type}.", code="unsupported_media_type")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def _json(content: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _version() -> str:
    try:
        return importlib.metadata.version("rayline")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape: ours, the router's (404, 405), and what nobody foresaw."""

    async def failed(request: Request, error: Exception) -> Response:
        known = as_api_error(error)
        return Response(known.body(), known.status, known.headers, media_type="application/json")

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it: the client left before its body had come

    async def misrouted(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            known = ApiError(404, f"Unknown request URL: {request.method} {request.url.path}.", code="unknown_url")
        elif error.status_code == 405:
            allowed = dict(error.headers or {})
            known = ApiError(405, f"{request.url.path} does not take {request.method}.", code="method_not_allowed", headers=allowed)
        else:
            known = ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        return await failed(request, known)

    app.add_exception_handler(ApiError, failed)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(HTTPException, misrouted)
    app.add_exception_handler(Exception, failed)


def _body_of(schema: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _describe_bodies(app: FastAPI) -> None:
    """The endpoints parse their bodies themselves (one pass, from bytes); /docs is told of them here."""
    generate: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        _, schemas = models_json_schema(
            [(schema, "validation") for schema in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)],
            ref_template="#/components/schemas/{model}",
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]
