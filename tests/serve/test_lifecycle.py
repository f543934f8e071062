"""Starting and stopping: the queue's bound, and what is left when a server has been stopped."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import Server, start_server

pytestmark = pytest.mark.serve


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Server]:
    """One sequence at a time, and one request in the queue."""
    server = start_server(tmp_path / "log", "--max-num-seqs", "1", "--max-queue", "1")
    yield server
    if server.process.poll() is None:
        server.stop()


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
