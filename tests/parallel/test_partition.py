"""Who holds what: everything once (key/value heads at least once), evenly, and what cannot be divided is said."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ConfigError
from cluster.shape import ModelShape
from parallel.mesh import Mesh
from parallel.partition import head_cost, layer_cost, partition, split_layers

SHAPE = ModelShape(
    family="llama",
    vocab_size=173,
    hidden_size=48,
    intermediate_size=72,
    num_layers=5,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    windows=(None,) * 5,
    tied_embeddings=False,
    qk_norm=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    dtype="float32",
)


@given(
    kv_heads=st.integers(1, 9), group=st.integers(1, 9), tp=st.integers(1, 12), inner=st.integers(1, 80), vocab=st.integers(1, 80)
)
def test_ranks_hold_every_part(kv_heads: int, group: int, tp: int, inner: int, vocab: int) -> None:
    shape = dataclasses.replace(SHAPE, num_kv_heads=kv_heads, num_heads=kv_heads * group, intermediate_size=inner, vocab_size=vocab)
    mesh = Mesh(tp, 1)
    if tp > min(kv_heads * group, inner, vocab):
        with pytest.raises(ConfigError, match="tp is"):
            partition(shape, mesh.seat(0))
        return
    parts = [partition(shape, mesh.seat(rank)) for rank in range(tp)]
    assert [head for part in parts for head in part.heads] == list(range(kv_heads * group))
    assert [feature for part in parts for feature in part.inner] == list(range(inner))
    assert [row for part in parts for row in part.own_vocab] == list(range(vocab))
    assert {head for part in parts for head in part.kv_heads} == set(range(kv_heads))
    for part in parts:
        assert len(part.heads) % len(part.kv_heads) == 0
        served = len(part.heads) // len(part.kv_heads)
        for i, head in enumerate(part.heads):  # each query head finds its key/value head where uniform grouping looks for it
            assert part.kv_heads[i // served] == head // group
    for held in ([len(part.inner) for part in parts], [len(part.own_vocab) for part in parts]):
        assert max(held) - min(held) <= 1


@given(layers=st.integers(1, 9), pp=st.integers(1, 9), vocab=st.integers(1, 4000))
def test_stages_cost_as_little_as_can_be(layers: int, pp: int, vocab: int) -> None:
    shape = dataclasses.replace(SHAPE, num_layers=layers, vocab_size=vocab)
    if pp > layers:
        with pytest.raises(ConfigError, match="only"):
            split_layers(shape, pp)
        return

    def cost(counts: list[int]) -> int:
        each = [count * layer_cost(shape) for count in counts]
        each[0] += shape.hidden_size
        each[-1] += head_cost(shape)
        return max(each)

    found = split_layers(shape, pp)
    assert [layer for stage in found for layer in stage] == list(range(layers))
    cuts = itertools.combinations(range(1, layers), pp - 1)
    ways = [[b - a for a, b in itertools.pairwise((0, *cut, layers))] for cut in cuts]
    assert cost([len(stage) for stage in found]) == min(map(cost, ways))


def test_a_large_head_leaves_its_stage_fewer_layers() -> None:
    shape = dataclasses.replace(SHAPE, num_layers=12, vocab_size=3 * layer_cost(SHAPE) // SHAPE.hidden_size)
    assert [len(stage) for stage in split_layers(shape, 3)] == [5, 5, 2]


def test_an_explicit_split_is_taken_or_refused() -> None:
    assert split_layers(SHAPE, 2, (1, 4)) == [range(1), range(1, 5)]
    for wrong in ((1, 3), (5, 0), (1, 1, 3), (6, -1)):
        with pytest.raises(ConfigError, match="stage_layers is"):
            split_layers(SHAPE, 2, wrong)


def test_stages_hold_their_ends_of_the_model() -> None:
    mesh = Mesh(2, 3)
    parts = [partition(SHAPE, mesh.seat(rank)) for rank in range(6)]
    assert [part.embeds for part in parts] == [True, True, False, False, False, False]
    assert [part.judges for part in parts] == [False, False, False, False, True, True]
    assert parts[2].layers == parts[3].layers
    assert parts[0].kv_bytes_per_token(8 * 4) == 2 * len(parts[0].layers) * 2 * 8 * 4


def test_plans_reach_every_rank_once() -> None:
    mesh = Mesh(3, 4)
    reached = [0]
    for rank in reached:
        reached += mesh.seat(rank).followers
    assert sorted(reached) == list(range(mesh.size))
    assert mesh.seat(0).followers == [3, 1, 2]
    assert mesh.seat(9).followers == [10, 11]
