"""Mailboxes with a secret: who doesn't hold it is neither heard nor spoken to, and is counted."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from cluster import channel
from cluster.channel import Mailbox
from cluster.curve import Keys
from cluster.protocol import Ping, WorkerMessage
from tests.serve.nodes import wait_for

HOST = "127.0.0.1"
SECRET = "the cluster's secret"
ANOTHER = "another cluster's secret"
Socket = zmq.Socket[bytes]


def mailbox(secret: str) -> Mailbox[WorkerMessage]:
    return Mailbox[WorkerMessage](WorkerMessage, HOST, secret=secret)


@pytest.fixture
def inbox() -> Iterator[Mailbox[WorkerMessage]]:
    with mailbox(SECRET) as inbox:
        yield inbox


@pytest.fixture
def pusher() -> Iterator[Socket]:
    with zmq.Context() as context, context.socket(zmq.PUSH) as pusher:
        pusher.setsockopt(zmq.LINGER, 0)
        yield pusher


def own_keys(pusher: Socket) -> None:
    """The right key of the inbox, but a sender's key of its own making."""
    Keys(SECRET).apply_to_sender(pusher)
    public, secret = zmq.curve_keypair()
    pusher.setsockopt(zmq.CURVE_PUBLICKEY, public)
    pusher.setsockopt(zmq.CURVE_SECRETKEY, secret)


def inbox_unknown(pusher: Socket) -> None:
    """The senders' key, but not the inbox's."""
    Keys(SECRET).apply_to_sender(pusher)
    pusher.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_keypair()[0])


def another_secret(pusher: Socket) -> None:
    Keys(ANOTHER).apply_to_sender(pusher)


def plain(pusher: Socket) -> None:
    """No encryption at all."""


def password(pusher: Socket) -> None:
    pusher.setsockopt(zmq.PLAIN_USERNAME, b"a")
    pusher.setsockopt(zmq.PLAIN_PASSWORD, SECRET.encode())


@pytest.mark.parametrize("stranger", [own_keys, inbox_unknown, another_secret, plain, password])
def test_a_stranger_is_not_heard_and_is_counted(
    inbox: Mailbox[WorkerMessage], pusher: Socket, stranger: Callable[[Socket], None]
) -> None:
    with mailbox("") as ordinary:  # the frame itself would be taken
        ordinary_pusher = ordinary._peer(ordinary.address)
        ordinary_pusher.send(ordinary._encoder.encode(Ping(7)))
        assert ordinary.receive(5) == Ping(7)
        frame = ordinary._encoder.encode(Ping(7))
    stranger(pusher)
    pusher.connect(inbox.address)
    with contextlib.suppress(zmq.Again):  # refused before it could send
        pusher.send(frame, zmq.NOBLOCK)
    assert inbox.receive(0.5) is None
    wait_for(lambda: inbox.refused >= 1)
    assert inbox.dropped_in == 0
    with mailbox(SECRET) as known:
        assert known.send(inbox.address, Ping(1))
        assert inbox.receive(5) == Ping(1)


@pytest.mark.parametrize("secret", ["", ANOTHER])
def test_nothing_is_said_to_an_inbox_without_the_secret(secret: str) -> None:
    with mailbox(secret) as foreign, mailbox(SECRET) as outbox:
        outbox.send(foreign.address, Ping(1))
        assert foreign.receive(0.5) is None
        assert foreign.dropped_in == 0


def test_a_foreign_inbox_in_a_peers_place_does_not_end_the_sender() -> None:
    """A peer dies, a stranger gets its port, the peer comes back: as a scheduler that restarts at its fixed port would."""
    with mailbox(SECRET) as peer:
        address, port = peer.address, int(peer.address.rsplit(":", 1)[1])
        with mailbox(SECRET) as outbox:
            assert outbox.send(address, Ping(1))
            assert peer.receive(5) == Ping(1)
            peer.close()
            with Mailbox[WorkerMessage](WorkerMessage, HOST, port, ANOTHER) as foreign:
                outbox.send(address, Ping(2))
                assert foreign.receive(0.5) is None
            with Mailbox[WorkerMessage](WorkerMessage, HOST, port, SECRET) as back:
                outbox.send(address, Ping(3))
                assert back.receive(10) in (Ping(2), Ping(3))


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" + bytes(100), b"\0" * 4096])
def test_bytes_that_are_no_handshake_change_nothing(inbox: Mailbox[WorkerMessage], data: bytes) -> None:
    with socket.create_connection((HOST, int(inbox.address.rsplit(":", 1)[1]))) as raw:
        raw.sendall(data)
        assert inbox.receive(0.2) is None
    with mailbox(SECRET) as known:
        assert known.send(inbox.address, Ping(1))
        assert inbox.receive(5) == Ping(1)
    assert inbox.dropped_in == 0


def test_a_handshake_that_never_ends_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.curve.HANDSHAKE_S", 0.2)
    with mailbox(SECRET) as inbox, socket.create_connection((HOST, int(inbox.address.rsplit(":", 1)[1]))) as raw:
        raw.settimeout(5)
        while raw.recv(1000):  # the inbox's greeting, and then the end
            pass
        wait_for(lambda: inbox.refused == 1)  # a thread counts it a little later


OVERSIZE = """
import sys, time, zmq
from cluster.curve import Keys
pusher = zmq.Context().socket(zmq.PUSH)
Keys(sys.argv[1]).apply_to_sender(pusher)
pusher.connect(sys.argv[2])
pusher.send(bytes(int(sys.argv[3])))
time.sleep(60)
"""


def test_an_oversize_message_of_a_known_peer_never_reaches_memory(inbox: Mailbox[WorkerMessage]) -> None:
    size = 4 * channel.MAX_MESSAGE_BYTES
    before = most = resident_bytes()
    sender = subprocess.Popen([sys.executable, "-c", OVERSIZE, SECRET, inbox.address, str(size)])
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            assert inbox.receive(0.01) is None
            most = max(most, resident_bytes())
    finally:
        sender.kill()
        sender.wait()
    assert most - before < size / 8
    assert inbox.dropped_in == 0
    with mailbox(SECRET) as known:
        assert known.send(inbox.address, Ping(2))
        assert inbox.receive(5) == Ping(2)


def resident_bytes() -> int:
    """Memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_goes_over_the_wire_is_not_readable(inbox: Mailbox[WorkerMessage]) -> None:
    """A relay between two mailboxes sees no message: the tag of a Ping is its type's name in clear text."""
    with mailbox("") as clear:
        assert b"Ping" in relayed(clear, "")
    assert b"Ping" not in relayed(inbox, SECRET)


def relayed(inbox: Mailbox[WorkerMessage], secret: str) -> bytes:
    """The bytes of a sender's side of a connection that carries ten messages to `inbox`."""
    seen = bytearray()
    with socket.create_server((HOST, 0)) as server, mailbox(secret) as outbox:
        for _ in range(10):
            assert outbox.send(f"tcp://{HOST}:{server.getsockname()[1]}", Ping(1))
        accepted, _ = server.accept()
        with accepted, socket.create_connection((HOST, int(inbox.address.rsplit(":", 1)[1]))) as onward:
            accepted.setblocking(False)
            onward.setblocking(False)
            end, heard = time.monotonic() + 10, 0
            while heard < 10:
                assert time.monotonic() < end
                for one, other, keep in ((accepted, onward, True), (onward, accepted, False)):
                    try:
                        data = one.recv(65536)
                    except BlockingIOError:
                        continue
                    other.sendall(data)
                    if keep:
                        seen += data
                heard += inbox.receive(0.001) is not None
    return bytes(seen)


def test_keys_depend_on_the_secret_alone() -> None:
    assert vars(Keys(SECRET)) == vars(Keys(SECRET))
    one, other = set(vars(Keys(SECRET)).values()), set(vars(Keys(ANOTHER)).values())
    assert len(one) == len(other) == 4
    assert not one & other
