"""The generations behind one request, run together: tokens in, increments of text out, nothing left behind."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from router.choice import Choice, Increment, Reading
from router.generation import ChoiceDelta, Generation, Generator, Speculation
from router.metrics import RouterMetrics
from router.prompt import Prompt
from router.vocabulary import Vocabulary


@dataclass(frozen=True)
class Job:
    """A validated request: what is to be generated and how it is read."""

    generations: list[Generation]
    """One per prompt, alike but for id, prompt, seed and max_tokens."""
    prompts: list[Prompt]
    """Those of the generations."""
    reading: Reading
    keep: int | None = None
    """Of each prompt's choices the client gets so many, the likeliest (best_of). None: all, in their order."""
    size_param: str = "prompt"
    """The parameter to blame where no engine is large enough."""


class Run:
    """A job in progress. Choice `c` of prompt `p` is number p * n + c, as in OpenAI's interface."""

    def __init__(
        self,
        job: Job,
        generator: Generator,
        vocabulary: Vocabulary,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._generator = generator
        self._metrics = metrics
        self._clock = clock
        self._start = clock()
        self._n = job.generations[0].params.n
        self._choices = [
            Choice(vocabulary, generation.prompt, generation.params, job.reading)
            for generation in job.generations
            for _ in range(self._n)
        ]
        self._last_token: list[float | None] = [None] * len(self._choices)
        self._begun: set[int] = set()
        self._cached = [0] * len(job.generations)
        self._open = len(self._choices)
        self.speculation: Speculation | None = None
        """None as long as nothing was drawn, and where speculation is off or, as with beams, there is none."""

    @property
    def finished(self) -> bool:
        """No choice has more to come."""
        return not self._open

    @property
    def size_param(self) -> str:
        """The parameter to blame for TooLarge."""
        return self._job.size_param

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once however many choices continue it."""
        return sum(len(generation.prompt) for generation in self._job.generations)

    @property
    def cached_tokens(self) -> int:
        """Of the prompt tokens, those whose KV was found in a cache."""
        return sum(self._cached)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, those that ended a choice included, those after a stop string not."""
        return sum(choice.num_tokens for choice in self._choices)

    def prompt_of(self, index: int) -> Prompt:
        """The prompt that choice `index` continues."""
        return self._job.prompts[index // self._n]

    def chosen(self) -> list[int]:
        """Numbers of the choices that the client gets, in that order. Call when all have finished."""
        keep = self._n if self._job.keep is None else self._job.keep
        numbers: list[int] = []
        for begin in range(0, len(self._choices), self._n):
            own = list(range(begin, begin + self._n))
            if self._job.keep is not None:
                own.sort(key=lambda number: -self._choices[number].mean_logprob)
            numbers += own[:keep]
        return numbers

    async def outputs(self) -> list[tuple[Prompt, Increment]]:
        """All that the client gets, in its order, once every choice has finished. Raises as increments() does."""
        gained: list[list[Increment]] = [[] for _ in self._choices]
        async with aclosing(self.increments()) as increments:
            async for news in increments:
                for index, increment in news:
                    gained[index].append(increment)
        return [(self.prompt_of(index), Increment.joined(gained[index])) for index in self.chosen()]

    async def increments(self) -> AsyncGenerator[list[tuple[int, Increment]], None]:
        """News of the choices (by number) as they come, until all have finished; an empty list once all is accepted.

        Closing it cancels the generations. Raises what Generator.stream raises, and the first failure ends them all.
        """
        error: BaseException | None = None
        try:
            async with aclosing(_merged([self._generator.stream(generation) for generation in self._job.generations])) as merged:
                async for prompt, deltas in merged:
                    touched = await self._feed(prompt, deltas)
                    yield [(index, self._choices[index].take()) for index in touched]
                    if not self._open:
                        return
            raise RuntimeError(f"{self._job.generations[0].id}: the stream ended with {self._open} choices open")
        except Exception as failure:
            error = failure
            raise
        finally:
            for choice in self._choices:
                if choice.finish is None:
                    self._metrics.finished("abort" if error is None else "error", choice.num_tokens, self._clock() - self._start)

    async def _feed(self, prompt: int, deltas: list[ChoiceDelta]) -> list[int]:
        """Hand the deltas to their choices; the numbers of those that had news."""
        now = self._clock()
        touched: dict[int, None] = {}
        for delta in deltas:
            index = prompt * self._n + delta.choice
            choice = self._choices[index]
            self._job.prompts[prompt].scores += delta.prompt_logprobs
            if delta.queued_s is not None:
                self._metrics.queued(delta.queued_s)
            if delta.cached_tokens is not None:
                self._cached[prompt] = delta.cached_tokens
            if delta.verified is not None:
                self.speculation = self.speculation or Speculation()
                self.speculation.add(*delta.verified)
            if choice.finish is not None:
                continue
            if delta.finish in ("cancelled", "error"):
                raise RuntimeError(f"{self._job.generations[prompt].id}: choice {delta.choice} ended with '{delta.finish}'")
            before = choice.num_tokens
            choice.feed(delta)
            touched[index] = None
            self._measure(prompt, index, choice.num_tokens - before, now)
            if choice.finish is not None:
                self._open -= 1
                self._count_prompt(prompt)
                self._metrics.finished(choice.finish, choice.num_tokens, now - self._start)
                if delta.finish is None:
                    await self._generator.finish_choice(self._job.generations[prompt].id, delta.choice)
        return list(touched)

    def _measure(self, prompt: int, index: int, gained: int, now: float) -> None:
        if not gained:
            return
        last, self._last_token[index] = self._last_token[index], now
        if last is not None:
            self._metrics.inter_token(now - last)
        elif prompt not in self._begun:
            self._metrics.first_token(now - self._start)
            self._count_prompt(prompt)
        self._metrics.generated(gained)

    def _count_prompt(self, prompt: int) -> None:
        """Once, with its first token or, where it has none, with the end of its first choice."""
        if prompt not in self._begun:
            self._begun.add(prompt)
            self._metrics.prompt(len(self._job.generations[prompt].prompt))


async def _merged(
    streams: Sequence[AsyncGenerator[list[ChoiceDelta], None]],
) -> AsyncGenerator[tuple[int, list[ChoiceDelta]], None]:
    """Items of all streams as they come, with their stream's number. Closes all streams when it ends, however it ends."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for deltas in stream:
                yield 0, deltas
        return
    # Room for one item each: a slow reader holds the streams back, and they coalesce.
    queue: asyncio.Queue[tuple[int, list[ChoiceDelta] | Exception | None]] = asyncio.Queue(maxsize=len(streams))
    pumps = [asyncio.ensure_future(_pump(number, stream, queue)) for number, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield number, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    number: int,
    stream: AsyncGenerator[list[ChoiceDelta], None],
    queue: "asyncio.Queue[tuple[int, list[ChoiceDelta] | Exception | None]]",
) -> None:
    try:
        async with aclosing(stream):
            async for deltas in stream:
                await queue.put((number, deltas))
        await queue.put((number, None))
    except Exception as failure:
        await queue.put((number, failure))
