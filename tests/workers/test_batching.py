"""A sequence's tokens and log-probabilities don't depend on what it was batched with, nor on how its tokens were cut into steps."""

import random

import pytest

from cluster.protocol import SamplingParams
from tests.workers.driver import LENGTHS, MIXED, Driver, generate
from tests.workers.models import TinyModel, prompt
from workers.runner import ModelRunner

KINDS = ["llama", "llama3-rope-tied", "qwen3", "mistral", "qwen3-window"]


def alone(runner: ModelRunner, count: int) -> list[list[int]]:
    """Each of LENGTHS by itself, with its own parameters."""
    return [generate(runner, prompt(n), count, MIXED[i % len(MIXED)]) for i, n in enumerate(LENGTHS)]


def start(runner: ModelRunner) -> Driver:
    """A driver with all of LENGTHS added."""
    runner.reset()
    driver = Driver(runner)
    for i, n in enumerate(LENGTHS):
        driver.add(i, prompt(n), MIXED[i % len(MIXED)])
    return driver


def outputs(driver: Driver) -> list[list[int]]:
    return [driver.sequences[seq].output for seq in sorted(driver.sequences)]


@pytest.mark.parametrize("kernels", ["native", "torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_together_is_each_alone(tiny_models: dict[str, TinyModel], kind: str, kernels: str) -> None:
    runner = tiny_models[kind].runner(kernels=kernels)
    expected = alone(runner, 24)
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    driver = start(runner)
    driver.run(list(range(len(LENGTHS))), 24)
    assert outputs(driver) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_a_chunked_prefill_is_a_whole_one(tiny_models: dict[str, TinyModel], kind: str, chunk: int) -> None:
    runner = tiny_models[kind].runner()
    expected = alone(runner, 12)
    driver = start(runner)
    driver.run(list(range(len(LENGTHS))), 12, chunk)
    assert outputs(driver) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_prefills_and_decodes_mix_in_any_order(tiny_models: dict[str, TinyModel], kind: str) -> None:
    runner = tiny_models[kind].runner()
    expected = alone(runner, 16)
    rng = random.Random(3)
    driver = start(runner)
    while left := [seq for seq, t in driver.sequences.items() if len(t.output) < 16]:
        some = rng.sample(left, rng.randint(1, len(left)))
        missing = {seq: driver.sequences[seq].num_tokens - driver.sequences[seq].computed for seq in some}
        driver.step({seq: rng.randint(1, most) for seq, most in missing.items()})
    assert outputs(driver) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_preemption_changes_nothing(tiny_models: dict[str, TinyModel], kind: str) -> None:
    runner = tiny_models[kind].runner()
    expected = alone(runner, 16)
    driver = start(runner)
    everyone = list(range(len(LENGTHS)))
    driver.run(everyone, 5, chunk=16)
    for seq in (1, 4, 6):
        driver.preempt(seq)
    driver.run([0, 2, 3], 9)
    driver.preempt(2)
    driver.run(everyone, 16, chunk=7)
    assert outputs(driver) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_moved_blocks_hold_the_same(tiny_models: dict[str, TinyModel], kind: str) -> None:
    runner = tiny_models[kind].runner()
    expected = alone(runner, 16)
    driver = start(runner)
    everyone = list(range(len(LENGTHS)))
    driver.run(everyone, 8)
    for seq, index in ((6, 0), (6, 2), (3, 1), (0, 0)):
        driver.move_block(seq, index)
    driver.run(everyone, 16)
    assert outputs(driver) == expected


def test_an_emitted_prefix_continues_as_if_never_interrupted(tiny_models: dict[str, TinyModel]) -> None:
    runner = tiny_models["qwen3"].runner()
    for i, n in enumerate(LENGTHS):
        params = MIXED[i % len(MIXED)]
        whole = generate(runner, prompt(n), 20, params)
        runner.reset()
        driver = Driver(runner)
        driver.add(0, prompt(n), params, emitted=whole[:11])
        driver.run([0], 9)
        assert driver.sequences[0].output == whole[11:]


def test_sequences_come_and_go(tiny_models: dict[str, TinyModel]) -> None:
    runner = tiny_models["llama"].runner()
    expected = alone(runner, 10)
    runner.reset()
    driver = Driver(runner)
    running: list[int] = []
    waiting = list(range(len(LENGTHS)))
    while waiting or running:
        if waiting and len(running) < 3:
            seq = waiting.pop(0)
            driver.add(seq, prompt(LENGTHS[seq]), MIXED[seq % len(MIXED)])
            running.append(seq)
        driver.step({seq: driver.sequences[seq].num_tokens - driver.sequences[seq].computed for seq in running})
        for seq in [seq for seq in running if len(driver.sequences[seq].output) == 10]:
            assert driver.sequences[seq].output == expected[seq]
            running.remove(seq)
            driver.finish(seq)


def test_other_choices_and_seeds_draw_otherwise(tiny_models: dict[str, TinyModel]) -> None:
    runner = tiny_models["llama"].runner()
    runner.reset()
    driver = Driver(runner)
    for seq, (seed, choice) in enumerate([(1, 0), (1, 1), (2, 0), (1, 0)]):
        driver.add(seq, prompt(12), SamplingParams(seed=seed, max_tokens=20), choice=choice)
    driver.run([0, 1, 2, 3], 20)
    first, other_choice, other_seed, again = outputs(driver)
    assert first == again
    assert len({tuple(first), tuple(other_choice), tuple(other_seed)}) == 3
