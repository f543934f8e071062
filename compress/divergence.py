"""How far a model's distributions are from another's."""

from torch import Tensor
from torch.nn.functional import kl_div


def divergence(wanted: Tensor, told: Tensor) -> Tensor:
    """KL(wanted || told) in nats at each position: [..., vocab] log-probabilities -> [...]."""
    return kl_div(told, wanted, log_target=True, reduction="none").sum(-1)
