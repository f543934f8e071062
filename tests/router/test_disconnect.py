"""A receive() that raises, as that of Serve does."""

import asyncio
import logging
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from router.disconnect import Disconnecting


@pytest.mark.parametrize("failure", [RuntimeError("actor died"), KeyError("request"), OSError()])
def test_a_receive_that_fails_is_a_client_that_left(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
    seen: list[Any] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        raise failure

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await receive())
        seen.append(await receive())
        seen.append(await Request(scope, receive).is_disconnected())

    async def send(message: Message) -> None:
        raise AssertionError("nobody is there")

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Disconnecting(app)(scope, receive, send))
    assert seen == [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}, True]
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


def test_a_cancelled_receive_stays_cancelled() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise AssertionError("it went on")

    async def run() -> None:
        async def receive() -> Message:
            await asyncio.sleep(3600)
            raise AssertionError

        task = asyncio.ensure_future(Disconnecting(app)({"type": "http"}, receive, receive))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
