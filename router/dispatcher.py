"""The asyncio shell around the journal: readers on one side, the mailbox on the other."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from cluster.channel import Mailbox
from cluster.protocol import ClusterStatus, MetricSample, RouterHello, RouterMessage, Stop
from router.generation import ChoiceDelta, Generation, Unavailable
from router.journal import Journal, JournalConfig, News
from router.offload import offloaded

TICK_S = 0.2
HELLO_S = 1.0


class Dispatcher:
    """The Generator of a router process. All but the receiving thread runs on one event loop."""

    def __init__(
        self,
        mailbox: Mailbox[RouterMessage],
        scheduler: str,
        metrics: Callable[[], list[MetricSample]],
        names: Callable[[Sequence[int], str], bytes] | None = None,
    ) -> None:
        """`metrics`: the totals that go out with each heartbeat. `names`: of a prompt's blocks, given its salt, where the scheduler
        places requests by their prefixes (kv/names.py)."""
        self._mailbox = mailbox
        self._scheduler = scheduler
        self._metrics = metrics
        self._journal = Journal(JournalConfig(mailbox.address, scheduler))
        self._names = names
        self._readers: dict[str, asyncio.Queue[News]] = {}
        self._closed = False
        """Takes no more requests."""
        self._stopping = False
        self._heard_at = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._receiver: threading.Thread | None = None

    def start(self) -> None:
        """Begin to receive. Call on the event loop that the readers run on."""
        self._loop = asyncio.get_running_loop()
        self._ticker = self._loop.create_task(self._tick())
        self._receiver = threading.Thread(target=self._receive, name="router", daemon=True)
        self._receiver.start()

    async def stop(self) -> None:
        """Cancel what runs, tell its readers, and close the mailbox."""
        self._close()
        self._stopping = True
        if self._ticker is not None:
            self._ticker.cancel()
            self._hello(leaving=True)
        if self._receiver is not None:
            await asyncio.to_thread(self._receiver.join)
        self._mailbox.close()

    @property
    def silence_s(self) -> float:
        """Seconds since the scheduler was last heard of, or since this dispatcher was made."""
        return time.monotonic() - self._heard_at

    def scheduler_at(self, address: str) -> None:
        """Where the scheduler is to be reached from now on. Call on the event loop that readers run on."""
        self._scheduler = address
        self._journal.scheduler_at(address)

    def check(self) -> None:
        """Raise RuntimeError if the receiving thread or the ticker has ended: then nothing would ever be heard again."""
        if self._receiver is not None and not self._receiver.is_alive():
            raise RuntimeError("the router's receiving thread has ended")
        if self._ticker is not None and self._ticker.done():
            raise RuntimeError("the router's ticker has ended")

    # --- Generator --------------------------------------------------------------------------------------------------

    @property
    def leaving(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    def status(self) -> ClusterStatus | None:
        """The cluster as last heard of."""
        return self._journal.status

    async def finish_choice(self, id: str, choice: int) -> None:
        """This choice needs no more tokens."""
        self._journal.finish_choice(id, choice)
        self._flush()

    async def stream(self, generation: Generation) -> AsyncGenerator[list[ChoiceDelta], None]:
        """See router.generation.Generator."""
        names = b""
        if self._names is not None:
            names = await offloaded(len(generation.prompt), self._names, generation.prompt, generation.cache_salt)
        if self._closed:
            raise Unavailable("the router stops")
        queue: asyncio.Queue[News] = asyncio.Queue()
        self._readers[generation.id] = queue
        try:
            self._journal.begin(generation, time.time(), time.monotonic(), names)
            self._flush()
            while generation.id in self._journal or not queue.empty():
                news = [await queue.get()]
                while not queue.empty():
                    news.append(queue.get_nowait())
                deltas = [delta for item in news for delta in item.deltas]
                error = next((item.error for item in news if item.error is not None), None)
                if deltas or error is None:
                    yield deltas
                if error is not None:
                    raise error
        finally:
            del self._readers[generation.id]
            self._journal.cancel(generation.id)
            if not self._stopping:
                self._flush()

    # --- the cluster ------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """In a thread of its own: sockets may wait, the event loop must not."""
        assert self._loop is not None
        while not self._stopping:
            message = self._mailbox.receive(TICK_S)
            if message is not None and not self._stopping:
                self._loop.call_soon_threadsafe(self._take, message)

    def _take(self, message: RouterMessage) -> None:
        match message:
            case ClusterStatus():
                self._heard_at = time.monotonic()
            case Stop():
                self._close()
        self._journal.receive(message, time.monotonic())
        self._flush()

    def _close(self) -> None:
        """End all requests; their readers are told."""
        self._closed = True
        for id, reader in self._readers.items():
            self._journal.cancel(id)
            reader.put_nowait(News(id, [], Unavailable("the router stops")))
        self._flush()

    async def _tick(self) -> None:
        next_hello = 0.0
        while True:
            now = time.monotonic()
            self._journal.tick(now)
            if now >= next_hello:
                next_hello = now + HELLO_S
                self._hello()
            self._flush()
            await asyncio.sleep(TICK_S)

    def _hello(self, leaving: bool = False) -> None:
        counted = [*self._metrics(), *self._mailbox.samples("router")]
        self._mailbox.send(self._scheduler, RouterHello(self._mailbox.address, counted, leaving))

    def _flush(self) -> None:
        for send in self._journal.take_messages():
            self._mailbox.send(send.address, send.message)
        for news in self._journal.take_news():
            reader = self._readers.get(news.id)
            if reader is not None:
                reader.put_nowait(news)
