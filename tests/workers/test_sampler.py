"""The sampler against a brute-force reading of SamplingParams' docstring, one token at a time in Python."""

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from cluster.protocol import SamplingParams
from tests.workers.spans import make_span
from tests.workers.test_noise import deviation, plain_noise
from workers.filters import _edge, _nucleus_edge, thresholds
from workers.picker import Picker, TorchPicker
from workers.sampler import Sampler
from workers.selection import argmax, largest, where
from workers.sequences import Span

CPU = torch.device("cpu")
VOCAB = 173


def sampler_of(vocab: int, picker: Picker | None = None) -> Sampler:
    """By torch, unless said otherwise."""
    return Sampler(picker or TorchPicker(vocab, CPU))


def adjusted(logits: list[float], span: Span) -> list[float]:
    """After penalties and bias."""
    p = span.state.params
    prompt = span.state.tokens[: span.state.num_prompt].tolist()
    counts = Counter(span.state.tokens[span.state.num_prompt : span.end].tolist())
    out = []
    for token, value in enumerate(logits):
        if token in counts or token in prompt:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        value -= p.presence_penalty * (token in counts) + p.frequency_penalty * counts[token]
        banned = token in p.stop_token_ids and span.end - span.state.num_prompt < p.min_tokens
        out.append(-math.inf if banned else value + p.logit_bias.get(token, 0.0))
    return out


def kept(scores: list[float], p: SamplingParams) -> set[int]:
    """What top_k, then top_p, then min_p leave of scores = logits / temperature."""
    order = sorted(range(len(scores)), key=lambda t: -scores[t])
    if 0 < p.top_k < len(order):
        order = [t for t in order if scores[t] >= scores[order[p.top_k - 1]]]
    weights = {t: math.exp(scores[t] - scores[order[0]]) for t in order}
    total, nucleus = sum(weights.values()), []
    for t in order:
        above = sum(w for other, w in weights.items() if scores[other] > scores[t])
        if p.top_p >= 1 or above < p.top_p * total:
            nucleus.append(t)
    return {t for t in nucleus if weights[t] >= p.min_p}


def brute_force(logits: list[float], span: Span) -> int:
    """The token that must be drawn."""
    p = span.state.params
    values = adjusted(logits, span)
    if p.temperature == 0:
        return max(range(len(values)), key=lambda t: values[t])
    scores = [v / p.temperature for v in values]
    noisy = {t: scores[t] + plain_noise(p.seed, span.state.choice, span.end, t) for t in kept(scores, p)}
    return max(noisy, key=lambda t: noisy[t])


def random_case(rng: random.Random) -> Span:
    """Any mixture of parameters on any history."""
    params = SamplingParams(
        seed=rng.getrandbits(64),
        max_tokens=99,
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 2.5]),
        top_k=rng.choice([0, 0, 1, 5, 60, VOCAB, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.1, 0.6, 0.95, 0.9999]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5, -1.0]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.7, -0.4]),
        logit_bias=rng.choice([{}, {}, {3: 4.0, 100: -100.0}, dict.fromkeys(range(0, VOCAB, 3), 1.0)]),
        stop_token_ids=rng.choice([(), (5,), tuple(range(0, VOCAB, 2)), (VOCAB + 3, -1, 100)]),
        min_tokens=rng.choice([0, 1, 40, 41]),
    )
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
    end = len(prompt) + rng.choice([0, 0, 1, 40])
    return make_span(0, end, [], params, prompt, choice=rng.randrange(4))


@pytest.fixture(scope="module")
def cases() -> tuple[torch.Tensor, list[Span]]:
    """300 rows and their spans."""
    rng = random.Random(2)
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(300, 1, generator=generator) * 5
    return torch.randn(300, VOCAB, generator=generator) * scale, [random_case(rng) for _ in range(300)]


def test_every_draw_is_that_of_the_oracle(cases: tuple[torch.Tensor, list[Span]]) -> None:
    logits, spans = cases
    drawn = [draw.token for draw in sampler_of(VOCAB).draw(logits.clone(), spans)]
    assert drawn == [brute_force(row, span) for row, span in zip(logits.tolist(), spans, strict=True)]


def test_a_draw_does_not_depend_on_the_rest_of_the_batch(cases: tuple[torch.Tensor, list[Span]]) -> None:
    logits, spans = cases
    sampler = sampler_of(VOCAB)
    together = [draw.token for draw in sampler.draw(logits.clone(), spans)]
    rng = random.Random(4)
    order = rng.sample(range(len(spans)), len(spans))
    shuffled = sampler.draw(logits[order].clone(), [spans[i] for i in order])
    assert [draw.token for draw in shuffled] == [together[i] for i in order]
    for i in range(0, len(spans), 3):
        assert sampler.draw(logits[i : i + 1].clone(), [spans[i]])[0].token == together[i]


def test_logprobs_are_the_models_own_whatever_is_done_to_the_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB) * 3
    expected = logits.double().log_softmax(-1)
    heavy = {"repetition_penalty": 1.8, "logit_bias": {5: 50.0}, "top_k": 3, "temperature": 0.5}
    asked = [0, None, 4, VOCAB + 10]
    spans = [make_span(0, 9, [], SamplingParams(seed=i, max_tokens=9, logprobs=k, **heavy)) for i, k in enumerate(asked)]  # type: ignore[arg-type]
    draws = sampler_of(VOCAB).draw(logits.clone(), spans)
    for draw, row, k in zip(draws, expected, asked, strict=True):
        if k is None:
            assert draw.logprobs is None
            continue
        assert draw.logprobs is not None
        assert draw.logprobs.logprob == pytest.approx(float(row[draw.token]), abs=1e-5)
        count = min(k, VOCAB)
        assert draw.logprobs.top_ids == row.topk(count).indices.tolist()
        assert draw.logprobs.top_logprobs == pytest.approx(row.topk(count).values.tolist(), abs=1e-5)


def test_greedy_with_logprobs_names_the_likeliest_token() -> None:
    logits = torch.randn(1, VOCAB)
    params = SamplingParams(seed=0, max_tokens=1, temperature=0.0, logprobs=1)
    [draw] = sampler_of(VOCAB).draw(logits.clone(), [make_span(0, 3, [], params)])
    assert draw.logprobs is not None
    assert draw.logprobs.top_ids == [draw.token] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-300, 1e-12, 1e-4])
def test_very_low_temperatures_are_greedy_and_not_nan(temperature: float) -> None:
    logits = torch.randn(3, VOCAB) * 20
    params = SamplingParams(seed=1, max_tokens=1, temperature=temperature, top_p=0.9)
    draws = sampler_of(VOCAB).draw(logits.clone(), [make_span(0, n, [], params) for n in (1, 2, 3)])
    assert [draw.token for draw in draws] == logits.argmax(-1).tolist()


def test_a_bias_of_a_token_that_does_not_exist_is_harmless() -> None:
    params = SamplingParams(seed=0, max_tokens=1, temperature=0.0, logit_bias={VOCAB: 100.0, -1: 100.0, 7: 100.0})
    [draw] = sampler_of(VOCAB).draw(torch.randn(1, VOCAB), [make_span(0, 3, [], params)])
    assert draw.token == 7


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 2.0}, {"top_p": 0.5}, {"top_k": 3, "temperature": 0.1}])
def test_no_stop_token_before_min_tokens_however_likely(params: dict[str, Any]) -> None:
    """Up to the first position at which it may come, and there it comes."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 60.0
    every = SamplingParams(seed=3, max_tokens=9, min_tokens=2, stop_token_ids=(7,), logit_bias={7: 100.0}, **params)
    drawn = [
        sampler_of(VOCAB).draw(logits.clone(), [make_span(0, 4 + emitted, [], every, prompt=[1, 7, 7, 2])])[0].token
        for emitted in range(4)
    ]
    assert [token == 7 for token in drawn] == [False, False, True, True]


def test_filtered_draws_follow_the_filtered_softmax() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(6)) * 2
    n = 3000
    params = SamplingParams(seed=11, max_tokens=1, temperature=1.3, top_k=25, top_p=0.9)
    spans = [make_span(0, position, [], params, prompt=[1]) for position in range(1, n + 1)]
    drawn = [draw.token for draw in sampler_of(40).draw(logits.expand(n, -1).clone(), spans)]
    left = sorted(kept((logits.double() / 1.3).tolist(), params))
    probabilities = (logits.double()[left] / 1.3).softmax(-1).numpy()
    observed = np.bincount(drawn, minlength=40)
    assert observed.sum() == observed[left].sum()
    assert abs(deviation(observed[left], probabilities * n)) < 4.5


def test_equal_scores_stay_or_go_together() -> None:
    scores = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0, -2.0]])
    for top_k, count in ((1, 1), (2, 4), (4, 4), (5, 6)):
        params = SamplingParams(seed=0, max_tokens=1, top_k=top_k)
        assert int((scores >= thresholds(scores, [params])).sum()) == count


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_nuclei_of_any_size_in_a_large_vocabulary(spread: float) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(6, 9000, generator=generator) * spread
    scores = logits - logits.amax(-1, keepdim=True)
    shares = [0.001, 0.2, 0.5, 0.9, 0.99, 0.999999]
    limits = thresholds(scores, [SamplingParams(seed=0, max_tokens=1, top_p=share) for share in shares])
    for row, limit, share in zip(scores, limits, shares, strict=True):
        probabilities = row.double().softmax(-1)
        inside = row >= limit
        smallest = row[inside].min()
        assert float(probabilities[inside].sum()) >= share - 1e-9
        assert float(probabilities[row > smallest].sum()) < share + 1e-9


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0, 40.0])
def test_the_nucleus_found_by_buckets_is_that_found_by_sorting(spread: float) -> None:
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(9)) * spread
    scores = logits - logits.amax(-1, keepdim=True)
    shares = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    top = scores.sort(-1, descending=True).values
    mass = top.exp().to(torch.float64).cumsum(-1)
    by_sorting = _edge(top, mass, shares * mass[:, -1])
    assert torch.equal(_nucleus_edge(scores, shares.numpy()), by_sorting)


@pytest.mark.parametrize("count", [1, 2, 50, 999, 1000])
def test_largest_is_topk(count: int) -> None:
    scores = torch.randn(7, 1000)
    assert torch.equal(largest(scores, count), scores.topk(count).values)


@pytest.mark.parametrize("n", [1, 100, 127, 128, 129, 173, 256, 1000])
def test_argmax_is_the_first_of_the_largest(n: int) -> None:
    scores = torch.randint(0, 9, (200, n), generator=torch.Generator().manual_seed(n)).float()
    expected = [int(np.argmax(row)) for row in scores.numpy()]
    assert argmax(scores).tolist() == expected


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_where_names_rows_and_columns(share: float) -> None:
    mask = torch.rand(13, 77, generator=torch.Generator().manual_seed(1)) < share
    rows, columns = where(mask)
    assert torch.equal(torch.stack((rows, columns), 1), mask.nonzero())


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1}]
)
def test_rows_without_numbers_give_some_token_and_harm_no_other_row(broken: float, params: dict[str, float]) -> None:
    torch.manual_seed(5)
    logits = torch.randn(3, VOCAB)
    every = SamplingParams(seed=1, max_tokens=1, logprobs=2, **params)  # type: ignore[arg-type]
    spans = [make_span(0, n, [], every) for n in (4, 5, 6)]
    whole = [draw.token for draw in sampler_of(VOCAB).draw(logits.clone(), spans)]
    logits[1] = broken
    drawn = [draw.token for draw in sampler_of(VOCAB).draw(logits, spans)]
    assert drawn[::2] == whole[::2]
    assert 0 <= drawn[1] < VOCAB
