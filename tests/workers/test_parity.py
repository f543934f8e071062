"""The native decoder against transformers, in fp32."""

import pytest
import torch

from tests.workers.driver import Driver, generate, greedy
from tests.workers.models import KINDS, MAX_LEN, VOCAB, TinyModel, prompt


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_transformers(tiny_models: dict[str, TinyModel], kind: str, kernels: str) -> None:
    model = tiny_models[kind]
    ids = prompt(90)
    driver = Driver(model.runner(kernels=kernels))
    driver.add(0, ids, greedy(logprobs=VOCAB))
    driver.run([0], 8, chunk=31)
    sequence = driver.sequences[0]
    wanted = model.oracle_logits(ids + sequence.output)[len(ids) - 1 : -1].log_softmax(-1)
    for row, reported in zip(wanted, sequence.logprobs, strict=True):
        ours = torch.empty(VOCAB)
        ours[reported.top_ids] = torch.tensor(reported.top_logprobs)
        torch.testing.assert_close(ours, row, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_64_greedy_tokens_are_those_of_transformers(tiny_models: dict[str, TinyModel], kind: str) -> None:
    model = tiny_models[kind]
    runner = model.runner()
    for length in (1, 7, 40):
        ids = prompt(length)
        assert generate(runner, ids, 64, greedy()) == model.oracle_greedy(ids, 64)


def test_the_last_position_of_the_model_is_right(tiny_models: dict[str, TinyModel]) -> None:
    model = tiny_models["llama3-rope-tied"]
    ids = prompt(MAX_LEN - 4)
    assert generate(model.runner(), ids, 4, greedy()) == model.oracle_greedy(ids, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_is_near(tiny_models: dict[str, TinyModel], dtype: str) -> None:
    model = tiny_models["qwen3"]
    driver = Driver(model.runner(dtype=dtype))
    driver.add(0, prompt(50), greedy(logprobs=VOCAB))
    driver.add(1, prompt(20), greedy(logprobs=VOCAB))
    driver.run([0, 1], 2, chunk=16)
    for seq in (0, 1):
        sequence = driver.sequences[seq]
        wanted = model.oracle_logits(sequence.prompt)[-1].log_softmax(-1)
        ours = torch.empty(VOCAB)
        ours[sequence.logprobs[0].top_ids] = torch.tensor(sequence.logprobs[0].top_logprobs)
        distance = (ours.exp() - wanted.exp()).abs().sum() / 2
        assert distance < 0.15
