"""Router <-> global scheduler: which engine is to run it, and how the cluster is."""

from typing import Literal

from cluster.protocol.base import Wire
from cluster.protocol.pulls import PullSource
from cluster.protocol.reports import EngineStatus, MetricSample


class Place(Wire, tag=True, kw_only=True):
    """Router -> scheduler: find an engine. Carries the size, never the tokens."""

    request: str
    attempt: int
    reply_to: str
    num_tokens: int
    """What has to be computed before the next new token: the prompt, and per choice the tokens emitted so far."""
    longest: int
    """The most tokens one of its sequences can come to."""
    sequences: int
    """Choices still to run, or the beams that they are chosen from."""
    arrival: float
    """Scheduler-independent order of arrival: the router's unix time when the client's request came."""
    deadline_s: float | None = None
    names: bytes = b""
    """Of the prompt's whole blocks, joined (kv/names.py), where placement goes by prefixes."""


class Withdraw(Wire, tag=True):
    """Router -> scheduler: no longer wanted."""

    request: str
    attempt: int


class Placement(Wire, tag=True):
    """Scheduler -> router: submit this attempt to that engine."""

    request: str
    attempt: int
    engine: str
    epoch: int
    address: str
    waited_s: float
    source: PullSource | None = None
    """An engine from which that one may take the KV it lacks."""


class Refusal(Wire, tag=True):
    """Scheduler -> router: not placed."""

    request: str
    attempt: int
    reason: Literal["queue_full", "too_large", "deadline"]
    retry_after_s: float = 0.0


class RouterHello(Wire, tag=True):
    """Router -> scheduler, at start and every heartbeat: I exist, and so far I counted this."""

    router: str
    metrics: list[MetricSample]
    leaving: bool = False
    """Its last word: it has ended in order."""


class EngineDown(Wire, tag=True):
    """Scheduler -> every router, and an engine that was wrongly taken for dead: epochs up to and with `epoch` are over."""

    engine: str
    epoch: int


class RouterDown(Wire, tag=True):
    """Scheduler -> every engine: this router is gone; nobody waits for its requests."""

    router: str


class PlaceAgain(Wire, tag=True):
    """Scheduler -> a router it did not know, or had taken for dead: none of its requests are queued here."""


class Stop(Wire, tag=True):
    """Scheduler -> every router: the server ends. End all requests, take no more."""


class ClusterStatus(Wire, tag=True):
    """Scheduler -> every router, each heartbeat and on change: what /health, /metrics and /v1/models speak from."""

    engines: list[EngineStatus]
    queued: int
    metrics: list[MetricSample]
    """Summed over the cluster, those of processes that are gone included."""
