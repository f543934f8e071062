"""KV blocks on their way between a rank and the ranks of other engines that have the same part of the model.

Each peer has a thread and a two-rank group of its own in each direction, so that nobody's silence holds up anybody else; plans are
executed meanwhile. Which blocks may be read or written is the engines' affair (cluster/pulls.py); here they are only moved, not
before the plans have been run that may still touch them, and whatever goes wrong is said and forgotten, together with the group.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from cluster.protocol import Give, Moved, Take
from kv.pool import KVPool
from parallel.pair import GIVER, TAKER, Pair, meet
from parallel.rendezvous import StoreServer, connect

_PIECE_BYTES = 8 << 20
_IDLE_S = 60.0
"""A thread without work for so long ends, and leaves its group."""

log = logging.getLogger(__name__)
Key = tuple[type, str]


class Mover:
    """All transfers of one rank of one epoch."""

    def __init__(self, pool: KVPool, host: str, epoch: int, rank: int, report: Callable[[Moved], object]) -> None:
        """host: this node's own address. report: called once for each Give and Take, from any thread."""
        self._pool, self._host, self._epoch, self._rank, self._report = pool, host, epoch, rank, report
        self._store = StoreServer(host)
        self._lock = threading.Lock()
        self._lines: dict[Key, _Line] = {}
        self._progress = _Progress(pool.device)

    @property
    def store(self) -> str:
        """Where ranks of other engines meet this one."""
        return self._store.address

    def executed(self, step: int) -> None:
        """The rank has run this plan and those before it. Called from the thread that does."""
        self._progress.reach(step)

    def put(self, message: Give | Take) -> None:
        """Do it, after those before it for the same peer and direction. Returns at once."""
        key = (type(message), message.peer)
        with self._lock:
            line = self._lines.get(key)
            if line is None:
                line = self._lines[key] = _Line(self._pool, self._host, self._progress)
                name = f"{type(message).__name__} {message.peer}"
                threading.Thread(target=self._run, args=(key, line), name=name, daemon=True).start()
            line.jobs.put((message, time.monotonic()))

    def _run(self, key: Key, line: "_Line") -> None:
        torch.set_num_threads(1)  # of this thread and of those that begin later, none of which computes: the plans need the cores
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


class _Progress:
    """How far the rank has come with its plans."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._step = -1
        self._event: torch.cuda.Event | None = None
        self._changed = threading.Condition()

    def reach(self, step: int) -> None:
        event = torch.cuda.Event() if self._cuda else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        with self._changed:
            self._step, self._event = step, event
            self._changed.notify_all()

    def wait(self, step: int, deadline: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._step >= step, deadline - time.monotonic()):
                raise TimeoutError(f"step {step} was not run in time")
            event = self._event
        if event is not None:
            event.synchronize()


class _Line:
    """To or from one peer; used by one thread."""

    def __init__(self, pool: KVPool, host: str, progress: _Progress) -> None:
        self.jobs: queue.SimpleQueue[tuple[Give | Take, float]] = queue.SimpleQueue()
        self._pool, self._host, self._progress = pool, host, progress
        self._pair: Pair | None = None

    def leave(self) -> None:
        """The group is of no use any more: the other one will notice."""
        self._pair = None

    @torch.inference_mode()
    def move(self, message: Give | Take, deadline: float) -> float:
        """Returns how many seconds the KV was on its way. Raises whatever goes wrong, soon after `deadline` at the latest."""
        with self._stream():
            pair = self._pair = self._meet(message, deadline)
            self._progress.wait(message.after, deadline)
            began = time.perf_counter()
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
        return self._pool.device

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def _meet(self, message: Give | Take, deadline: float) -> Pair:
        """In a thread that is left to itself if it takes too long: torch waits without a bound for a process that is frozen.
        Nothing touches the pool before both have met."""
        met: queue.SimpleQueue[Pair | Exception] = queue.SimpleQueue()
        known, left = self._pair, deadline - time.monotonic()
        rank = GIVER if isinstance(message, Give) else TAKER

        def run() -> None:
            try:
                store = connect(message.store, 0, left)
                met.put(meet(message.pull, store, rank, known, self._device, self._host, message.within_s))
            except Exception as error:
                met.put(error)

        if left <= 0:
            raise TimeoutError("not begun in time")
        threading.Thread(target=run, name=f"meeting {message.peer}", daemon=True).start()
        try:
            found = met.get(timeout=left)
        except queue.Empty:
            raise TimeoutError("the other rank did not come in time") from None
        if isinstance(found, Exception):
            raise found
        return found

    def _pieces(self, blocks: list[int]) -> Iterator[list[int]]:
        count = max(1, _PIECE_BYTES // self._pool.bytes_per_block)
        return (blocks[at : at + count] for at in range(0, len(blocks), count))
