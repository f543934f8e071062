"""Messages between processes: typed msgpack frames over ZeroMQ (TCP), one mailbox per process.

A mailbox is one PULL socket that anybody may push to, and one PUSH socket per peer it has written to. Messages of one sender to one
receiver arrive in order. Nothing here waits without a bound, and nothing is retried: what is owed to a peer that is gone is lost,
and the state machines above live with that. With a secret, mailboxes are encrypted and talk only to mailboxes of the same secret.
"""

import errno
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import msgspec
import zmq

from cluster.curve import Doorkeeper, Keys
from cluster.protocol import MetricSample

MAX_MESSAGE_BYTES = 64 << 20
MAX_PEERS = 512
IDLE_S = 600.0
"""A peer not written to for so long is disconnected."""
_QUEUED_MESSAGES = 4096
_LARGEST_FRAME = MAX_MESSAGE_BYTES - 64
"""What encryption adds to a frame counts towards the receiver's bound."""
_CLOSE_MS = 500
"""What is queued for a peer whose connection is closed gets so long to go out."""

log = logging.getLogger(__name__)
Incoming = TypeVar("Incoming")


@dataclass
class _Peer:
    socket: "zmq.Socket[bytes]"
    used_at: float


class Mailbox(Generic[Incoming]):
    """Receives messages of the types in the union `accepts`, sends any. Any thread may send; one, and always the same, receives."""

    def __init__(self, accepts: object, host: str, port: int = 0, secret: str = "") -> None:
        """Bind at `host` (this node's own address as others reach it) and `port` (0: a free one).

        `secret` is the cluster's (see cluster.curve); empty: whoever reaches the port is heard, in the clear. Raises zmq.ZMQError
        where the address can't be bound, or where a secret is given and libzmq was built without CURVE.
        """
        self._keys = Keys(secret) if secret else None
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.LINGER, 0)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._inbox.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
        if ":" in host:
            self._inbox.setsockopt(zmq.IPV6, 1)
            host = f"[{host}]"
        try:
            self._door = self._guard()
            self._inbox.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        if self._door is not None:
            self._door.start()
        self.address = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self._sending = threading.Lock()
        """Guards all below but `dropped_in`."""
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        """The one written to last stands last."""
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(accepts)
        self._encoder = msgspec.msgpack.Encoder()
        self.dropped_out = 0
        """Messages not sent: the peer is gone or hopelessly behind, or the message is larger than any mailbox takes."""
        self.dropped_in = 0
        """Frames received that are no message for this mailbox."""

    @property
    def refused(self) -> int:
        """Connections that were not let in (see cluster.curve.Doorkeeper). 0 without a secret."""
        return 0 if self._door is None else self._door.refused

    def samples(self, process: str) -> list[MetricSample]:
        """The running totals, for /metrics."""
        name, of = "rayline:messages_dropped_total", ("process", process)
        return [
            MetricSample(name, (("direction", "in"), of), float(self.dropped_in)),
            MetricSample(name, (("direction", "out"), of), float(self.dropped_out)),
            MetricSample("rayline:connections_refused_total", (of,), float(self.refused)),
        ]

    def send(self, address: str, message: msgspec.Struct) -> bool:
        """Queue a message for `address`, without waiting. Messages of one thread to one address stay in order.

        False (and the message is dropped) if its queue is full, if it is larger than MAX_MESSAGE_BYTES, if this mailbox is closed,
        or if that is no address: addresses come in messages, and a bad one must not end who answers.
        """
        with self._sending:
            frame = self._encoder.encode(message)
            try:
                if len(frame) > _LARGEST_FRAME:
                    raise zmq.ZMQError(errno.EMSGSIZE)
                self._peer(address).send(frame, zmq.NOBLOCK)
            except zmq.ZMQError as error:
                self.dropped_out += 1
                log.warning("a %s to %s was dropped: %s", type(message).__name__, address, error)
                return False
        return True

    def receive(self, timeout_s: float) -> Incoming | None:
        """The next message, or None after `timeout_s`. A frame that is no such message is dropped and counted."""
        if not self._inbox.poll(int(timeout_s * 1000)):
            return None
        try:
            frame = self._inbox.recv(zmq.NOBLOCK)
            return self._decoder.decode(frame)
        except zmq.Again:
            return None
        except msgspec.MsgspecError as error:
            self.dropped_in += 1
            log.warning("a frame was dropped: %s", error)
            return None

    def close(self) -> None:
        """Close all sockets; messages not yet handed to the network get half a second. Later ones are dropped."""
        with self._sending:
            self._inbox.close()
            for peer in self._peers.values():
                peer.socket.close(linger=_CLOSE_MS)
            self._peers.clear()
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _guard(self) -> Doorkeeper | None:
        if self._keys is None:
            return None
        self._keys.apply_to_inbox(self._inbox)
        return Doorkeeper(self._context, self._inbox, self._keys)

    def _peer(self, address: str) -> "zmq.Socket[bytes]":
        """The socket to `address`. Closes those unused for long: peers come and go, and those that are gone say nothing."""
        now = time.monotonic()
        peer = self._peers.get(address)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                self._close_oldest()
            peer = self._peers[address] = _Peer(self._connected(address), now)
        peer.used_at = now
        self._peers.move_to_end(address)
        while next(iter(self._peers.values())).used_at < now - IDLE_S:
            self._close_oldest()
        return peer.socket

    def _close_oldest(self) -> None:
        self._peers.popitem(last=False)[1].socket.close(linger=_CLOSE_MS)

    def _connected(self, address: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.PUSH)
        try:
            socket.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES)
            socket.setsockopt(zmq.LINGER, 0)
            if "[" in address:
                socket.setsockopt(zmq.IPV6, 1)
            if self._keys is not None:
                self._keys.apply_to_sender(socket)
            socket.connect(address)
        except zmq.ZMQError:
            socket.close()
            raise
        return socket
