"""Answers that take a while: they are worked on only as long as the client is there."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.choice import Increment
from router.errors import ApiError, as_api_error
from router.formats import Format
from router.offload import offloaded
from router.prompt import Prompt
from router.responses import PromptTokensDetails, Usage
from router.run import Run

DONE = b"data: [DONE]\n\n"
_EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class Reply(Response):
    """An ASGI response that runs a job and cancels it when the client disconnects."""

    def __init__(self, run: Run, form: Format) -> None:
        # No super().__init__: status, headers and body are not known yet.
        self.background = None
        self._run = run
        self._format = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _while_connected(receive, self._work(send))

    async def _work(self, send: Send) -> None:
        raise NotImplementedError

    def _usage(self) -> Usage:
        prompt, completion = self._run.prompt_tokens, self._run.completion_tokens
        cached, speculation = PromptTokensDetails(self._run.cached_tokens), self._run.speculation
        return Usage(prompt, completion, prompt + completion, cached, UNSET if speculation is None else speculation)

    def _error(self, error: Exception) -> ApiError:
        return as_api_error(error, self._run.size_param)


class WholeReply(Reply):
    """The answer in one JSON document."""

    async def _work(self, send: Send) -> None:
        try:
            body = await self._body()
        except Exception as failure:
            error = self._error(failure)
            await send_whole(send, error.status, error.body(), error.headers)
            return
        await send_whole(send, 200, body)

    async def _body(self) -> bytes:
        outputs = await self._run.outputs()
        size = sum(self._format.size(index, *output) for index, output in enumerate(outputs))
        return await offloaded(size, self._written, outputs)

    def _written(self, outputs: list[tuple[Prompt, Increment]]) -> bytes:
        return msgspec.json.encode(self._format.whole(outputs, self._usage()))


class StreamReply(Reply):
    """The answer as server-sent events, one write per step.

    Nothing is sent before the cluster has accepted the request, so that a refusal has its own status; what fails later is an event.
    """

    def __init__(self, run: Run, form: Format, include_usage: bool) -> None:
        super().__init__(run, form)
        self._include_usage = include_usage
        self._encode = msgspec.json.Encoder().encode

    async def _work(self, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": _headers(_EVENT_STREAM)})
                        started = True
                    if event:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
        except OSError as gone:  # how servers of ASGI 2.4 say that the client went away
            raise ClientDisconnect from gone
        except Exception as failure:
            error = self._error(failure)
            if not started:
                await send_whole(send, error.status, error.body(), error.headers)
                return
            await send({"type": "http.response.body", "body": b"data: %b\n\n%b" % (error.body(), DONE), "more_body": False})
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._run.increments()) as increments:
            async for news in increments:
                size = sum(self._format.size(index, self._run.prompt_of(index), increment) for index, increment in news)
                yield await offloaded(size, self._written, news)
        last = b"data: %b\n\n" % self._encode(self._format.usage_chunk(self._usage())) if self._include_usage else b""
        yield last + DONE

    def _written(self, news: list[tuple[int, Increment]]) -> bytes:
        parts: list[bytes] = []
        for index, increment in news:
            for chunk in self._format.chunks(index, self._run.prompt_of(index), increment):
                parts += (b"data: ", self._encode(chunk), b"\n\n")
        return b"".join(parts)


async def send_whole(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """A JSON answer at once."""
    known = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": _headers(known)})
    await send({"type": "http.response.body", "body": body})


def _headers(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client disconnects. Either way it has ended, cleanup included, on return."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in (task, watch):
            future.cancel()
        outcomes = await asyncio.gather(task, watch, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception) and not isinstance(outcome, ClientDisconnect):
            raise outcome


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
