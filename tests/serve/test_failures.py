"""Processes that die or freeze under a stream: the client sees a pause, and the tokens of an undisturbed run."""

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Server

pytestmark = pytest.mark.serve


def named(server: Server, title: str) -> list[int]:
    """Ids of the server's processes whose title (Ray sets it to the actor's class) begins with `title`."""
    return [pid for pid in server.processes() if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode())]


def streamed(server: Server, disturb: "functools.partial[None] | None" = None) -> list[int]:
    """Tokens of a long stream; `disturb` is called at the 20th chunk."""
    stream: Any = server.client.completions.create(
        model="demo",
        prompt="def main(argv):",
        max_tokens=300,
        temperature=0.8,
        seed=7,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens: list[int] = []
    for number, chunk in enumerate(stream):
        if number == 20 and disturb is not None:
            disturb()
        tokens += chunk.choices[0].token_ids or []
    return tokens


def hit(server: Server, title: str) -> None:
    (pid,) = named(server, title)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("title", ["ray::Worker", "ray::EngineActor", "ray::SchedulerActor"])
def test_a_stream_outlives_what_is_killed_under_it(server: Server, title: str) -> None:
    undisturbed = streamed(server)
    assert len(undisturbed) == 300
    assert streamed(server, functools.partial(hit, server, title)) == undisturbed
    assert streamed(server) == undisturbed
    server.wait_for("vllm:num_requests_running", 0)
    server.wait_for("vllm:kv_cache_usage_perc", 0)
