"""Log-probabilities under the model's own distribution: before penalties, bias, temperature and filters."""

import math
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from cluster.protocol import PromptScores, TokenLogprobs
from workers.selection import where
from workers.sequences import Span

_MOST_ROWS = 256
_MOST_LOGITS = 1 << 24
"""Logits of prompt positions are made in slices, of so many rows and elements (64 MiB) at most: a long prompt has a row for each of
its positions, of which only a few numbers are wanted."""


def describe(raw: Tensor, tokens: Tensor, counts: Sequence[int], *, ranked: bool = False) -> list[TokenLogprobs]:
    """Of tokens [n] int64 under logits raw [n, vocab] fp32, with the counts[i] likeliest tokens of row i.

    ranked: say also how many tokens are likelier, plus one.
    """
    if not len(tokens):
        return []
    normalizer = raw.logsumexp(-1, keepdim=True)
    most = min(max(counts), raw.shape[1])
    values, ids = raw.topk(most, dim=-1) if most else (raw[:, :0], tokens[:, None][:, :0])
    own = raw.gather(1, tokens[:, None])
    ranks: list[int | None] = ((raw > own).sum(-1) + 1).tolist() if ranked else [None] * len(tokens)
    rows = zip((own - normalizer)[:, 0].tolist(), ids.tolist(), (values - normalizer).tolist(), counts, ranks, strict=True)
    return [TokenLogprobs(logprob, top[:count], logprobs[:count], rank) for logprob, top, logprobs, count, rank in rows]


def likeliest(raw: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """The counts[i] likeliest tokens of each row of raw [n, vocab] fp32, the first of them as the chosen one.

    Of equal ones the lowest ids come first, and are told where there is no room for all: whatever the other rows ask for.
    """
    normalizer = raw.logsumexp(-1, keepdim=True)
    most = [min(count, raw.shape[1]) for count in counts]
    values = raw.topk(max(most), dim=-1).values
    least = values.gather(1, torch.tensor(most, device=raw.device)[:, None] - 1)
    rows, ids = where(raw >= least)
    found: list[list[tuple[float, int]]] = [[] for _ in counts]
    logprobs = (raw - normalizer)[rows, ids]
    for row, minus, id in zip(rows.tolist(), (-logprobs).tolist(), ids.tolist(), strict=True):
        found[row].append((minus, id))
    told = []
    for entries, count in zip(found, most, strict=True):
        best = sorted(entries)[:count]
        top = [-minus for minus, _ in best]
        told.append(TokenLogprobs(top[0] if top else math.nan, [id for _, id in best], top))
    return told


def score_prompts(
    hidden: Tensor, spans: Sequence[Span], logits: Callable[[Tensor], Tensor], vocab_size: int, *, tell: bool = True
) -> list[PromptScores]:
    """What the spans with `scores` are to tell; nothing unless `tell`, but the logits are made, for those who make them together.

    hidden [num_tokens, hidden]: of all spans, one after the other. logits: [n, hidden] -> [n, vocab_size] fp32.
    """
    rows: list[int] = []
    tokens: list[int] = []
    counts: list[int] = []
    offset = -1  # of the row that tells of position 0 of a span that begins there
    for span in spans:
        if span.scores is not None:
            first, end = span.scores
            rows += range(offset + first - span.start, offset + end - span.start)
            tokens += span.state.tokens[first:end].tolist()
            counts += [span.state.params.prompt_logprobs or 0] * (end - first)
        offset += span.num_tokens
    told: list[TokenLogprobs] = []
    size = max(1, min(_MOST_ROWS, _MOST_LOGITS // vocab_size))
    for begin in range(0, len(rows), size):
        some = slice(begin, begin + size)
        raw = logits(hidden.index_select(0, torch.tensor(rows[some], device=hidden.device)))
        if tell:
            told += describe(raw, torch.tensor(tokens[some], device=hidden.device), counts[some], ranked=True)
    if not tell:
        return []
    of_span = iter(told)
    asked = [(span.state.seq, span.scores) for span in spans if span.scores is not None]
    return [PromptScores(seq, first, list(islice(of_span, end - first))) for seq, (first, end) in asked]
