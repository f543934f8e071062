"""The native draw against the oracle and against torch's, for all instruction sets."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.protocol import SamplingParams
from tests.workers.spans import make_span
from tests.workers.test_sampler import CPU, VOCAB, brute_force, cases, random_case
from workers.filters import thresholds
from workers.native.library import Library, Threads
from workers.native.picker import NativePicker
from workers.picker import TorchPicker
from workers.sampler import Sampler
from workers.sequences import Span

__all__ = ["cases"]


def drawn(sampler: Sampler, logits: torch.Tensor, spans: list[Span]) -> list[int]:
    """Tokens."""
    return [draw.token for draw in sampler.draw(logits.clone(), spans)]


def test_every_draw_is_that_of_the_oracle(library: Library, cases: tuple[torch.Tensor, list[Span]]) -> None:
    logits, spans = cases
    sampler = Sampler(NativePicker(VOCAB, Threads(library, 2)))
    expected = [brute_force(row, span) for row, span in zip(logits.tolist(), spans, strict=True)]
    assert drawn(sampler, logits, spans) == expected
    order = random.Random(4).sample(range(len(spans)), len(spans))
    assert drawn(sampler, logits[order], [spans[i] for i in order]) == [expected[i] for i in order]
    alone = Sampler(NativePicker(VOCAB, Threads(library, 1)))
    assert [token for i in range(0, len(spans), 3) for token in drawn(alone, logits[i : i + 1], [spans[i]])] == expected[::3]


@pytest.mark.parametrize("spread", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000, 50_257])
def test_draws_are_torchs(library: Library, vocab: int, spread: float) -> None:
    rng = random.Random(vocab)
    logits = torch.randn(48, vocab, generator=torch.Generator().manual_seed(1)) * spread
    logits[::5] = logits[::5].round()  # many of equal size
    spans = []
    for row in range(48):
        params = SamplingParams(
            seed=row,
            max_tokens=9,
            temperature=rng.choice([0.3, 1.0, 1.7]),
            top_k=rng.choice([0, 1, 2, 40, vocab - 1, vocab // 2, 3 * vocab]),
            top_p=rng.choice([1.0, 0.0, 0.5, 0.97]),
            min_p=rng.choice([0.0, 0.02, 1.0]),
        )
        spans.append(make_span(0, 5, [], params, [3, 1, 4, 1, 5], choice=row % 3))
    native, by_torch = Sampler(NativePicker(vocab, Threads(library, 2))), Sampler(TorchPicker(vocab, CPU))
    assert drawn(native, logits, spans) == drawn(by_torch, logits, spans)


@given(st.integers(1, 300), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_no_token_below_the_threshold_is_drawn(library: Library, vocab: int, data: st.DataObject) -> None:
    values = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -torch.inf])
    row = torch.tensor(data.draw(st.lists(values, min_size=vocab, max_size=vocab)))
    row[data.draw(st.integers(0, vocab - 1))] = 2.0
    top_k, top_p, min_p = data.draw(st.integers(0, 320)), data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    params = SamplingParams(seed=data.draw(st.integers(0, 99)), max_tokens=1, top_k=top_k, top_p=top_p, min_p=min_p)
    [token] = NativePicker(vocab, Threads(library, 1)).pick(row[None], [0], [make_span(0, 1, [], params, [0])])
    scores = (row - row.max())[None]
    assert scores[0, token] >= thresholds(scores, [params])[0, 0] - 1e-6


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 70, VOCAB - 1, slice(None)])
def test_rows_without_numbers_give_some_token_and_harm_no_other_row(library: Library, broken: float, place: int | slice) -> None:
    rng = random.Random(8)
    spans: list[Span] = []
    while len(spans) < 30:
        case = random_case(rng)
        if not (case.state.draws.greedy or case.state.draws.adjusted):
            spans.append(case)
    logits = torch.randn(30, VOCAB)
    sampler = Sampler(NativePicker(VOCAB, Threads(library, 2)))
    whole = drawn(sampler, logits, spans)
    logits[::2, place] = broken
    spoilt = drawn(sampler, logits, spans)
    assert spoilt[1::2] == whole[1::2]
    assert all(0 <= token < VOCAB for token in spoilt)
    if broken != -torch.inf or place == slice(None):
        assert spoilt[::2] == [VOCAB - 1] * 15
