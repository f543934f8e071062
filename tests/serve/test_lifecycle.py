"""Starting and stopping: the queue's bound, and what is left when a server has been stopped."""

import functools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Server, start_server

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One sequence at a time, and one request in the queue."""
    log = tmp_path_factory.mktemp("tiny") / "log"
    server = start_server(log, "--max-num-seqs", "1", "--max-queue", "1", "--dtype", "float32")
    yield server
    if server.process.poll() is None:
        server.stop()


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_a_stream_goes_on_when_its_worker_is_killed(tiny: Server) -> None:
    ask = functools.partial(
        tiny.client.completions.create, model="demo", prompt="class Reader:\n", max_tokens=500, temperature=0.9, seed=11
    )
    undisturbed: Any = ask(extra_body={"ignore_eos": True})
    stream: Any = ask(stream=True, extra_body={"ignore_eos": True})
    text = next(stream).choices[0].text
    workers = [process for process in tiny.processes() if _command(process).startswith("ray::Worker")]
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == undisturbed.choices[0].text
    assert tiny.gauge("rayline:engine_epochs_total") >= 2


def test_a_full_queue_is_a_429_and_ctrl_c_leaves_nothing(tiny: Server) -> None:
    statuses: list[tuple[int, dict[str, str]]] = []
    body = b'{"model": "demo", "prompt": "x", "max_tokens": 400, "ignore_eos": true}'

    def ask() -> None:
        status, headers, _ = tiny.request("/v1/completions", body)
        statuses.append((status, headers))

    # The engine takes one to run and one to have at hand, the queue holds one; of eight at once, some find no place.
    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    refused = [headers for status, headers in statuses if status == 429]
    assert {status for status, _ in statuses} == {200, 429}
    assert all(int({k.lower(): v for k, v in headers.items()}["retry-after"]) >= 1 for headers in refused)

    assert len(tiny.processes()) > 5
    assert tiny.stop() == 0
    assert tiny.processes() == []
