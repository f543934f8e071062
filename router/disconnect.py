"""Middleware for servers whose receive() raises where ASGI has a message."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger("rayline.router")


class Disconnecting:
    """Serve's receive() raises whatever goes wrong between proxy and replica, mostly that the client has left: to the application
    either is http.disconnect, which ends its work on the request without a word in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except Exception as error:
                _log.debug("a client is gone: %r", error)
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_disconnect if scope["type"] == "http" else receive, send)
