"""Mailboxes: order, bounds, and that no message of anybody's ends the receiver or the sender."""

from collections.abc import Iterator

import pytest
import zmq

from cluster import channel
from cluster.channel import Mailbox
from cluster.protocol import Ping, Pong, StepPlan, WorkerMessage

HOST = "127.0.0.1"


@pytest.fixture
def inbox() -> Iterator[Mailbox[WorkerMessage]]:
    with Mailbox[WorkerMessage](WorkerMessage, HOST) as mailbox:
        yield mailbox


@pytest.fixture
def outbox() -> Iterator[Mailbox[WorkerMessage]]:
    with Mailbox[WorkerMessage](WorkerMessage, HOST) as mailbox:
        yield mailbox


def test_messages_of_one_sender_arrive_in_order(inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage]) -> None:
    for epoch in range(100):
        assert outbox.send(inbox.address, Ping(epoch))
    assert [inbox.receive(5) for _ in range(100)] == [Ping(epoch) for epoch in range(100)]
    assert inbox.receive(0) is None


def test_a_frame_that_is_no_message_is_dropped_and_counted(inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage]) -> None:
    assert outbox.send(inbox.address, Pong(1, 0))  # a message, but not for this mailbox
    assert inbox.receive(5) is None
    assert inbox.dropped_in == 1
    assert outbox.send(inbox.address, Ping(2))
    assert inbox.receive(5) == Ping(2)


@pytest.mark.parametrize("address", ["", "nonsense", "tcp://", "udp://127.0.0.1:1"])
def test_an_address_that_is_none_drops_the_message_and_nothing_else(outbox: Mailbox[WorkerMessage], address: str) -> None:
    """Addresses come in messages: the one who sent a bad one must not end the process that answers."""
    assert not outbox.send(address, Ping(1))
    assert outbox.dropped_out == 1


def test_a_peer_that_takes_nothing_never_makes_the_sender_wait(
    outbox: Mailbox[WorkerMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_QUEUED_MESSAGES", 10)
    with zmq.Context() as context, context.socket(zmq.PULL) as taken:
        taken.bind(f"tcp://{HOST}:*")
        nobody = taken.getsockopt_string(zmq.LAST_ENDPOINT)
    assert sum(outbox.send(nobody, Ping(n)) for n in range(20)) == 10
    assert outbox.dropped_out == 10


def test_the_peers_are_bounded_and_an_evicted_one_still_gets_its_messages(
    inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_PEERS", 1)
    with Mailbox[WorkerMessage](WorkerMessage, HOST) as other:
        for epoch in range(3):
            assert outbox.send(inbox.address, Ping(epoch))
            assert inbox.receive(5) == Ping(epoch)
            assert outbox.send(other.address, Ping(epoch))
            assert other.receive(5) == Ping(epoch)


def test_an_address_in_use_is_an_error(inbox: Mailbox[WorkerMessage]) -> None:
    port = int(inbox.address.rsplit(":", 1)[1])
    with pytest.raises(zmq.ZMQError):
        Mailbox[WorkerMessage](WorkerMessage, HOST, port)


def test_a_large_plan_comes_through(inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage]) -> None:
    plan = StepPlan(epoch=1, step=0, admitted=[], chunks=[], copies=[(i, i + 1) for i in range(100_000)], finished=[])
    outbox.send(inbox.address, plan)
    assert inbox.receive(5.0) == plan


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"not msgpack", b"\x91\xa4Nope", b"\x92\xa4Ping\xa1x"])
def test_a_strangers_frame_is_dropped_and_counted(inbox: Mailbox[WorkerMessage], frame: bytes) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        stranger.connect(inbox.address)
        stranger.send(frame)
        assert inbox.receive(5.0) is None
    assert inbox.dropped_in == 1
