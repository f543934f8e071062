"""Repetition penalty (Keskar et al. 2019, CTRL), presence and frequency penalties, logit bias, min_tokens: changes to a few logits
of a row.

They are functions of the tokens alone, so nothing of them is kept or sent: a resumed sequence has the same penalties.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.sequences import Span


def adjust(logits: Tensor, rows: Sequence[int], spans: Sequence[Span]) -> None:
    """Apply the penalties, the bias and the bans of spans[i] to row rows[i] of logits [n, vocab] fp32, in place."""
    _penalize(logits, rows, spans)
    _bias(logits, rows, spans)
    _ban(logits, rows, spans)


def _penalize(logits: Tensor, rows: Sequence[int], spans: Sequence[Span]) -> None:
    some = [(row, span) for row, span in zip(rows, spans, strict=True) if span.state.draws.penalized]
    if not some:
        return
    row_parts, id_parts, count_parts, repetition, presence, frequency = [], [], [], [], [], []
    for row, span in some:
        ids, counts = _seen(span)
        params = span.state.params
        row_parts.append(np.full(len(ids), row))
        id_parts.append(ids)
        count_parts.append(counts)
        repetition.append(np.full(len(ids), params.repetition_penalty, dtype=np.float32))
        presence.append(np.full(len(ids), params.presence_penalty, dtype=np.float32))
        frequency.append(np.full(len(ids), params.frequency_penalty, dtype=np.float32))
    where = (_join(logits, row_parts), _join(logits, id_parts))
    values, counted, penalty = logits[where], _join(logits, count_parts), _join(logits, repetition)
    values = torch.where(values > 0, values / penalty, values * penalty)
    values -= (counted > 0) * _join(logits, presence) + counted * _join(logits, frequency)
    logits[where] = values


def _seen(span: Span) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Distinct tokens that a penalty of `span` concerns, and how often each was put out (0 for those of the prompt alone)."""
    state = span.state
    output, counts = np.unique(state.tokens[state.num_prompt : span.end].astype(np.int64), return_counts=True)
    if not len(state.draws.prompt_ids):
        return output, counts.astype(np.float32)
    ids = np.union1d(state.draws.prompt_ids, output)
    times = np.zeros(len(ids), dtype=np.float32)
    times[np.searchsorted(ids, output)] = counts
    return ids, times


def _bias(logits: Tensor, rows: Sequence[int], spans: Sequence[Span]) -> None:
    for row, span in zip(rows, spans, strict=True):
        draws = span.state.draws
        inside = _known(draws.bias_ids, logits)
        if inside.any():
            ids = torch.from_numpy(draws.bias_ids[inside]).to(logits.device)
            logits[row, ids] += torch.from_numpy(draws.bias[inside]).to(logits.device)


def _ban(logits: Tensor, rows: Sequence[int], spans: Sequence[Span]) -> None:
    """No token ends a choice before min_tokens."""
    for row, span in zip(rows, spans, strict=True):
        stops = span.state.draws.stop_ids
        if len(stops) and span.end - span.state.num_prompt < span.state.params.min_tokens:
            logits[row, torch.from_numpy(stops[_known(stops, logits)]).to(logits.device)] = -torch.inf


def _known(ids: NDArray[np.int64], logits: Tensor) -> NDArray[np.bool_]:
    """Which ids are tokens: a stray one must not end an epoch for everyone."""
    return (ids >= 0) & (ids < logits.shape[1])


def _join(like: Tensor, parts: list[NDArray[np.float32]] | list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(like.device)
