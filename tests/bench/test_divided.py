"""A divided model, driven step by step, gives what the whole one gives."""

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from bench.divided import Divided, can_divide
from cluster.config import Config
from cluster.model import open_model
from tests.workers.models import TinyModel, make_model, prompt
from tests.workers.spans import make_span
from workers.runner import ModelRunner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyModel]:
    """With one thread for all: their number can change bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_model(tmp_path_factory.mktemp("divided"), "qwen3-tied-bias")
    torch.set_num_threads(threads)


def config(model: TinyModel, tp: int, pp: int) -> Config:
    return Config(str(model.path), dtype="float32", device="cpu", block_size=8, tp=tp, pp=pp, threads=1)


@torch.inference_mode()
def steps(runner: ModelRunner | Divided) -> Iterator[torch.Tensor]:
    """Logits of all rows of a prompt, and of the two tokens after it."""
    decoder = runner if isinstance(runner, Divided) else runner.decoder
    ids, blocks = prompt(19), [5, 2, 7]
    for start, end in ((0, 17), (17, 18), (18, 19)):
        yield decoder.logits(runner.forward([make_span(start, end, blocks, prompt=ids)]))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_divided_logits_are_the_whole_ones(model: TinyModel, tp: int, pp: int) -> None:
    whole = torch.cat(list(steps(model.runner())))
    with closing(Divided(open_model(str(model.path)), config(model, tp, pp), num_blocks=10)) as ranks:
        found = torch.cat(list(steps(ranks)))
    assert found.shape == (19, ranks.shape.vocab_size)
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(found, model.oracle_logits(prompt(19)), atol=2e-4, rtol=0)
    assert tp > 1 or torch.equal(found, whole)


def test_only_so_many_ranks_as_the_model_has_parts_for(model: TinyModel) -> None:
    files = open_model(str(model.path))  # six heads, two layers
    grids = [(6, 1), (7, 1), (1, 2), (1, 3)]
    assert [can_divide(files, config(model, tp, pp)) for tp, pp in grids] == [True, False, True, False]
