"""Spans without a runner: for tests of the parts."""

import numpy as np

from cluster.protocol import NewSequence, SamplingParams
from workers.draws import DrawSetup
from workers.sequences import SequenceState, Span


def make_span(
    start: int, end: int, blocks: list[int], params: SamplingParams | None = None, prompt: list[int] | None = None, choice: int = 0
) -> Span:
    """A span of a sequence whose tokens are `prompt` and then 0, 1, 2 ... up to `end`."""
    ids = prompt if prompt is not None else list(range(end))
    params = params or SamplingParams(seed=0, max_tokens=1, temperature=0.0)
    new = NewSequence(choice=choice, prompt=ids, emitted=[], params=params)
    tokens = np.array(ids + list(range(end - len(ids))), dtype=np.int32)
    table = np.array(blocks, dtype=np.int32)
    state = SequenceState(0, choice, DrawSetup.of(new), len(ids), tokens, len(tokens), table, len(table), end)
    return Span(state, start, end, True)
