"""Mailboxes: order, bounds, and that no message of anybody's ends the receiver or the sender; in the clear and encrypted."""

import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from cluster import channel
from cluster.channel import Mailbox
from cluster.protocol import Ping, Pong, StepPlan, WorkerMessage

HOST = "127.0.0.1"


@pytest.fixture(params=["", "the cluster's secret"], ids=["plain", "curve"])
def secret(request: pytest.FixtureRequest) -> str:
    given: str = request.param
    return given


@pytest.fixture
def inbox(secret: str) -> Iterator[Mailbox[WorkerMessage]]:
    with Mailbox[WorkerMessage](WorkerMessage, HOST, secret=secret) as mailbox:
        yield mailbox


@pytest.fixture
def outbox(secret: str) -> Iterator[Mailbox[WorkerMessage]]:
    with Mailbox[WorkerMessage](WorkerMessage, HOST, secret=secret) as mailbox:
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
    inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage], secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_PEERS", 1)
    with Mailbox[WorkerMessage](WorkerMessage, HOST, secret=secret) as other:
        for epoch in range(3):
            assert outbox.send(inbox.address, Ping(epoch))
            assert inbox.receive(5) == Ping(epoch)
            assert outbox.send(other.address, Ping(epoch))
            assert other.receive(5) == Ping(epoch)


def test_a_peer_unused_for_long_is_disconnected_and_still_gets_its_messages(
    inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage], secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "IDLE_S", 0.2)
    many = 3000
    with Mailbox[WorkerMessage](WorkerMessage, HOST, secret=secret) as other:
        for number in range(many):
            assert outbox.send(inbox.address, Ping(number))
        time.sleep(0.3)
        assert outbox.send(inbox.address, Ping(many))  # to itself: the connection is kept, and with it the order
        assert outbox.send(other.address, Ping(0))
        assert len(outbox._peers) == 2
        time.sleep(0.3)
        assert outbox.send(other.address, Ping(1))
        assert list(outbox._peers) == [other.address]
        assert [inbox.receive(5) for _ in range(many + 1)] == [Ping(number) for number in range(many + 1)]
        assert outbox.send(inbox.address, Ping(many + 1))
        assert inbox.receive(5) == Ping(many + 1)
        assert [other.receive(5), other.receive(5)] == [Ping(0), Ping(1)]
    assert outbox.dropped_out == 0


def test_many_threads_send_through_one_mailbox(inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage], secret: str) -> None:
    each, threads = 400, 6
    with Mailbox[WorkerMessage](WorkerMessage, HOST, secret=secret) as other:

        def send(sender: int) -> None:
            for number in range(each):
                assert outbox.send(inbox.address, Ping(sender * each + number))
                assert outbox.send(other.address, Ping(sender * each + number))

        senders = [threading.Thread(target=send, args=(number,)) for number in range(threads)]
        for sender in senders:
            sender.start()
        for mailbox in (inbox, other):
            epochs = [message.epoch for _ in range(each * threads) if (message := mailbox.receive(5)) is not None]
            assert sorted(epochs) == list(range(each * threads))
            for sender_number in range(threads):
                theirs = [epoch for epoch in epochs if epoch // each == sender_number]
                assert theirs == sorted(theirs)
        for sender in senders:
            sender.join()


def test_closing_under_a_sending_thread_only_drops(secret: str) -> None:
    mailbox = Mailbox[WorkerMessage](WorkerMessage, HOST, secret=secret)
    sent: list[bool] = []

    def send() -> None:
        while not sent or sent[-1]:
            sent.append(mailbox.send(mailbox.address, Ping(1)))

    sender = threading.Thread(target=send)
    sender.start()
    while not sent:
        time.sleep(0.001)
    mailbox.close()
    sender.join(10)
    assert not sender.is_alive()
    assert mailbox.dropped_out == 1


def test_an_address_in_use_is_an_error(inbox: Mailbox[WorkerMessage], secret: str) -> None:
    port = int(inbox.address.rsplit(":", 1)[1])
    with pytest.raises(zmq.ZMQError):
        Mailbox[WorkerMessage](WorkerMessage, HOST, port, secret)


def test_a_large_plan_comes_through(inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage]) -> None:
    plan = StepPlan(epoch=1, step=0, admitted=[], chunks=[], copies=[(i, i + 1) for i in range(100_000)], finished=[])
    outbox.send(inbox.address, plan)
    assert inbox.receive(5.0) == plan


def test_a_message_that_no_mailbox_takes_is_not_sent(
    inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_LARGEST_FRAME", 1000)
    plan = StepPlan(epoch=1, step=0, admitted=[], chunks=[], copies=[(i, i + 1) for i in range(500)], finished=[])
    assert not outbox.send(inbox.address, plan)
    assert outbox.dropped_out == 1
    assert outbox.send(inbox.address, Ping(1))
    assert inbox.receive(5) == Ping(1)


def test_the_largest_message_comes_through(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on what is sent leaves room for what encryption adds on the way."""
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 1 << 16)
    monkeypatch.setattr(channel, "_LARGEST_FRAME", (1 << 16) - 64)
    name = "x" * ((1 << 16) - 64)
    with Mailbox[Pong](Pong, HOST, secret=secret) as inbox, Mailbox[Pong](Pong, HOST, secret=secret) as outbox:
        peer = outbox._peer(inbox.address)
        peer.send(name.encode())  # no message, but it arrives
        assert inbox.receive(5) is None
        assert inbox.dropped_in == 1
        peer.send(name.encode() + bytes(65))  # too long, encrypted or not: the connection is cut
        assert inbox.receive(0.5) is None
        assert inbox.dropped_in == 1
        assert outbox.send(inbox.address, Pong(1, 2))
        assert inbox.receive(5) == Pong(1, 2)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"not msgpack", b"\x91\xa4Nope", b"\x92\xa4Ping\xa1x"])
def test_a_foreign_frame_is_dropped_and_counted(
    inbox: Mailbox[WorkerMessage], outbox: Mailbox[WorkerMessage], frame: bytes
) -> None:
    outbox._peer(inbox.address).send(frame)
    assert inbox.receive(5.0) is None
    assert inbox.dropped_in == 1
    assert [sample.value for sample in inbox.samples("worker")] == [1.0, 0.0, 0.0]
