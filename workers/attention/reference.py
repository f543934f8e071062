"""The oracle: softmax(Q Kᵀ / sqrt(d)) V in fp32, one sequence at a time, as in Vaswani et al. 2017. Slow and easy to check."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv.pool import KVPool
from workers.attention.spans import PagedSpans


@dataclass(frozen=True)
class ReferenceAttention:
    """Reads everything from the pool."""

    pool: KVPool
    windows: Sequence[int | None]

    def prepare(self, spans: PagedSpans) -> "ReferenceStep":
        """No metadata beyond the spans themselves."""
        return ReferenceStep(self.pool, self.windows, spans)


@dataclass(frozen=True)
class ReferenceStep:
    """One iteration's spans."""

    pool: KVPool
    windows: Sequence[int | None]
    spans: PagedSpans

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See AttentionStep; keys and values are not looked at."""
        outputs = []
        for i, (start, end) in enumerate(zip(self.spans.start.tolist(), self.spans.end.tolist(), strict=True)):
            table = torch.from_numpy(self.spans.table(i)).to(queries.device)
            rows = slice(int(self.spans.first_row[i]), int(self.spans.first_row[i + 1]))
            context_k, context_v = (context[:end] for context in self.pool.read(layer, table, torch.float32))
            outputs.append(causal_attention(queries[rows].float(), context_k, context_v, start, self.windows[layer]))
        return torch.cat(outputs).flatten(1).to(queries.dtype)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None = None) -> Tensor:
    """Grouped-query attention of n queries at positions [start, start + n) over all of [0, start + n), or the last `window` of them
    up to each query's own.

    queries [n, num_heads, head_dim], keys and values [start + n, num_kv_heads, head_dim] -> [n, num_heads, head_dim].
    """
    n, num_heads, head_dim = queries.shape
    group = num_heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / head_dim**0.5
    hidden = torch.ones(n, start + n, dtype=torch.bool, device=queries.device).triu(start + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(start - window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
