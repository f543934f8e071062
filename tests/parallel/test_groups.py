"""Exchanges between ranks: what they give, to the bit, and that they end."""

import time

import pytest
import torch

from parallel.groups import SOLO_GROUP, Group
from tests.parallel.ranks import together


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_made_in_the_order_of_the_ranks_on_each(size: int, dtype: torch.dtype) -> None:
    parts = [torch.randn(7, 33, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(size)]
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part
    for summed in together(size, lambda group: group.all_reduce(parts[group.rank].clone())):
        assert summed.dtype == dtype
        assert torch.equal(summed, expected.to(dtype))


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours() -> None:
    rows = [torch.randn(64, 48, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]

    def sums(group: Group) -> tuple[torch.Tensor, list[torch.Tensor]]:
        mine = rows[group.rank]
        return group.all_reduce(mine.clone()), [group.all_reduce(mine[i : i + 3].clone()) for i in range(0, 60, 3)]

    for whole, pieces in together(4, sums):
        assert torch.equal(torch.cat(pieces), whole[:60])


def test_gathering_keeps_the_order() -> None:
    gathered = together(3, lambda group: group.all_gather(torch.full((2, 2), float(group.rank))))
    for found in gathered:
        assert found[:, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_a_rank_alone_exchanges_nothing() -> None:
    x = torch.randn(3, 4)
    assert SOLO_GROUP.all_reduce(x) is x
    assert torch.equal(SOLO_GROUP.all_gather(x)[0], x)


def test_an_exchange_that_a_rank_does_not_join_ends() -> None:
    def one_stays_away(group: Group) -> float:
        began = time.monotonic()
        if group.rank == 0:
            with pytest.raises(RuntimeError):
                group.all_reduce(torch.ones(2, 2))
            return time.monotonic() - began
        return 0.0

    assert together(2, one_stays_away, timeout_s=1.0)[0] < 15.0
