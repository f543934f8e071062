"""Mailboxes over real sockets on loopback."""

import threading

import pytest
import zmq

from cluster.channel import Mailbox
from cluster.protocol import Cancel, Ping, Pong, RouterDown, StepPlan, WorkerMessage


@pytest.fixture
def worker() -> "Mailbox[WorkerMessage]":
    return Mailbox[WorkerMessage](WorkerMessage, "127.0.0.1")


def test_messages_of_one_sender_arrive_in_order(worker: "Mailbox[WorkerMessage]") -> None:
    with worker, Mailbox[Pong](Pong, "127.0.0.1") as engine:
        assert all(engine.send(worker.address, Ping(number)) for number in range(500))
        assert [worker.receive(5.0) for _ in range(500)] == [Ping(number) for number in range(500)]
        assert worker.receive(0.0) is None


def test_a_large_plan_comes_through(worker: "Mailbox[WorkerMessage]") -> None:
    plan = StepPlan(epoch=1, step=0, admitted=[], chunks=[], copies=[(i, i + 1) for i in range(100_000)], finished=[])
    with worker, Mailbox[Pong](Pong, "127.0.0.1") as engine:
        engine.send(worker.address, plan)
        assert worker.receive(5.0) == plan


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"not msgpack", b"\x91\xa4Nope", b"\x92\xa4Ping\xa1x"])
def test_a_frame_that_is_no_message_is_dropped_and_counted(worker: "Mailbox[WorkerMessage]", frame: bytes) -> None:
    context = zmq.Context()
    stranger = context.socket(zmq.PUSH)
    with worker, Mailbox[Pong](Pong, "127.0.0.1") as engine:
        stranger.connect(worker.address)
        stranger.send(frame)
        assert worker.receive(5.0) is None
        assert worker.dropped_in == 1
        engine.send(worker.address, RouterDown("no message for workers"))
        assert worker.receive(5.0) is None
        assert worker.dropped_in == 2
        engine.send(worker.address, Ping(1))
        assert worker.receive(5.0) == Ping(1)
    stranger.close(0)
    context.term()


def test_sending_to_nobody_neither_waits_nor_fails_until_the_queue_is_full() -> None:
    with Mailbox[Pong](Pong, "127.0.0.1") as engine:
        nobody = "tcp://127.0.0.1:1"
        outcomes = [engine.send(nobody, Cancel(request="r", attempt=0, choices=[0])) for _ in range(10_000)]
        assert outcomes[0]
        assert not outcomes[-1]
        assert engine.dropped_out == outcomes.count(False)


def test_one_thread_may_receive_while_another_sends(worker: "Mailbox[WorkerMessage]") -> None:
    received: list[Pong | None] = []
    with worker, Mailbox[Pong](Pong, "127.0.0.1") as engine:
        reader = threading.Thread(target=lambda: received.extend(engine.receive(5.0) for _ in range(200)))
        reader.start()
        for number in range(200):
            engine.send(worker.address, Ping(number))
            message = worker.receive(5.0)
            assert message == Ping(number)
            worker.send(engine.address, Pong(number, 0))
        reader.join()
    assert received == [Pong(number, 0) for number in range(200)]
