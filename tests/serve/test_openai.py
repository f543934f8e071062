"""What an OpenAI client sees of the served demo model, all through Ray Serve."""

import asyncio
import functools
import http.client
import json
import urllib.parse
from typing import Any

import openai
import pytest

from tests.serve.conftest import Server

pytestmark = pytest.mark.serve
PROMPT = "def read_file(path):\n"


def test_models_and_health(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["demo"]
    assert server.client.models.retrieve("demo").id == "demo"
    assert server.request("/health")[0] == 200


def test_a_completion_is_the_same_streamed_and_whole(server: Server) -> None:
    create = functools.partial(
        server.client.completions.create, model="demo", prompt=PROMPT, max_tokens=24, temperature=0.8, seed=7
    )
    whole: Any = create()
    parts: list[Any] = list(create(stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].text == "".join(part.choices[0].text for part in parts if part.choices)
    assert parts[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24 or whole.choices[0].finish_reason == "stop"


def test_chat_streams_text(server: Server) -> None:
    stream = server.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Write a function called main."}],
        max_tokens=40,
        temperature=0,
        stream=True,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_choices_differ_and_seeds_repeat(server: Server) -> None:
    def texts(seed: int) -> list[str]:
        answer = server.client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=16, n=4, temperature=1.0, seed=seed, extra_body={"ignore_eos": True}
        )
        return [choice.text for choice in answer.choices]

    assert len(set(texts(1))) > 1
    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_logprobs_and_token_ids(server: Server) -> None:
    answer = server.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Complete this code: import"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"return_token_ids": True},
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy: the most likely one was chosen
        assert entry.logprob <= 0
    ids = answer.choices[0].token_ids  # type: ignore[attr-defined]
    assert len(ids) == len(content)


def test_a_stop_string_ends_the_text(server: Server) -> None:
    whole = server.client.completions.create(model="demo", prompt=PROMPT, max_tokens=64, temperature=0).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = server.client.completions.create(model="demo", prompt=PROMPT, max_tokens=64, temperature=0, stop=[stop])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


async def _texts(server: Server, count: int) -> list[str]:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="demo",
            prompt=f"class Item{number % 8}:\n",
            max_tokens=48,
            temperature=0.9,
            seed=number % 8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async with server.async_client() as client:
        return await asyncio.gather(*(one(client, number) for number in range(count)))


def test_64_concurrent_streams_all_finish_with_the_tokens_they_have_alone(server: Server) -> None:
    alone = [_text_alone(server, number) for number in range(8)]
    together = asyncio.run(_texts(server, 64))
    assert together == [alone[number % 8] for number in range(64)]
    server.wait_for("vllm:num_requests_running", 0)
    server.wait_for("vllm:kv_cache_usage_perc", 0)


def _text_alone(server: Server, number: int) -> str:
    answer = server.client.completions.create(
        model="demo",
        prompt=f"class Item{number}:\n",
        max_tokens=48,
        temperature=0.9,
        seed=number,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: Server, stream: bool) -> None:
    address = urllib.parse.urlparse(server.url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port)
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": 2}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    if stream:
        assert connection.getresponse().read(20)
    server.wait_for("vllm:num_requests_running", 2)
    connection.close()
    server.wait_for("vllm:num_requests_running", 0, timeout_s=5)
    server.wait_for("vllm:kv_cache_usage_perc", 0)


BAD = [
    ({"model": "nobody"}, 404, "model"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "many"}, 400, "max_tokens"),
    ({"n": 0}, 400, "n"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [5000]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [1] * 5000}, 400, "prompt"),
    ({"prompt": [1] * 900, "max_tokens": 1000}, 400, "max_tokens"),
    ({"no_such_field": 1}, 400, "no_such_field"),
]


@pytest.mark.parametrize(("change", "status", "param"), BAD)
def test_bad_input_gets_its_answer(server: Server, change: dict[str, object], status: int, param: str) -> None:
    code, answer = server.post("/v1/completions", **{"model": "demo", "prompt": "x", "max_tokens": 1, **change})
    assert (code, answer["error"]["param"]) == (status, param)
    assert answer["error"]["message"]


def test_broken_json_is_a_400(server: Server) -> None:
    status, _, body = server.request("/v1/chat/completions", b'{"model": "demo", ')
    assert status == 400
    assert "error" in json.loads(body)


def test_unknown_model_is_the_clients_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="nobody", prompt="x")


def test_metrics_count_what_was_served(server: Server) -> None:
    before = server.gauge("vllm:generation_tokens_total")
    server.client.completions.create(model="demo", prompt=PROMPT, max_tokens=10, extra_body={"ignore_eos": True})
    server.wait_for("vllm:generation_tokens_total", before + 10)
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_time_seconds"):
        assert server.gauge(f"vllm:{name}_count") > 0, name
