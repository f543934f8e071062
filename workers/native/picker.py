"""Tokens drawn by the native kernels (sample.h), the rows of a batch shared by the threads of a step."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from workers.filters import lowest_score
from workers.native.library import Threads, address
from workers.picker import noise_keys
from workers.sequences import Span

_DRAWING = np.dtype(
    [("row", "i8"), ("top_p", "f8"), ("temperature", "f4"), ("lowest", "f4"), ("top_k", "i8"), ("keys", "u4", (2,))], align=True
)
"""Drawing in sample.h."""


class NativePicker:
    """See workers.picker.Picker."""

    def __init__(self, vocab_size: int, threads: Threads) -> None:
        self._threads = threads
        self._draws = threads.library.make("draws", self, vocab_size, threads.handle)

    def pick(self, logits: Tensor, rows: Sequence[int], spans: Sequence[Span]) -> list[int]:
        """See Picker."""
        drawings, tokens = np.empty(len(rows), _DRAWING), np.empty(len(rows), np.int64)
        params = [span.state.params for span in spans]
        drawings["row"] = rows
        drawings["top_p"] = [p.top_p for p in params]
        drawings["temperature"] = [p.temperature for p in params]
        drawings["lowest"] = [lowest_score(p) for p in params]
        drawings["top_k"] = [p.top_k for p in params]
        drawings["keys"] = noise_keys(spans).view(np.uint32)
        logits = logits.contiguous()
        with self._threads as threads:
            threads.library.run(
                "draw", self._draws, logits.data_ptr(), address(drawings), len(rows), address(tokens), threads.handle
            )
        return tokens.tolist()
