"""Messages between processes: typed msgpack frames over ZeroMQ (TCP), one mailbox per process.

A mailbox is one PULL socket that anybody may push to, and one PUSH socket per peer it has written to. Messages of one sender to one
receiver arrive in order. Nothing here waits without a bound, and nothing is retried: what is owed to a peer that is gone is lost,
and the state machines above live with that.
"""

import logging
from collections import OrderedDict
from types import TracebackType
from typing import Generic, Self, TypeVar

import msgspec
import zmq

MAX_MESSAGE_BYTES = 64 << 20
MAX_PEERS = 512
_QUEUED_MESSAGES = 4096

log = logging.getLogger(__name__)
Incoming = TypeVar("Incoming")


class Mailbox(Generic[Incoming]):
    """Receives messages of the types in the union `accepts`, sends any. One thread may receive while another one sends."""

    def __init__(self, accepts: object, host: str, port: int = 0) -> None:
        """Bind at `host` (this node's own address as others reach it) and `port` (0: a free one).

        Raises zmq.ZMQError where the address can't be bound.
        """
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.LINGER, 0)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._inbox.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
        if ":" in host:
            self._inbox.setsockopt(zmq.IPV6, 1)
            host = f"[{host}]"
        try:
            self._inbox.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError:
            self._inbox.close()
            self._context.term()
            raise
        self.address = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self._peers: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(accepts)
        self._encoder = msgspec.msgpack.Encoder()
        self.dropped_out = 0
        """Messages not sent because the peer takes none: it is gone, or hopelessly behind."""
        self.dropped_in = 0
        """Frames received that are no message for this mailbox."""

    def send(self, address: str, message: msgspec.Struct) -> bool:
        """Queue a message for `address`, without waiting.

        False (and the message is dropped) if its queue is full, or if that is no address: addresses come in messages, and a bad
        one must not end who answers.
        """
        try:
            self._peer(address).send(self._encoder.encode(message), zmq.NOBLOCK)
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
        """Close all sockets; messages not yet handed to the network get half a second."""
        self._inbox.close()
        for peer in self._peers.values():
            peer.close(linger=500)
        self._peers.clear()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _peer(self, address: str) -> "zmq.Socket[bytes]":
        peer = self._peers.get(address)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:  # peers come and go; the one unused for longest is most likely gone
                self._peers.popitem(last=False)[1].close(linger=500)
            peer = self._context.socket(zmq.PUSH)
            peer.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES)
            peer.setsockopt(zmq.LINGER, 0)
            if "[" in address:
                peer.setsockopt(zmq.IPV6, 1)
            try:
                peer.connect(address)
            except zmq.ZMQError:
                peer.close()
                raise
            self._peers[address] = peer
        self._peers.move_to_end(address)
        return peer
