"""The wire: what goes out comes back, and any msgpack reader can follow it."""

from typing import Any, get_args

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest

from cluster import protocol
from cluster.protocol import EngineMessage, RouterMessage, SchedulerMessage, Wire, WorkerMessage
from tests.cluster.messages import delta, place, ready, report, request, status

ADMISSION = protocol.Admission(3, 2, [4], protocol.NewSequence(choice=0, prompt=[1], emitted=[2], params=request().params))
CHUNK = protocol.Chunk(3, 2, 1, [5], [7], sample=True)
LOGPROBS = protocol.TokenLogprobs(-0.5, [1, 2], [-0.5, -1.5])
RANKED = protocol.TokenLogprobs(-0.5, [1], [-0.5], 1)
SCORING = protocol.Chunk(4, 0, 2, [], [], sample=False, scores=(1, 3))
MESSAGES: list[Any] = [
    protocol.Submit(1, request(n=2, emitted=2, deadline_s=1.5)),
    protocol.Cancel(request="r", attempt=1, choices=[0, 2]),
    protocol.Deltas(
        "e",
        1,
        [
            delta(),
            delta(tokens=(), end=True),
            msgspec.structs.replace(delta(), logprobs=[LOGPROBS], queued_s=0.25),
            msgspec.structs.replace(delta(tokens=()), prompt_index=1, prompt_logprobs=[RANKED]),
        ],
    ),
    protocol.Released("e", 1, [("r", 2)], "died", ["r"]),
    protocol.Rejected("r", 1, "too long"),
    place(deadline_s=2.0),
    protocol.Withdraw("r", 1),
    protocol.Placement("r", 1, "e", 2, "e!", 0.5, protocol.PullSource("f", 2, "f!", 5)),
    protocol.Refusal("r", 1, "queue_full", 2.0),
    protocol.RouterHello("router", [protocol.MetricSample("a", (("b", "c"),), 1.0)]),
    protocol.EngineDown("e", 2),
    protocol.CacheChanges(engine="e", epoch=1, number=3, changes=[(True, b"12345678"), (False, b"")], whole=True),
    protocol.CacheResync("e", 1),
    protocol.RouterDown("router"),
    protocol.PlaceAgain(),
    protocol.Stop(),
    status(e=1),
    report(accepted=[("r", 0)], metrics=[protocol.MetricSample("a", (), 2.0)]),
    protocol.StepPlan(epoch=1, step=2, admitted=[ADMISSION], chunks=[CHUNK, SCORING], copies=[(1, 2)], finished=[9]),
    protocol.StepResult(
        epoch=1,
        step=2,
        results=[protocol.ChunkResult(3, [7], [LOGPROBS])],
        compute_s=0.5,
        error="bad",
        scores=[protocol.PromptScores(4, 1, [RANKED])],
    ),
    ready(1),
    protocol.WorkerFailed(epoch=1, rank=0, reason="no memory"),
    protocol.Ping(1),
    protocol.Pong(1, 0),
    protocol.StageTimes(1, 2, [protocol.StageTime(3, 0.5, 1.5, 64)]),
    protocol.Pull(
        pull="e.1.0",
        epoch=2,
        peer="e.1",
        reply_to="e!",
        tokens=b"12345678",
        salt="x",
        first_block=1,
        layout=["a"],
        stores=["h:1"],
    ),
    protocol.Pulled("e.1.0", 0, "busy"),
    protocol.Give(epoch=2, pull="e.1.0", peer="e.1", store="h:1", blocks=[1, 2], after=3, within_s=5.0),
    protocol.Take(epoch=1, pull="e.1.0", peer="f.2", store="h:1", blocks=[3, 4], after=-1, within_s=5.0),
    protocol.Moved(epoch=1, rank=0, pull="e.1.0", seconds=0.1, error="bad"),
]
UNIONS: list[Any] = [RouterMessage, SchedulerMessage, EngineMessage, WorkerMessage]


def name(message: Wire) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_a_message_comes_back_from_every_union_it_belongs_to(message: Wire) -> None:
    wire = msgspec.msgpack.encode(message)
    homes = [union for union in UNIONS if type(message) in get_args(union)]
    assert homes
    for union in homes:
        assert msgspec.msgpack.decode(wire, type=union) == message


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_any_reader_sees_an_array_that_begins_with_the_name(message: Wire) -> None:
    read = msgpack.unpackb(msgspec.msgpack.encode(message), strict_map_key=False)
    assert isinstance(read, list)
    assert read[0] == name(message)
    assert len(read) == 1 + len(message.__struct_fields__)


def test_no_message_is_forgotten_here() -> None:
    assert {type(m) for m in MESSAGES} == {kind for union in UNIONS for kind in get_args(union)}


def test_seeds_use_all_64_bits() -> None:
    params = msgspec.structs.replace(request().params, seed=2**64 - 1, logit_bias={5: -1.0})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=protocol.SamplingParams) == params


def test_fields_added_later_need_not_be_sent() -> None:
    wire = msgpack.packb(["Refusal", "r", 0, "deadline"])
    assert msgspec.msgpack.decode(wire, type=RouterMessage) == protocol.Refusal("r", 0, "deadline", 0.0)
