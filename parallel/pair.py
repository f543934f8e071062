"""Two ranks of different engines that exchange tensors. Whatever one of them does, or dies of, the other one goes on.

So no wait is left to NCCL, whose watchdog would end the process: before it is asked for anything both ranks have said that they are
there, and what is not done in time is called off.
"""

import time
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
        """Form a group with the other rank, which does so too, under `name`, never used before, in `store`.

        host: this node's own address. timeout_s: of each exchange. Raises RuntimeError (torch.distributed.DistError is one) where
        the other one does not come; with gloo that can take five times as long.
        """
        self.name = name
        self._cuda, self._timeout_s, self._other = device.type == "cuda", timeout_s, 1 - rank
        self._group = make_group(name, store, rank, 2, device, host, _WATCHDOG_S if self._cuda else timeout_s, line=True)

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


def meet(name: str, store: "Store", rank: int, known: Pair | None, device: torch.device, host: str, timeout_s: float) -> Pair:
    """The pair in which the two ranks that call this with the same `name`, never used before, exchange what comes next: `known`, if
    both know the same one, else a new one. Raises as Pair does; it may wait for long where the store's process is frozen."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if device.type == "cuda":
        torch.cuda.set_device(device)
    mine, theirs = f"known{rank}", f"known{1 - rank}"
    desk = PrefixStore(name, store)
    desk.set(mine, "" if known is None else known.name)
    other = desk.get(theirs).decode()
    desk.delete_key(theirs)
    if known is not None and other == known.name:
        return known
    return Pair(name, store, rank, device, host, timeout_s)
