"""Which part of a model each rank holds: layers by pipeline stage, heads, inner features and vocabulary by tensor-parallel rank.

Sizes need not divide: shares differ by one at most (a key/value head and its query heads are never torn apart while there are as
many key/value heads as ranks). With fewer of them, ranks that share one hold a copy of it each (Shoeybi et al. 2019, Megatron-LM;
grouped-query heads as in Ainslie et al. 2023).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import ConfigError
from cluster.shape import ModelShape
from parallel.mesh import SOLO, Seat


@dataclass(frozen=True)
class Partition:
    """What one rank holds."""

    layers: range
    heads: range
    """Query heads."""
    kv_heads: range
    inner: range
    """Features between gate/up and down."""
    vocab: tuple[range, ...]
    """Rows of the embedding and of the lm_head, of each tensor-parallel rank: gathered logits must be put together."""
    tp_rank: int
    embeds: bool
    """Whether it holds the embedding: the first stage."""
    judges: bool
    """Whether it holds the last norm and the lm_head: the last stage."""

    @property
    def own_vocab(self) -> range:
        """This rank's rows."""
        return self.vocab[self.tp_rank]

    def kv_bytes_per_token(self, vector_bytes: int) -> int:
        """Bytes of K and V that one token takes here, where one head's key or value takes vector_bytes."""
        return 2 * len(self.layers) * len(self.kv_heads) * vector_bytes


def partition(shape: ModelShape, seat: Seat = SOLO, stage_layers: Sequence[int] | None = None) -> Partition:
    """The part for the rank at `seat`.

    stage_layers: how many layers each stage gets; by default balanced by cost. Raises ConfigError where there are more ranks than
    heads or more stages than layers, or where stage_layers doesn't add up.
    """
    tp = seat.mesh.tp
    smallest = min(shape.num_heads, shape.intermediate_size, shape.vocab_size)
    if tp > smallest:
        raise ConfigError(f"tp is {tp}, but the model has only {shape.num_heads} heads: at most {smallest} ranks can share a layer")
    stages = split_layers(shape, seat.mesh.pp, stage_layers)
    heads, kv_heads = _split_heads(shape, tp)[seat.tp_rank]
    return Partition(
        layers=stages[seat.stage],
        heads=heads,
        kv_heads=kv_heads,
        inner=split_evenly(shape.intermediate_size, tp)[seat.tp_rank],
        vocab=tuple(split_evenly(shape.vocab_size, tp)),
        tp_rank=seat.tp_rank,
        embeds=seat.first,
        judges=seat.last,
    )


def split_evenly(size: int, parts: int) -> list[range]:
    """Contiguous ranges whose sizes differ by one at most, the larger ones first."""
    small, larger = divmod(size, parts)
    bounds = [part * small + min(part, larger) for part in range(parts + 1)]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


def _split_heads(shape: ModelShape, tp: int) -> list[tuple[range, range]]:
    """(query heads, key/value heads) of each rank; in a rank every key/value head serves equally many query heads."""
    group = shape.num_heads // shape.num_kv_heads
    if shape.num_kv_heads >= tp:
        return [(range(r.start * group, r.stop * group), r) for r in split_evenly(shape.num_kv_heads, tp)]
    shares = []
    for kv_head, ranks in enumerate(split_evenly(tp, shape.num_kv_heads)):
        for own in split_evenly(group, len(ranks)):
            first = kv_head * group
            shares.append((range(first + own.start, first + own.stop), range(kv_head, kv_head + 1)))
    return shares


# --- stages --------------------------------------------------------------------------------------------------------


def split_layers(shape: ModelShape, pp: int, stage_layers: Sequence[int] | None = None) -> list[range]:
    """The layers of each stage: as `stage_layers` says, else so that the costliest stage costs as little as can be.

    Among such splits the one with the least sum of squares is taken, so that the rest is even too. Raises ConfigError.
    """
    if pp > shape.num_layers:
        raise ConfigError(f"pp is {pp}, but the model has only {shape.num_layers} layers")
    if stage_layers is None:
        counts = _balanced(shape, pp)
    else:
        counts = list(stage_layers)
        if len(counts) != pp or sum(counts) != shape.num_layers or min(counts) < 1:
            wanted = f"{pp} numbers of at least 1 that add up to {shape.num_layers}"
            raise ConfigError(f"stage_layers is {','.join(map(str, counts))}, but must be {wanted}")
    bounds = [sum(counts[:stage]) for stage in range(pp + 1)]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


def layer_cost(shape: ModelShape) -> int:
    """Multiplications of a layer's linears for one token, which a decode's reading of weights goes by too."""
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return shape.hidden_size * (heads + 3 * shape.intermediate_size)


def head_cost(shape: ModelShape) -> int:
    """Of the lm_head, which every decode passes through."""
    return shape.hidden_size * shape.vocab_size


def _balanced(shape: ModelShape, pp: int) -> list[int]:
    """Dynamic programming over (stages, layers): best[n] = (highest cost, sum of squares, counts) for the first n layers."""
    layer, last = layer_cost(shape), head_cost(shape)
    embedding = shape.hidden_size  # a row is looked up
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for stage in range(pp):
        extra = (embedding if stage == 0 else 0) + (last if stage == pp - 1 else 0)
        reached: dict[int, tuple[int, int, list[int]]] = {}
        for before, (highest, squares, counts) in best.items():
            for count in range(1, shape.num_layers - before - (pp - 1 - stage) + 1):
                cost = count * layer + extra
                found = (max(highest, cost), squares + cost * cost, [*counts, count])
                end = before + count
                if end not in reached or found < reached[end]:
                    reached[end] = found
        best = reached
    return best[shape.num_layers][2]
