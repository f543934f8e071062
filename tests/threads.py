"""A fixture's body for tests of tiny tensors."""

from collections.abc import Iterator

import torch


def one_thread() -> Iterator[None]:
    """Where tensors are this small, threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
