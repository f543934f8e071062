"""Ranks as threads that share a store."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from parallel.groups import Group, make_group

Result = TypeVar("Result")
CPU = torch.device("cpu")


def together(size: int, run: Callable[[Group], Result], timeout_s: float = 20.0) -> list[Result]:
    """run(group) on each of `size` ranks at once; results by rank."""
    store = HashStore()
    done = threading.Barrier(size, timeout=2 * timeout_s)

    def rank(number: int) -> Result:
        group = make_group("test", store, number, size, CPU, "127.0.0.1", timeout_s)
        try:
            return run(group)
        finally:
            done.wait()  # a group that goes cuts its peers off

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank, range(size)))
