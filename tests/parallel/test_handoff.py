"""Hidden states from stage to stage: in order, whether they were expected early or not."""

import pytest
import torch

from parallel.groups import Group
from parallel.handoff import Handoff
from tests.parallel.ranks import CPU, together

SIZES = [5, 1, 300, 2, 2, 64, 1, 1, 7, 40, 3, 9]


def states(plan: int) -> torch.Tensor:
    return torch.randn(SIZES[plan], 16, generator=torch.Generator().manual_seed(plan))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_stages_hand_on_in_order(ahead: int) -> None:
    kept = []

    def stage(group: Group) -> list[torch.Tensor]:
        handoff = Handoff(group, 16, torch.float32, CPU)
        kept.append(handoff)  # what it has not sent yet goes with it
        seen = []
        for plan in range(min(ahead, len(SIZES))):
            handoff.expect(SIZES[plan])
        for plan, size in enumerate(SIZES):
            if ahead and plan + ahead < len(SIZES):
                handoff.expect(SIZES[plan + ahead])
            hidden = states(plan) if group.rank == 0 else handoff.receive(size)
            hidden = hidden + 1
            seen.append(hidden)
            handoff.send(hidden)
        return seen

    for rank, seen in enumerate(together(3, stage)):
        for plan, hidden in enumerate(seen):
            assert torch.allclose(hidden, states(plan) + rank + 1)


def test_a_tensor_of_another_size_than_expected_is_an_error() -> None:
    kept = []

    def stage(group: Group) -> None:
        handoff = Handoff(group, 16, torch.float32, CPU)
        kept.append(handoff)
        if group.rank == 0:
            handoff.send(torch.zeros(4, 16))
            handoff.send(torch.zeros(4, 16))
            return
        handoff.expect(4)
        with pytest.raises(RuntimeError, match=r"expected 4 rows.*has 3"):
            handoff.receive(3)
        handoff.receive(4)

    together(2, stage)
