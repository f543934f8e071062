"""The hand-over of hidden states from one pipeline stage to the next."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from parallel.groups import Group


class Handoff:
    """Hidden states from the stage before and to the next one; one rank's end, in the order of the plans.

    A plan that is known before its turn can be expected: on a CPU its tensor is then received while others are computed. What is
    sent must have the size that is received: a shorter one would leave the rest undefined, a longer one ends a gloo process.
    """

    def __init__(self, group: Group, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """group: the ranks of all stages with the same tp_rank; their rank in it is their stage."""
        self._group = group
        self._hidden_size = hidden_size
        self._dtype, self._device = dtype, device
        self._ahead = device.type == "cpu"  # a posted NCCL receive would occupy the device while it waits
        self._expected: deque[tuple[Tensor, Any]] = deque()
        self._sent: deque[tuple[Tensor, Any]] = deque()
        self._first = group.rank == 0
        self._last = group.rank == group.size - 1

    def expect(self, num_tokens: int) -> None:
        """A later plan has so many tokens; call in the order of the plans, at most once for each."""
        if not self._first and self._ahead and num_tokens:
            self._expected.append(self._post(num_tokens))

    def receive(self, num_tokens: int) -> Tensor:
        """[num_tokens, hidden] of the oldest plan whose tensor was not received yet. Raises RuntimeError after the time-out."""
        hidden, work = self._expected.popleft() if self._expected else self._post(num_tokens)
        work.wait()
        if len(hidden) != num_tokens:
            raise RuntimeError(f"expected {len(hidden)} rows from the stage before, but the plan has {num_tokens}")
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Hand [num_tokens, hidden] to the next stage without waiting for it, which takes `hidden` over."""
        if self._last:
            return
        while len(self._sent) >= 2 * self._group.size:  # more plans are hardly ever in flight, so the oldest have arrived
            self._sent.popleft()[1].wait()
        self._sent.append((hidden, self._group.send(hidden, self._group.rank + 1)))

    def _post(self, num_tokens: int) -> tuple[Tensor, Any]:
        hidden = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype, device=self._device)
        return hidden, self._group.receive(hidden, self._group.rank - 1)
