"""The shell around the journal: what its threads, its event loop and its end do to readers."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from cluster.channel import Mailbox
from cluster.protocol import ClusterStatus, Place, RouterHello, RouterMessage, SamplingParams, SchedulerMessage, Stop, Withdraw
from router.dispatcher import Dispatcher
from router.generation import ChoiceDelta, Generation, Unavailable

HOST = "127.0.0.1"
LIMIT_S = 10


class Cluster:
    """A mailbox in the scheduler's place, and a dispatcher that talks to it."""

    def __init__(self) -> None:
        self.scheduler = Mailbox[SchedulerMessage](SchedulerMessage, HOST)
        self.mailbox = Mailbox[RouterMessage](RouterMessage, HOST)
        self.dispatcher = Dispatcher(self.mailbox, self.scheduler.address, list)

    async def hears(self, kind: type[SchedulerMessage]) -> SchedulerMessage:
        """The next message of a kind."""
        while True:
            message = await asyncio.to_thread(self.scheduler.receive, LIMIT_S)
            assert message is not None, f"no {kind}"
            if isinstance(message, kind):
                return message


def generation(id: str = "a") -> Generation:
    return Generation(id=id, prompt=[1, 2], params=SamplingParams(max_tokens=4), timeout_s=600.0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * LIMIT_S))


async def read(dispatcher: Dispatcher) -> list[list[ChoiceDelta]]:
    return [deltas async for deltas in dispatcher.stream(generation())]


def test_stop_ends_the_readers_instead_of_leaving_them_waiting() -> None:
    async def test() -> None:
        cluster = Cluster()
        with cluster.scheduler:
            cluster.dispatcher.start()
            reader = asyncio.create_task(read(cluster.dispatcher))
            await cluster.hears(Place)
            await cluster.dispatcher.stop()
            with pytest.raises(Unavailable):
                await asyncio.wait_for(reader, LIMIT_S)
            await cluster.hears(Withdraw)
            with pytest.raises(Unavailable):
                await read(cluster.dispatcher)

    run(test())


def test_the_last_word_is_a_goodbye() -> None:
    async def test() -> None:
        cluster = Cluster()
        with cluster.scheduler:
            cluster.dispatcher.start()
            hello = await cluster.hears(RouterHello)
            await cluster.dispatcher.stop()
            goodbye = await cluster.hears(RouterHello)
            assert isinstance(hello, RouterHello)
            assert isinstance(goodbye, RouterHello)
            assert (hello.leaving, goodbye.leaving) == (False, True)
            assert hello.router == goodbye.router

    run(test())


def test_when_told_to_stop_it_ends_its_readers_and_takes_no_more() -> None:
    async def test() -> None:
        cluster = Cluster()
        with cluster.scheduler:
            cluster.dispatcher.start()
            reader = asyncio.create_task(read(cluster.dispatcher))
            await cluster.hears(Place)
            cluster.scheduler.send(cluster.mailbox.address, Stop())
            with pytest.raises(Unavailable):
                await asyncio.wait_for(reader, LIMIT_S)
            await cluster.hears(Withdraw)
            with pytest.raises(Unavailable):
                await read(cluster.dispatcher)
            await cluster.hears(RouterHello)  # it is still there
            await cluster.dispatcher.stop()

    run(test())


def test_a_scheduler_elsewhere_is_spoken_to_from_then_on() -> None:
    async def test() -> None:
        cluster = Cluster()
        with cluster.scheduler, Mailbox[SchedulerMessage](SchedulerMessage, HOST) as other:
            cluster.dispatcher.start()
            await cluster.hears(RouterHello)
            other.send(cluster.mailbox.address, ClusterStatus([], 0, []))
            cluster.dispatcher.scheduler_at(other.address)
            cluster.scheduler = other
            await cluster.hears(RouterHello)
            reader = asyncio.create_task(read(cluster.dispatcher))
            await cluster.hears(Place)
            assert cluster.dispatcher.silence_s < LIMIT_S
            reader.cancel()
            await cluster.dispatcher.stop()

    run(test())


def test_a_reader_that_leaves_calls_its_generation_off() -> None:
    async def test() -> None:
        cluster = Cluster()
        with cluster.scheduler:
            cluster.dispatcher.start()
            reader = asyncio.create_task(read(cluster.dispatcher))
            placed = await cluster.hears(Place)
            reader.cancel()
            withdrawn = await cluster.hears(Withdraw)
            assert isinstance(placed, Place)
            assert isinstance(withdrawn, Withdraw)
            assert withdrawn.request == placed.request
            await cluster.dispatcher.stop()

    run(test())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_receiving_thread_fails_the_health_check(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        cluster = Cluster()
        with cluster.scheduler:
            cluster.dispatcher.check()  # nothing runs yet, nothing has ended
            cluster.dispatcher.start()
            cluster.dispatcher.check()
            await cluster.hears(RouterHello)

            def broken(timeout_s: float) -> None:
                raise OSError("too many open files")

            monkeypatch.setattr(cluster.mailbox, "receive", broken)
            receiver = cluster.dispatcher._receiver
            assert receiver is not None
            await asyncio.to_thread(receiver.join, LIMIT_S)
            with pytest.raises(RuntimeError):
                cluster.dispatcher.check()
            await cluster.dispatcher.stop()

    run(test())
