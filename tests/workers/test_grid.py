"""A model divided over tp x pp ranks says what it says whole, and what transformers says: every family, in one process."""

import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.batcher import Batcher
from cluster.config import Config, ConfigError, batch_settings
from cluster.model import open_model
from cluster.protocol import Request, SamplingParams, TokenDelta
from cluster.structs import replace
from kv.manager import KVManager
from tests.workers.driver import LENGTHS, MIXED
from tests.workers.models import TinyModel, make_model, prompt
from workers.local import LocalRanks

GRIDS = [(2, 1), (1, 2), (2, 2), (1, 4), (4, 1)]
KINDS = ["llama3-rope-tied", "mistral", "qwen2", "qwen3-tied-bias"]
MORE_KINDS = ["llama-biases", "qwen2-window-tied", "qwen3"]
"""Five layers each, which no number of stages divides; 4 to 7 heads over 1 to 6 key/value heads."""
NUM_TOKENS = 16
GREEDY_LENGTHS = [1, 17, 41]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    root: Path = tmp_path_factory.mktemp("grid")
    return {kind: make_model(root / kind, kind, layers=5) for kind in (*KINDS, *MORE_KINDS)}


def requests() -> Iterator[Request]:
    """All ways to draw, two choices each for some, prompt log-probabilities for others, and a greedy one of each length."""
    for number, (length, params) in enumerate(zip(LENGTHS, MIXED, strict=True)):
        n = 2 if number % 3 == 1 else 1
        told = 1 if number % 3 == 2 else None
        yield request(f"mixed{number}", length, n, params, told)
    for length in GREEDY_LENGTHS:
        yield request(f"greedy{length}", length, 1, SamplingParams(temperature=0.0), None)


def request(id: str, length: int, n: int, params: SamplingParams, told: int | None) -> Request:
    params = replace(params, max_tokens=NUM_TOKENS, n=n, prompt_logprobs=told)
    return Request(
        id=id, attempt=0, reply_to="", prompt=prompt(length), emitted=[[]] * n, finished=[False] * n, params=params, deadline_s=None
    )


def answers(model: TinyModel, tp: int, pp: int, **settings: Any) -> tuple[dict[tuple[str, int], list[TokenDelta]], int]:
    """Deltas by (request, choice), and how often a sequence was preempted: the pool is too small for all."""
    sizes: dict[str, Any] = {"block_size": 8, "max_num_batched_tokens": 24, "max_num_seqs": 12}
    config = Config(str(model.path), dtype="float32", device="cpu", tp=tp, pp=pp, **sizes, **settings)
    ranks = LocalRanks(open_model(str(model.path)), config, num_blocks=30)
    batch = batch_settings(config, ranks.num_blocks, ranks.max_model_len)
    batcher = Batcher(batch, KVManager(batch))
    found: dict[tuple[str, int], list[TokenDelta]] = {}
    most = 0
    try:
        for asked in requests():
            assert batcher.why_impossible(asked) is None
            batcher.add(asked, 0.0)
        while batcher.num_sequences or batcher.in_flight:
            while len(batcher.in_flight) < pp and (plan := batcher.schedule(0.0)) is not None:
                ranks.launch(plan)
            most = max(most, len(batcher.in_flight))
            for delta in batcher.update(ranks.collect()):
                found.setdefault((delta.request, delta.choice), []).append(delta)
    finally:
        ranks.close()
    assert most == pp
    return found, batcher.counters.preemptions


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def logprobs(deltas: list[TokenDelta]) -> torch.Tensor:
    own = [told.logprob for delta in deltas for told in (*delta.logprobs, *delta.prompt_logprobs)]
    return torch.tensor(own)


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.grid) for kind in MORE_KINDS)])
def test_divided_and_whole_say_the_same(models: dict[str, TinyModel], kind: str) -> None:
    model = models[kind]
    whole, _ = answers(model, 1, 1)
    for length in GREEDY_LENGTHS:
        assert tokens(whole[f"greedy{length}", 0]) == model.oracle_greedy(prompt(length), NUM_TOKENS)
    preemptions = 0
    for tp, pp in GRIDS:
        divided, preempted = answers(model, tp, pp)
        preemptions += preempted
        assert divided.keys() == whole.keys()
        for key in whole:
            assert tokens(divided[key]) == tokens(whole[key]), f"{tp}x{pp} {key}"
        told = {key for key in whole if key[0].startswith("mixed") and key[1] == 0}
        for key in told:
            torch.testing.assert_close(logprobs(divided[key]), logprobs(whole[key]), atol=2e-4, rtol=0)
    assert preemptions > 0


@pytest.mark.parametrize(("kv_dtype", "kernels"), [("int8", "native"), ("fp8", "native"), ("int8", "torch")])
def test_divided_and_whole_say_the_same_with_quantized_keys_and_values(
    models: dict[str, TinyModel], kv_dtype: str, kernels: str
) -> None:
    """All of them, with sequences that are preempted and computed again."""
    model = models["qwen3-tied-bias"]
    whole, preemptions = answers(model, 1, 1, kv_dtype=kv_dtype, kernels=kernels)
    assert preemptions > 0
    for tp, pp in ((2, 1), (1, 2)):
        divided, preempted = answers(model, tp, pp, kv_dtype=kv_dtype, kernels=kernels)
        assert preempted > 0
        assert {key: tokens(deltas) for key, deltas in divided.items()} == {key: tokens(deltas) for key, deltas in whole.items()}


def test_each_rank_holds_its_part_only(models: dict[str, TinyModel]) -> None:
    path = str(models["qwen3-tied-bias"].path)
    config = Config(path, dtype="float32", device="cpu", block_size=8, tp=2, pp=2, stage_layers=(2, 3))
    ranks = LocalRanks(open_model(path), config, num_blocks=10)
    shapes = [(r.pool.keys.shape[0], r.pool.keys.shape[3], len(r.decoder.stack.layers)) for r in ranks.runners]
    assert shapes == [(2, 1, 2), (2, 1, 2), (3, 1, 3), (3, 1, 3)]
    assert [r.decoder.embedding is None for r in ranks.runners] == [False, False, True, True]
    assert [r.decoder.lm_head is None for r in ranks.runners] == [True, True, False, False]
    assert [r.decoder.stack.layers[0].gate_up.out_features for r in ranks.runners] == [104] * 4
    assert [r.answers for r in ranks.runners] == [False, False, True, False]
    ranks.close()


def test_a_model_that_cannot_be_divided_so_is_refused(models: dict[str, TinyModel]) -> None:
    path = str(models["mistral"].path)
    refused = [
        (Config(path, device="cpu", tp=5), "only 4 heads"),
        (Config(path, device="cpu", pp=6), "only 5 layers"),
        (Config(path, device="cpu", pp=2, stage_layers=(2, 2)), "add up to 5"),
    ]
    for config, why in refused:
        with pytest.raises(ConfigError, match=why):
            LocalRanks(open_model(path), config, num_blocks=10)


@pytest.mark.parametrize("broken", [0, 1])
def test_after_a_failure_nothing_more_is_run(models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch, broken: int) -> None:
    path = str(models["llama-biases"].path)
    config = Config(path, dtype="float32", device="cpu", pp=2, step_timeout_s=2.0, max_num_seqs=4, max_num_batched_tokens=16)
    ranks = LocalRanks(open_model(path), config, num_blocks=10)
    batch = batch_settings(config, ranks.num_blocks, ranks.max_model_len)
    batcher = Batcher(batch, KVManager(batch))
    for name in "ab":
        batcher.add(request(name, 12, 1, SamplingParams(), None), 0.0)

    def fails(*_: object) -> None:
        raise ValueError("a broken part")

    monkeypatch.setattr(ranks.runners[broken], "forward", fails)
    plan = batcher.schedule(0.0)
    following = batcher.schedule(0.0)
    assert plan is not None
    assert following is not None
    ranks.launch(plan)
    ranks.launch(following)
    with pytest.raises(RuntimeError, match="a broken part"):
        ranks.collect()
    with pytest.raises(RuntimeError, match="nothing more"):
        ranks.collect()
    with pytest.raises(RuntimeError, match="nothing more"):
        ranks.launch(plan)
    began = time.monotonic()
    ranks.close()
    assert time.monotonic() - began < 30, "who waits for the failed rank does so for the step's time-out only"


def test_an_interrupted_iteration_is_an_error_from_then_on(models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(models["mistral"].path)
    ranks = LocalRanks(open_model(path), Config(path, dtype="float32", device="cpu"), num_blocks=10)
    batch = batch_settings(Config(path), ranks.num_blocks, ranks.max_model_len)
    batcher = Batcher(batch, KVManager(batch))
    batcher.add(request("a", 12, 1, SamplingParams(), None), 0.0)
    plan = batcher.schedule(0.0)
    assert plan is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks.runners[0], "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranks.launch(plan)
    with pytest.raises(RuntimeError, match="nothing more"):
        ranks.collect()


def test_ranks_that_are_forgotten_end(models: dict[str, TinyModel]) -> None:
    path = str(models["mistral"].path)
    ranks = LocalRanks(open_model(path), Config(path, dtype="float32", device="cpu", pp=2), num_blocks=10)
    threads, held = ranks._threads, weakref.ref(ranks.runners[0])
    del ranks
    gc.collect()
    for thread in threads:
        thread.join(10)
    del thread, threads
    gc.collect()
    assert held() is None


def test_ranks_of_different_dtypes_refuse_each_other(models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """As "auto" finds them on nodes of different CPUs."""
    dtypes = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr("workers.runner.resolve_dtype", lambda *_: next(dtypes))
    path = str(models["mistral"].path)
    with pytest.raises(ConfigError, match=r"rank \d on 127.0.0.1 has dtype torch"):
        LocalRanks(open_model(path), Config(path, device="cpu", pp=2), num_blocks=10)
