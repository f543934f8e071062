"""Two ranks of different engines that exchange tensors. Whatever one of them does, or dies of, the other one goes on.

So no wait is without a bound, and none is left to NCCL, whose watchdog would end the process: before it is asked for anything both
ranks have said that they are there, and what is not done in time is called off.
"""

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel.groups import make_group

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

GIVER, TAKER = 0, 1
_WATCHDOG_S = 3600.0
_POLL_S = 0.0005


class Pair:
    """One end of it. After an exception it is of no use any more."""

    def __init__(self, name: str, store: "Store", rank: int, device: torch.device, host: str, timeout_s: float) -> None:
        """Meet the other rank under `name`, never used before, in `store`, within `timeout_s`: for each exchange there is as long.

        host: this node's own address. Raises RuntimeError (torch.distributed.DistError is one) where the other one does not come.
        """
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        mine = PrefixStore(name, store)
        mine.set(f"here{rank}", "")
        mine.wait([f"here{1 - rank}"], timedelta(seconds=timeout_s))
        self._cuda, self._timeout_s, self._other = device.type == "cuda", timeout_s, 1 - rank
        self._group = make_group("pair", mine, rank, 2, device, host, _WATCHDOG_S if self._cuda else timeout_s, line=True)

    def send(self, x: Tensor) -> None:
        """Returns when x may change. Raises RuntimeError where that takes too long, or the other one is gone."""
        self._finish(self._group.send(x, self._other))

    def receive(self, x: Tensor) -> None:
        """Returns when x is filled. Raises RuntimeError as send() does."""
        self._finish(self._group.receive(x, self._other))

    def _finish(self, work: Any) -> None:
        if not self._cuda:
            work.wait()
            return
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                self._group.abort()
                raise RuntimeError(f"the other rank did not answer for {self._timeout_s:.1f} s")
            time.sleep(_POLL_S)
