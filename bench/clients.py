"""Streams of requests over HTTP, and what their clients see: when tokens come, and which.

A closed loop of C streams: each asks, reads its answer to the end, and takes the next request that is left, until none is. All
requests end where they were asked to (ignore_eos), so every run of the same requests makes the same number of tokens.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from bench.workload import Job

_LIMIT_S = 1200.0
"""For one answer, its time in queues included."""
TOGETHER_S = 0.001
"""What comes within so long of a delivery's first token belongs to it: a client or proxy that was held up finds several waiting."""


@dataclass
class Answer:
    """What came back for one request. Times are of time.perf_counter."""

    sent: float
    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    """When tokens came: one for each delivery, the time of its first token."""
    ended: float = 0.0
    error: str = ""

    @property
    def first_token_s(self) -> float | None:
        """From asking to the first token."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def gaps_s(self) -> list[float]:
        """Between deliveries."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Run:
    """One closed loop from the first request to the last token."""

    answers: Sequence[Answer]
    seconds: float
    cpu_s: float
    """What this process, the clients, took of a core."""

    @property
    def failed(self) -> list[Answer]:
        """Those that did not give all they were asked for."""
        return [answer for answer in self.answers if answer.error]

    @property
    def output_tokens(self) -> int:
        """Of all answers."""
        return sum(len(answer.tokens) for answer in self.answers)

    def first_token_ms(self, percent: float) -> float | None:
        """Percentile over requests."""
        return percentile([1000 * s for answer in self.answers if (s := answer.first_token_s) is not None], percent)

    def inter_token_ms(self, percent: float) -> float | None:
        """Percentile over all deliveries after a request's first."""
        return percentile([1000 * gap for answer in self.answers for gap in answer.gaps_s], percent)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """With linear interpolation between ranks; None of nothing."""
    return float(np.percentile(values, percent)) if len(values) else None


def body(job: Job, **parameters: Any) -> dict[str, Any]:
    """A request of /v1/completions: greedy unless `parameters` say otherwise."""
    fixed = {"max_tokens": job.output_tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}
    return {"prompt": job.prompt, "temperature": 0.0, **fixed, **parameters}


def run(url: str, bodies: Sequence[dict[str, Any]], streams: int) -> Run:
    """All requests through a closed loop of `streams`; answers in the order of `bodies`."""
    return asyncio.run(_closed_loop(url, bodies, streams))


async def _closed_loop(url: str, bodies: Sequence[dict[str, Any]], streams: int) -> Run:
    answers: dict[int, Answer] = {}
    left = iter(range(len(bodies)))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=_LIMIT_S, trust_env=False) as client:

        async def stream() -> None:
            for number in left:
                answers[number] = await _ask(client, bodies[number])

        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(stream() for _ in range(streams)))
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return Run([answers[number] for number in range(len(bodies))], seconds, cpu_s)


async def _ask(client: httpx.AsyncClient, asked: dict[str, Any]) -> Answer:
    answer = Answer(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=asked) as response:
            if response.status_code != 200:
                answer.error = f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}"
            else:
                rest = b""
                async for read in response.aiter_bytes():
                    *lines, rest = (rest + read).split(b"\n")
                    _take(answer, lines)
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    if not answer.error and len(answer.tokens) != asked["max_tokens"]:
        answer.error = f"{len(answer.tokens)} tokens came, but {asked['max_tokens']} were asked for"
    return answer


def _take(answer: Answer, lines: Sequence[bytes]) -> None:
    """Lines of server-sent events."""
    before = len(answer.tokens)
    for line in lines:
        if not line.startswith(b"data: ") or line.rstrip() == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            answer.error = str(event["error"].get("message"))
        for choice in event.get("choices", ()):
            answer.tokens += choice.get("token_ids") or ()
    now = time.perf_counter()
    if len(answer.tokens) > before and not (answer.arrivals and now - answer.arrivals[-1] < TOGETHER_S):
        answer.arrivals.append(now)
