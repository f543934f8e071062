"""The noise: what it is, that it is the same everywhere, and that it is random enough. Fixed seeds, one try each."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from workers.keys import position_keys, sequence_key
from workers.noise import GumbelNoise, _bound, _gumbel

CPU = torch.device("cpu")
VOCAB = 4096
M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def noise_of(seeds: list[int], choices: list[int], positions: list[int], vocab: int = VOCAB) -> torch.Tensor:
    """[n, vocab]"""
    keys = torch.from_numpy(position_keys([sequence_key(s, c) for s, c in zip(seeds, choices, strict=True)], positions))
    return all_noise(GumbelNoise(vocab, CPU), keys, vocab)


def all_noise(noise: GumbelNoise, keys: torch.Tensor, vocab: int) -> torch.Tensor:
    """[len(keys), vocab]"""
    ids = torch.arange(vocab).repeat(len(keys))
    return noise.at(keys.repeat_interleave(vocab, 0), ids).view(len(keys), vocab)


def uniforms(noise: torch.Tensor) -> NDArray[np.float64]:
    """Back from Gumbel to uniform."""
    values: NDArray[np.float64] = (-(-noise.double()).exp()).exp().numpy()
    return values


def deviation(observed: NDArray[np.int64], expected: float | NDArray[np.float64], constraints: int = 1) -> float:
    """Chi-square as a number of standard deviations from its mean; `constraints` totals of the cells are given."""
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = observed.size - constraints
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def plain_noise(seed: int, choice: int, position: int, token: int) -> float:
    """The definition, in Python's integers and doubles."""

    def split_mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & M64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
        return x ^ (x >> 31)

    def mix(x: int, key: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D + key) & M32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
        return x ^ (x >> 16)

    own = split_mix((split_mix(seed) + choice * 0x9E3779B97F4A7C15) & M64)
    key = split_mix((own + (position - 1) * 0x9E3779B97F4A7C15) & M64)  # split_mix adds one more step
    hashed = mix(mix((token * 0x7FEB352D + 0x846CA68B) & M32, 0) ^ (key & M32), key >> 32)
    u = min(((hashed & 0x7FFFFFFF) + 0.5) / 2**31, 1 - 2**-24)
    return -math.log(-math.log1p(-u))


def test_noise_is_its_definition() -> None:
    cases = [(0, 0, 1), (1, 0, 1), (2**64 - 1, 3, 77), (2**63, 0, 100_000), (12345, 127, 4)]
    seeds, choices, positions = (list(column) for column in zip(*cases, strict=True))
    noise = noise_of(seeds, choices, positions, vocab=300)
    for row, case in zip(noise, cases, strict=True):
        expected = torch.tensor([plain_noise(*case, token) for token in range(300)], dtype=torch.float64)
        torch.testing.assert_close(row.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("vocab", [1, 5, 173, 4097, 152_064])
def test_bits_do_not_depend_on_rows_places_or_vocabulary(vocab: int) -> None:
    rows = 5
    seeds, choices, positions = [9, 9, 8, 9, 7], [0, 1, 0, 0, 0], [1, 1, 1, 2, 30]
    together = noise_of(seeds, choices, positions, vocab)
    generator = torch.Generator().manual_seed(0)
    for i in range(rows):
        assert torch.equal(noise_of(seeds[i : i + 1], choices[i : i + 1], positions[i : i + 1], vocab)[0], together[i])
    keys = torch.from_numpy(position_keys([sequence_key(s, c) for s, c in zip(seeds, choices, strict=True)], positions))
    for count in (1, 3, 1000):
        row = torch.randint(rows, (count,), generator=generator)
        ids = torch.randint(vocab, (count,), generator=generator)
        assert torch.equal(GumbelNoise(vocab, CPU).at(keys[row], ids), together[row, ids])
    wider = noise_of(seeds, choices, positions, vocab + 13)
    assert torch.equal(wider[:, :vocab], together)


def test_all_of_it_at_once_is_that_of_single_tokens() -> None:
    keys = torch.from_numpy(position_keys([sequence_key(4, c) for c in range(5)], [7, 8, 9, 1, 2]))
    noise = GumbelNoise(VOCAB, CPU)
    assert torch.equal(noise.whole(keys), all_noise(noise, keys, VOCAB))


def test_all_values_are_finite() -> None:
    hashes = torch.tensor([0, -1, 1, 2**31 - 1, -(2**31), 2**31 - 2, -2], dtype=torch.int32)
    values = _gumbel(hashes)
    assert values.isfinite().all()
    assert float(values.max()) == pytest.approx(32 * math.log(2), abs=1e-3)


AXES: dict[str, Callable[[int], tuple[list[int], list[int], list[int]]]] = {
    "position": lambda n: ([17] * n, [0] * n, list(range(1, n + 1))),
    "choice": lambda n: ([17] * n, list(range(n)), [5] * n),
    "seed": lambda n: (list(range(n)), [0] * n, [5] * n),
    "high bits of the seed": lambda n: ([i << 48 for i in range(n)], [0] * n, [5] * n),
    "seed and position against each other": lambda n: (list(range(n)), [0] * n, list(range(n, 0, -1))),
}


@pytest.mark.parametrize("axis", AXES)
def test_values_are_uniform_along(axis: str) -> None:
    u = uniforms(noise_of(*AXES[axis](256)))
    bins = 512
    whole = np.bincount((u.ravel() * bins).astype(int), minlength=bins)
    assert abs(deviation(whole, u.size / bins)) < 4.5
    # Also within single rows and along the axis for single tokens: many small tests, summed up.
    cells = 16
    for values in (u, u.T):
        counts = np.stack([np.bincount((line * cells).astype(int), minlength=cells) for line in values])
        assert abs(deviation(counts.ravel(), values.shape[1] / cells, constraints=len(counts))) < 4.5


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("distance", [1, 2, 3, 64])
def test_neighbours_are_independent_along(axis: str, distance: int) -> None:
    u = uniforms(noise_of(*AXES[axis](256)))
    cells = 16
    cell = (u * cells).astype(int)
    for first, second in ((cell[:-distance], cell[distance:]), (cell[:, :-distance], cell[:, distance:])):
        pairs = np.bincount((first * cells + second).ravel(), minlength=cells * cells)
        assert abs(deviation(pairs, first.size / cells**2)) < 4.5
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(first.size)


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_one_bit_of_the_seed_changes_everything(bit: int) -> None:
    seeds = [s for i in range(64) for s in (i * 977, (i * 977) ^ (1 << bit))]
    u = uniforms(noise_of(seeds, [0] * len(seeds), [9] * len(seeds)))
    cell = (u * 16).astype(int)
    pairs = np.bincount((cell[::2] * 16 + cell[1::2]).ravel(), minlength=256)
    assert abs(deviation(pairs, cell[::2].size / 256)) < 4.5


def test_the_upper_tail_is_a_gumbel_tail() -> None:
    noise = noise_of(list(range(512)), [0] * 512, [3] * 512)
    for value in (3.0, 6.0, 9.0):
        expected = noise.numel() * -math.expm1(-math.exp(-value))
        assert abs(int((noise > value).sum()) - expected) < 4.5 * math.sqrt(expected)


def test_arg_max_draws_from_the_softmax() -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    n = 20_000
    drawn = (logits + noise_of([33] * n, [2] * n, list(range(n)), vocab=24)).argmax(-1)
    observed = drawn.bincount(minlength=24).numpy()
    assert abs(deviation(observed, (logits.double().softmax(-1) * n).numpy())) < 4.5


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 8.0])
def test_contenders_are_few_and_the_winner_is_among_them(spread: float) -> None:
    rows = 400
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(rows, VOCAB, generator=generator) * spread
    keys = torch.from_numpy(position_keys([sequence_key(1, 0)] * rows, list(range(rows))))
    noise = GumbelNoise(VOCAB, CPU)
    contenders = noise.contenders(scores, keys)
    scores += all_noise(noise, keys, VOCAB)
    assert contenders.gather(1, scores.argmax(-1, keepdim=True)).all()
    assert float(contenders.sum()) / rows < 3


def test_the_bound_is_one_for_all_hashes() -> None:
    edges = [sign * (1 << bits) + step for bits in range(31) for sign in (1, -1) for step in (-1, 0, 1)]
    random = torch.randint(-(2**31), 2**31, (1 << 20,), generator=torch.Generator().manual_seed(4))
    hashes = torch.cat((torch.tensor(edges), random)).to(torch.int32)
    gap = _bound(hashes.clone()) - _gumbel(hashes.clone())
    assert float(gap.min()) > 5e-4
