"""KV blocks on their way between a rank and the ranks of other engines that have the same part of the model.

Each peer has a thread and a two-rank group of its own in each direction, so that nobody's silence holds up anybody else; plans are
executed meanwhile. Which blocks may be read or written is the engines' affair (cluster/pulls.py): here they are only moved, and
whatever goes wrong is said and forgotten, together with the group.
"""

import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from cluster.protocol import Give, Moved, Take
from kv.pool import KVPool
from parallel.pair import GIVER, TAKER, Pair
from parallel.rendezvous import StoreServer, connect

_PIECE_BYTES = 8 << 20
_IDLE_S = 60.0
"""A thread without work for so long ends, and leaves its group."""

log = logging.getLogger(__name__)


class Mover:
    """All transfers of one rank of one epoch."""

    def __init__(self, pool: KVPool, host: str, epoch: int, rank: int, report: Callable[[Moved], object]) -> None:
        """host: this node's own address. report: called once for each Give and Take, from any thread."""
        self._pool, self._host, self._epoch, self._rank, self._report = pool, host, epoch, rank, report
        self._store = StoreServer(host)
        self._lock = threading.Lock()
        self._lines: dict[tuple[type, str], _Line] = {}

    @property
    def store(self) -> str:
        """Where ranks of other engines meet this one."""
        return self._store.address

    def put(self, message: Give | Take) -> None:
        """Do it, after those before it for the same peer and direction. Returns at once."""
        key = (type(message), message.peer)
        with self._lock:
            line = self._lines.get(key)
            if line is None:
                line = self._lines[key] = _Line(self._pool, self._host)
                threading.Thread(
                    target=self._run, args=(key, line), name=f"{type(message).__name__} {message.peer}", daemon=True
                ).start()
            line.jobs.put((message, time.monotonic()))

    def _run(self, key: tuple[type, str], line: "_Line") -> None:
        torch.set_num_threads(1)  # of this thread: the plans need the cores more
        while True:
            try:
                message, began = line.jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if line.jobs.empty():
                        del self._lines[key]
                        return
                continue
            error, seconds = "", 0.0
            try:
                seconds = line.move(message, began + message.within_s)
            except Exception as failure:
                line.leave()
                error = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
                log.warning("the transfer %s failed: %s", message.pull, error)
            self._report(Moved(epoch=self._epoch, rank=self._rank, pull=message.pull, seconds=seconds, error=error))


class _Line:
    """To or from one peer; used by one thread."""

    def __init__(self, pool: KVPool, host: str) -> None:
        self.jobs: queue.SimpleQueue[tuple[Give | Take, float]] = queue.SimpleQueue()
        self._pool, self._host = pool, host
        self._pair: Pair | None = None
        self._group = ""

    def leave(self) -> None:
        """The group is of no use any more: the other one will notice."""
        self._pair, self._group = None, ""

    @torch.inference_mode()
    def move(self, message: Give | Take, deadline: float) -> float:
        """Returns how many seconds the KV was on its way. Raises whatever goes wrong."""
        with self._stream():
            pair = self._meet(message, deadline)
            began = time.perf_counter()
            header = torch.tensor([zlib.crc32(message.pull.encode()), len(message.blocks)], device=self._device)
            theirs = header.clone()
            pair.send(header) if isinstance(message, Give) else pair.receive(theirs)
            if not torch.equal(theirs, header):
                raise RuntimeError("the other rank is at another transfer")
            for blocks in self._pieces(message.blocks):
                if time.monotonic() > deadline:
                    raise TimeoutError("not done in time")
                if isinstance(message, Give):
                    pair.send(self._pool.gather(blocks))
                else:
                    content = self._pool.room(len(blocks))
                    pair.receive(content)
                    self._pool.scatter(blocks, content)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            return time.perf_counter() - began

    @property
    def _device(self) -> torch.device:
        return self._pool.keys.device

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def _meet(self, message: Give | Take, deadline: float) -> Pair:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("not begun in time")
        if self._pair is None or self._group != message.group:
            self.leave()
            store = connect(message.store, 0, left)
            rank = GIVER if isinstance(message, Give) else TAKER
            self._pair = Pair(message.group, store, rank, self._device, self._host, message.within_s)
            self._group = message.group
        return self._pair

    def _pieces(self, blocks: list[int]) -> Iterator[list[int]]:
        count = max(1, _PIECE_BYTES // self._pool.bytes_per_block)
        return (blocks[at : at + count] for at in range(0, len(blocks), count))
