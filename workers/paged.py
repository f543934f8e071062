"""A decoder over its paged pool: spans of sequences in, hidden states out."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.protocol import StepPlan, Transfer
from kv.pool import HostBlocks, KVPool
from workers.attention import PagedSpans
from workers.decoder import Decoder, TokenBatch
from workers.sequences import PlanError, Span, moves


class PagedModel:
    """A rank's part of a model, with the keys and values of all blocks that its engine gives out."""

    def __init__(self, decoder: Decoder, pool: KVPool, host: HostBlocks | None = None) -> None:
        """host: memory for blocks that the pool has no room for, where there is some."""
        self.decoder, self.pool, self.host = decoder, pool, host
        self.device = pool.device
        layers = decoder.part.layers
        self._attention = decoder.kernels.attention(pool, decoder.shape.windows[layers.start : layers.stop], decoder.dtype)

    def move(self, plan: StepPlan) -> None:
        """Run copies and transfers. On CUDA they only stand in the line of what is to be done: nothing waits."""
        for move in moves(plan):
            if not isinstance(move, Transfer):
                self.pool.copy_blocks(move)
            elif self.host is None:
                raise PlanError("a plan wants host memory, but none was set up")
            elif move.kind == "store":
                self.host.store(move.blocks, move.slots)
            else:
                self.host.load(move.slots, move.blocks)

    def forward(self, spans: Sequence[Span], incoming: Tensor | None = None) -> Tensor:
        """Run the spans as one flat batch; `incoming` and what is returned are as in Decoder.forward."""
        paged = PagedSpans.of(spans, self.pool.block_size)
        positions = paged.positions()
        rows = np.stack((np.concatenate([span.ids for span in spans]), positions, paged.slots(positions)))
        ids, positions_there, slots = self.to_device(rows).unbind()
        batch = TokenBatch(ids, positions_there, slots, self._attention.prepare(paged))
        return self.decoder.forward(batch, self.pool, incoming)

    def to_device(self, array: "np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.int64]]") -> Tensor:
        """As int64. From pageable memory, non_blocking returns once the array was taken: nothing waits for the device, and the
        array may go."""
        return torch.from_numpy(array.astype(np.int64, copy=False)).to(self.device, non_blocking=True)
