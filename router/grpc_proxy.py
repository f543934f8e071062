"""What Serve's gRPC proxy is told of us: named in its option grpc_servicer_functions. Reflection it adds itself."""

import logging
from typing import Any

from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from router.inference_pb2_grpc import add_InferenceServicer_to_server


def add_services(servicer: Any, server: Any) -> None:
    """Our services, whose calls the proxy hands to the application."""
    add_InferenceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    add_HealthServicer_to_server(servicer, server)
    logging.getLogger("asyncio").addFilter(_worth_a_line)


def _worth_a_line(record: logging.LogRecord) -> bool:
    """For each call that its client cancels, the proxy drops a task whose exception says so; nothing is wrong with that."""
    error = record.exc_info[1] if record.exc_info else None
    return type(error).__name__ != "RequestCancelledError"
