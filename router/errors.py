"""Every error a client can see, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import logging
import math

import msgspec

from router.generation import Overloaded, TimedOut, TooLarge, Unavailable

_log = logging.getLogger("rayline.router")


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self._body = ErrorBody(message, kind, param, code)

    @property
    def param(self) -> str | None:
        """The parameter of the request that is to blame."""
        return self._body.param

    def body(self) -> bytes:
        """The JSON document."""
        return msgspec.json.encode({"error": self._body})


def bad_request(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """400: the client's parameter `param` cannot be served."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception, size_param: str = "prompt") -> ApiError:
    """What the client is told of an exception; `size_param` is to blame where a request is too large.

    An unforeseen one is logged, and told without detail.
    """
    match error:
        case ApiError():
            return error
        case Overloaded():
            retry_after = str(max(1, math.ceil(error.retry_after_s)))
            headers = {"Retry-After": retry_after}
            return ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)
        case TooLarge():
            return bad_request(
                size_param, str(error) or "The request is larger than any engine's KV pool.", "context_length_exceeded"
            )
        case TimedOut():
            return ApiError(504, str(error) or "The request timed out.", kind="server_error", code="timeout")
        case Unavailable():
            return ApiError(503, str(error) or "No engine can serve the request.", kind="server_error", code="unavailable")
    _log.error("request failed", exc_info=error)
    return ApiError(500, "Internal error.", kind="server_error", code="internal_error")
