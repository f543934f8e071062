"""Who may talk to a mailbox: CurveZMQ with keys that everybody who holds the cluster's secret derives, and nobody else.

All processes of a cluster share two key pairs, one for inboxes and one for senders. A sender talks to nobody but an inbox that
proves the inboxes' key; an inbox lets in nobody but a sender that proves the senders' key (the doorkeeper checks that, ZAP in
ZeroMQ's words). Each connection has keys of its own besides, so that a secret that leaks later opens no connection recorded before.
"""

import hmac
import struct
import threading

import zmq
from zmq.utils import z85

HANDSHAKE_S = 10.0
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # the one address where ZeroMQ asks
_ZAP_DOMAIN = b"rayline"
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Keys:
    """The cluster's two key pairs."""

    def __init__(self, secret: str) -> None:
        """`secret`: 128 random bits or more, in any form; it is not stretched. Raises zmq.ZMQError if libzmq lacks CURVE."""
        self._inbox_secret = _derive(secret, b"rayline inbox")
        self._inbox_public = zmq.curve_public(self._inbox_secret)
        self._sender_secret = _derive(secret, b"rayline sender")
        self._sender_public = zmq.curve_public(self._sender_secret)

    def apply_to_inbox(self, socket: "zmq.Socket[bytes]") -> None:
        """Before bind(). Without a doorkeeper in its context the socket lets nobody in."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._inbox_secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))

    def apply_to_sender(self, socket: "zmq.Socket[bytes]") -> None:
        """Before connect()."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._inbox_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._sender_public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._sender_secret)
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))

    def is_sender(self, key: bytes) -> bool:
        """Whether a public key (32 bytes) is that of the cluster's senders."""
        return hmac.compare_digest(key, z85.decode(self._sender_public))


class Doorkeeper:
    """A thread that answers for each new connection to a context's inbox whether it may come in, and counts those that may not.

    It ends, and closes its sockets, when the context is terminated.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", inbox: "zmq.Socket[bytes]", keys: Keys) -> None:
        """Before the inbox is bound. Call start() after."""
        self._keys = keys
        self._questions = context.socket(zmq.REP)
        self._questions.setsockopt(zmq.LINGER, 0)
        self._questions.bind(_ZAP_ENDPOINT)
        inbox.monitor("inproc://inbox-events", _FAILED)
        self._events = context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.LINGER, 0)
        self._events.connect("inproc://inbox-events")
        self.refused = 0
        """Connections whose handshake failed: no key, a wrong one, another protocol, or too slow. A peer may try many times."""

    def start(self) -> None:
        """Begin to answer."""
        threading.Thread(target=self._run, name="doorkeeper", daemon=True).start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._questions, zmq.POLLIN)
        poller.register(self._events, zmq.POLLIN)
        try:
            while True:
                for socket, _ in poller.poll():
                    if socket is self._questions:
                        self._answer(self._questions.recv_multipart())
                    else:
                        self._count(self._events.recv_multipart())
        except zmq.ContextTerminated:
            pass
        finally:
            self._questions.close()
            self._events.close()

    def _answer(self, frames: list[bytes]) -> None:
        """ZAP (RFC 27): version, request id, domain, address, identity, mechanism, credentials."""
        known = frames[5:6] == [b"CURVE"] and len(frames) == 7 and self._keys.is_sender(frames[6])
        status, text = (b"200", b"OK") if known else (b"400", b"not of this cluster")
        self._questions.send_multipart([b"1.0", frames[1], status, text, b"", b""])

    def _count(self, frames: list[bytes]) -> None:
        (event,) = struct.unpack_from("=H", frames[0])
        if event & _FAILED:
            self.refused += 1


def _derive(secret: str, purpose: bytes) -> bytes:
    """A secret key for one purpose, in ZeroMQ's spelling."""
    encoded: bytes = z85.encode(hmac.digest(secret.encode(), purpose, "sha256"))
    return encoded
