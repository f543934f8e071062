"""Where the ranks of an engine meet: a torch.distributed store that lives outside of them.

The engine's process hosts one for each epoch, and keys carry the epoch's number besides.
"""

import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_BACKLOG = 1024


class StoreServer:
    """A TCPStore whose address is known before torch is imported, which takes seconds and happens in a thread of its own.

    Clients that come before it listens wait in the socket's backlog.
    """

    def __init__(self, host: str) -> None:
        """Bind at `host`, this node's own address as others reach it. Raises OSError where that can't be."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family)
        self._socket.bind((host, 0))
        self._socket.listen(_BACKLOG)
        self._host, self._port = host, int(self._socket.getsockname()[1])
        self._store: Store | None = None
        threading.Thread(target=self._listen, name="store", daemon=True).start()

    @property
    def address(self) -> str:
        """host:port, for `connect`."""
        return f"{self._host}:{self._port}"

    def _listen(self) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        descriptor = self._socket.detach()
        self._store = TCPStore(self._host, self._port, None, True, wait_for_workers=False, master_listen_fd=descriptor)


def connect(address: str, epoch: int, timeout_s: float) -> "Store":
    """A client of the store at `address`, for the keys of `epoch` only. Each wait for a key ends after `timeout_s`.

    Raises torch.distributed.DistError where nobody answers.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, _, port = address.rpartition(":")
    client = TCPStore(host, int(port), None, False, timeout=timedelta(seconds=timeout_s))
    return PrefixStore(f"e{epoch}", client)
