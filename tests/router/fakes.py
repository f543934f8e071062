"""A cluster that answers what a test tells it to."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import httpx

from cluster.protocol import ClusterStatus, EngineStats, EngineStatus, TokenLogprobs
from router.api import build_api
from router.generation import ChoiceDelta, Generation
from router.metrics import RouterMetrics
from router.prepare import ServedModel
from router.tokenizer import Tokenizer

Step = list[ChoiceDelta] | Exception | Awaitable[Any]
Script = Callable[[Generation], Iterable[Step]]


NONE_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}
"""Of a usage."""


class FakeGenerator:
    """Plays a script: yields its lists, raises its exceptions, waits for its awaitables."""

    def __init__(self, script: Script, engines: int | None = 1) -> None:
        self.script = script
        self.generations: list[Generation] = []
        self.finished_choices: list[tuple[str, int]] = []
        self.closed: list[str] = []
        self.any_closed = threading.Event()
        self.cluster = None if engines is None else status_of(*(True for _ in range(engines)))

    async def stream(self, generation: Generation) -> AsyncGenerator[list[ChoiceDelta], None]:
        self.generations.append(generation)
        try:
            for step in self.script(generation):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, list):
                    await asyncio.sleep(0)
                    yield step
                else:
                    await step
        finally:
            self.closed.append(generation.id)
            self.any_closed.set()

    async def finish_choice(self, id: str, choice: int) -> None:
        self.finished_choices.append((id, choice))

    leaving = False

    def status(self) -> ClusterStatus | None:
        return self.cluster


def status_of(*ready: bool, reason: str = "") -> ClusterStatus:
    """A cluster of so many engines, ready or not."""
    engines = [
        EngineStatus(engine=f"engine-{i}", epoch=0, ready=is_ready, max_sequence_tokens=256, stats=EngineStats(), reason=reason)
        for i, is_ready in enumerate(ready)
    ]
    return ClusterStatus(engines=engines, queued=0, metrics=[])


def one_by_one(tokens: Sequence[int], finish: str | None = "length", choices: int = 1) -> list[list[ChoiceDelta]]:
    """Steps that give every choice the same tokens, one a step, with log-probabilities that tell the token."""
    return [
        [ChoiceDelta(c, [token], [], finish if i == len(tokens) - 1 else None) for c in range(choices)]  # type: ignore[arg-type]
        for i, token in enumerate(tokens)
    ]


def with_logprobs(steps: list[list[ChoiceDelta]], top: Callable[[int], dict[int, float]]) -> list[list[ChoiceDelta]]:
    """The same steps; `top` gives a token's most likely alternatives. The chosen one has -token/1000."""
    return [
        [
            ChoiceDelta(
                d.choice, d.tokens, [TokenLogprobs(-t / 1000, list(top(t)), list(top(t).values())) for t in d.tokens], d.finish
            )
            for d in step
        ]
        for step in steps
    ]


class Api:
    """The application in process, with a fake cluster."""

    def __init__(self, tokenizer: Tokenizer, served: ServedModel, script: Script = lambda _: (), engines: int | None = 1) -> None:
        self.generator = FakeGenerator(script, engines)
        self.metrics = RouterMetrics()
        self.app = build_api(self.generator, tokenizer, served, self.metrics)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request on a loop of its own."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def post(self, path: str, **body: Any) -> Any:
        """The JSON answer, which has to be 200."""
        response = self.request("POST", path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream, which has to end with [DONE]."""
        response = self.request("POST", path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def error(self, path: str, **body: Any) -> tuple[int, str | None, str | None]:
        """Status, param and code of an answer that has to be an error in OpenAI's shape."""
        response = self.request("POST", path, json=body)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "Traceback" not in response.text
        return response.status_code, error["param"], error["code"]
