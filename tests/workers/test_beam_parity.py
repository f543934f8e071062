"""Beam search against transformers' generate, in fp32: the same outputs in the same order, whatever runs in the same batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from cluster.batcher import Batcher
from cluster.config import BatchConfig, PrefixCache
from cluster.protocol import Request, SamplingParams
from kv.manager import KVManager
from tests.workers.models import VOCAB, TinyModel, prompt

KINDS = ["llama3-rope-tied", "mistral", "qwen2", "qwen3"]
MAX_TOKENS = 14
Outputs = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Case:
    """A search, as both sides are asked for it."""

    length: int
    params: SamplingParams

    @property
    def prompt(self) -> list[int]:
        return prompt(self.length)

    def oracle(self, model: TinyModel) -> list[list[int]]:
        """The outputs by transformers, each up to its first stop token."""
        params, stops = self.params, list(self.params.stop_token_ids)
        found = model.oracle.generate(
            torch.tensor([self.prompt]),
            attention_mask=torch.ones(1, self.length, dtype=torch.long),
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens or None,
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.n,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=stops or None,
            pad_token_id=0,
        )
        outputs: list[list[int]] = []
        for row in found[:, self.length :].tolist():
            end = next((at + 1 for at, token in enumerate(row) if token in stops), params.max_tokens)
            outputs.append(row[:end])
        return outputs


def cases() -> Iterator[Case]:
    """Widths, returned outputs, length penalties, both ways to end, with no, one and many stop tokens."""
    for number in range(16):
        width = (2, 3, 4, 8)[number % 4]
        stops = (40, 0, 1, 25)[number // 4]
        params = SamplingParams(
            temperature=(0.0, 1.0)[number % 2],
            max_tokens=MAX_TOKENS,
            n=1 + number % width,
            beam_width=width,
            length_penalty=(1.0, 0.0, 2.0, -1.0)[(number + number // 4) % 4],
            early_stopping=number % 3 == 1,
            stop_token_ids=tuple(range(5, 5 + stops)),
            min_tokens=(0, 0, 0, 4)[(number + 1) % 4],
            logprobs=1 if number % 5 == 0 else None,
        )
        yield Case((1, 9, 16, 33, 40)[number % 5], params)


def others() -> Iterator[SamplingParams]:
    """What runs besides."""
    yield SamplingParams(temperature=0.0, max_tokens=20)
    yield SamplingParams(seed=4, max_tokens=20, n=3)
    yield SamplingParams(seed=5, max_tokens=20, top_p=0.8, logprobs=2)


def request(id: str, ids: list[int], params: SamplingParams) -> Request:
    n = params.n
    return Request(id=id, attempt=0, reply_to="", prompt=ids, emitted=[[] for _ in range(n)], finished=[False] * n, params=params)


def run(model: TinyModel, requests: list[Request], num_blocks: int, cache: PrefixCache = "on") -> tuple[Outputs, Batcher]:
    """Outputs of all, run together."""
    runner = model.runner(num_blocks=num_blocks)
    batch = BatchConfig(num_blocks, 96, block_size=8, max_num_seqs=24, max_num_batched_tokens=32, prefix_cache=cache)
    batcher = Batcher(batch, KVManager(batch))
    outputs: Outputs = {}
    for asked in requests:
        assert batcher.why_impossible(asked) is None
        batcher.add(asked, 0.0)
        outputs[asked.id] = [[] for _ in range(asked.params.n)]
    while batcher.num_sequences:
        plan = batcher.schedule(0.0)
        assert plan is not None
        for delta in batcher.update(runner.execute(plan)):
            outputs[delta.request][delta.choice] += delta.tokens
    batcher.check_integrity()
    assert batcher.stats().blocks_used == 0
    return outputs, batcher


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_transformers(tiny_models: dict[str, TinyModel], kind: str) -> None:
    """All searches in one batch with draws of other kinds, in a pool that is too small for them."""
    model = tiny_models[kind]
    asked = [request(f"beams{number}", case.prompt, case.params) for number, case in enumerate(cases())]
    asked += [request(f"other{number}", prompt(20 + number), params) for number, params in enumerate(others())]
    found, batcher = run(model, asked, num_blocks=16)
    assert batcher.counters.preemptions > 0
    for number, case in enumerate(cases()):
        assert found[f"beams{number}"] == case.oracle(model), f"{kind} {number}: {case}"
    assert run(model, asked, 20, "off")[0] == found
    assert run(model, asked, 500)[0] == found


def test_one_beam_is_greedy(tiny_models: dict[str, TinyModel]) -> None:
    model = tiny_models["qwen3"]
    found, _ = run(model, [request("r", prompt(30), SamplingParams(max_tokens=20, beam_width=1))], 60)
    assert found["r"] == [model.oracle_greedy(prompt(30), 20)]


def test_as_many_beams_as_there_are_tokens(tiny_models: dict[str, TinyModel]) -> None:
    """All first tokens live on; what is returned is what is best of all pairs."""
    model, ids = tiny_models["mistral"], prompt(12)
    params = SamplingParams(max_tokens=2, beam_width=24, n=5, stop_token_ids=tuple(range(VOCAB - 30)))
    found, _ = run(model, [request("r", ids, params)], 200)
    assert found["r"] == Case(12, params).oracle(model)
