"""One model of each family through `rayline serve`: over HTTP it says what transformers says."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.model import DEMO_MODEL
from tests.serve.conftest import start_server
from tests.workers.models import make_model, prompt

pytestmark = pytest.mark.serve
VOCAB = 4099
"""A prime: the demo's tokenizer, and three ids beyond it that no text gives."""


@pytest.mark.parametrize("kind", ["llama3-rope-tied", "mistral", "qwen2", "qwen3-window"])
def test_greedy_tokens_over_http_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path / kind, kind, vocab_size=VOCAB)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, model.path)
    server = start_server(tmp_path / "log", str(model.path), "--dtype", "float32", "--max-num-batched-tokens", "64")
    try:
        prompts = [prompt(length, vocab=VOCAB) for length in (1, 40, 90)]

        async def complete(ids: list[int]) -> list[int]:
            async with server.async_client() as client:
                stream: Any = await client.completions.create(
                    model=kind,
                    prompt=ids,
                    max_tokens=24,
                    temperature=0,
                    stream=True,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                return [token async for chunk in stream for token in chunk.choices[0].token_ids]

        async def together() -> list[list[int]]:
            return await asyncio.gather(*map(complete, prompts))

        assert asyncio.run(together()) == [model.oracle_greedy(ids, 24) for ids in prompts]
        listed = json.loads(server.request("/v1/models")[2])["data"][0]
        assert listed["max_model_len"] == 256
    finally:
        assert server.stop() == 0, server.log.read_text()
