"""A model of each family, divided over the nodes of a Ray cluster and asked over HTTP, says what it says undivided.

Greedy tokens are those of transformers, drawn ones those of the engine in one process; with linears in int8 all are the latter's.
`make test` runs the grids of four ranks, each with one family, `make grid` each grid with every family.
"""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.model import DEMO_MODEL
from cluster.offline import LLM
from cluster.protocol import SamplingParams
from tests.serve.conftest import Server, start_server
from tests.serve.nodes import Nodes
from tests.workers.models import make_model, prompt

pytestmark = pytest.mark.serve
VOCAB = 4099
"""A prime: the demo's tokenizer, and three ids beyond it that no text gives."""
LENGTHS = (1, 40, 90)
NUM_TOKENS = 24
FAMILIES = ["llama3-rope-tied", "mistral", "qwen2", "qwen3"]
GRIDS = [(2, 1), (1, 2), (2, 2), (1, 4), (4, 1)]
"""On nodes of two CPUs: four tensor-parallel ranks lie on several nodes, and so do four stages."""
QUANTIZED = (2, 2)
"""Of these, weights and activations are in int8, whose sums are the same for any number of ranks."""


def cases() -> list[Any]:
    """Every grid with every family; one family for each grid of four ranks without a mark."""
    return [
        pytest.param(tp, pp, kind, id=f"{tp}x{pp}-{kind}", marks=[] if tp * pp == 4 and number % 4 == place else pytest.mark.grid)
        for number, (tp, pp) in enumerate(GRIDS)
        for place, kind in enumerate(FAMILIES)
    ]


async def complete(server: Server, kind: str, ids: list[int], **how: Any) -> list[int]:
    """The tokens of a stream."""
    async with server.async_client() as client:
        stream: Any = await client.completions.create(
            model=kind,
            prompt=ids,
            max_tokens=NUM_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
            **how,
        )
        return [token async for chunk in stream for token in chunk.choices[0].token_ids]


@pytest.mark.parametrize(("tp", "pp", "kind"), cases())
def test_divided_over_nodes(nodes: Nodes, tmp_path: Path, tp: int, pp: int, kind: str) -> None:
    model = make_model(tmp_path / kind, kind, vocab_size=VOCAB, layers=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, model.path)
    prompts = [prompt(length, vocab=VOCAB) for length in LENGTHS]
    options = ["--dtype", "float32", "--max-num-batched-tokens", "64", "--tp", str(tp), "--pp", str(pp), "--kv-memory", "8MiB"]
    how: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": 8 << 20}
    if (tp, pp) == QUANTIZED:
        options += ["--quantization", "int8-dynamic"]
        how["quantization"] = "int8-dynamic"
    server = start_server(tmp_path / "log", str(model.path), *options, nodes=nodes)

    async def together() -> list[list[int]]:
        asked = [complete(server, kind, ids, temperature=0) for ids in prompts]
        return await asyncio.gather(*asked, *(complete(server, kind, ids, temperature=0.9, seed=7) for ids in prompts))

    try:
        found = asyncio.run(together())
        assert json.loads(server.request("/v1/models")[2])["data"][0]["max_model_len"] == 256
    finally:
        assert server.stop() == 0, server.log.read_text()
    whole = LLM(str(model.path), **how)

    def alone(temperature: float) -> list[list[int]]:
        params = SamplingParams(temperature=temperature, seed=7, max_tokens=NUM_TOKENS)
        return [done.outputs[0].token_ids for done in whole.generate(prompts, params, ignore_eos=True)]

    greedy = [model.oracle_greedy(ids, NUM_TOKENS) for ids in prompts] if (tp, pp) != QUANTIZED else alone(0.0)
    assert found == [*greedy, *alone(0.9)]
