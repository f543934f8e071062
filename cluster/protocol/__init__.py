"""Every message that crosses a process boundary. Structs only: no behaviour, no I/O.

Wire format: msgpack, written by msgspec. A message is an array whose first element is the name of its type, so any msgpack reader
can follow a captured frame; fields follow in the order they stand here (structs inside a message are arrays of their fields alone).
New fields go last and have a default. Between two live processes messages arrive in order and none is lost (cluster/channel.py).

Vocabulary
    request    what a client asked for; lives in the router that took it, under a cluster-wide unique id
    attempt    how often the request was submitted; the router raises it when an engine dies under the request
    choice     one of a request's n outputs
    sequence   (request, choice) as an engine schedules it; `seq` is its engine-local number, never used twice
    epoch      one life of an engine's set of workers; messages of an earlier epoch are dropped
    step       one iteration; steps of an epoch are numbered from 0 and executed in order by every stage
"""

from cluster.protocol.base import Wire
from cluster.protocol.placement import (
    ClusterStatus,
    EngineDown,
    Place,
    PlaceAgain,
    Placement,
    Refusal,
    RouterDown,
    RouterHello,
    Stop,
    Withdraw,
)
from cluster.protocol.pulls import Give, Moved, Pull, Pulled, PullRefusal, PullSource, Take
from cluster.protocol.reports import CacheChanges, CacheResync, Credit, EngineReport, EngineStats, EngineStatus, MetricSample
from cluster.protocol.requests import Cancel, Request, SamplingParams, Submit
from cluster.protocol.steps import Admission, Chunk, ChunkResult, NewSequence, PromptScores, StepPlan, StepResult, Transfer
from cluster.protocol.tokens import Deltas, FinishReason, Rejected, Released, TokenDelta, TokenLogprobs
from cluster.protocol.workers import Ping, Pong, StageTime, StageTimes, WorkerFailed, WorkerReady

__all__ = [
    "Admission",
    "CacheChanges",
    "CacheResync",
    "Cancel",
    "Chunk",
    "ChunkResult",
    "ClusterStatus",
    "Credit",
    "Deltas",
    "EngineDown",
    "EngineMessage",
    "EngineReport",
    "EngineStats",
    "EngineStatus",
    "FinishReason",
    "Give",
    "MetricSample",
    "Moved",
    "NewSequence",
    "Ping",
    "Place",
    "PlaceAgain",
    "Placement",
    "Pong",
    "PromptScores",
    "Pull",
    "PullRefusal",
    "PullSource",
    "Pulled",
    "Refusal",
    "Rejected",
    "Released",
    "Request",
    "RouterDown",
    "RouterHello",
    "RouterMessage",
    "SamplingParams",
    "SchedulerMessage",
    "StageTime",
    "StageTimes",
    "StepPlan",
    "StepResult",
    "Stop",
    "Submit",
    "Take",
    "TokenDelta",
    "TokenLogprobs",
    "Transfer",
    "Wire",
    "Withdraw",
    "WorkerFailed",
    "WorkerMessage",
    "WorkerReady",
]

RouterMessage = Deltas | Released | Rejected | Placement | Refusal | EngineDown | PlaceAgain | Stop | ClusterStatus
SchedulerMessage = Place | Withdraw | RouterHello | EngineReport | CacheChanges
EngineMessage = (
    Submit
    | Cancel
    | RouterDown
    | EngineDown
    | CacheResync
    | StepResult
    | WorkerReady
    | WorkerFailed
    | Pong
    | StageTimes
    | Pull
    | Pulled
    | Moved
)
WorkerMessage = StepPlan | Ping | Give | Take
