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
    create()  # so that both below find the same in the prefix cache
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


def test_an_echoed_prompt_scores_as_its_tokens_were_drawn(server: Server) -> None:
    """As lm-eval-harness asks, and against what a greedy completion said of the same tokens."""
    create = functools.partial(server.client.completions.create, model="demo", temperature=0, logprobs=1)
    drawn: Any = create(prompt=PROMPT, max_tokens=12, echo=True, extra_body={"return_token_ids": True, "ignore_eos": True})
    (choice,) = drawn.choices
    ids = choice.prompt_token_ids + choice.token_ids
    stream: Any = create(prompt=PROMPT, max_tokens=12, echo=True, stream=True, extra_body={"ignore_eos": True})
    parts = [part.choices[0] for part in stream]
    assert parts[0].text == PROMPT
    assert "".join(part.text for part in parts) == choice.text
    assert [logprob for part in parts for logprob in part.logprobs.token_logprobs] == choice.logprobs.token_logprobs
    scored: Any = create(prompt=[ids, ids[:5]], max_tokens=0, echo=True, extra_body={"prompt_logprobs": 2})
    for answer, length in zip(scored.choices, (len(ids), 5), strict=True):
        assert answer.text == server.post("/detokenize", tokens=ids[:length])[1]["prompt"]
        assert answer.finish_reason == "length"
        told = answer.logprobs
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        assert told.token_logprobs[1:] == pytest.approx(choice.logprobs.token_logprobs[1:length], abs=1e-3)
        assert told.tokens == choice.logprobs.tokens[:length]
        assert told.text_offset == choice.logprobs.text_offset[:length]
        for token, entry, logprob in zip(ids[1:length], answer.prompt_logprobs[1:], told.token_logprobs[1:], strict=True):
            assert entry[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-6)
            assert {1, 2} <= {named["rank"] for named in entry.values()}
    for position in range(len(choice.prompt_token_ids), len(ids)):
        assert scored.choices[0].prompt_logprobs[position][str(ids[position])]["rank"] == 1, "it was drawn greedily"
    assert scored.choices[0].text == choice.text
    assert scored.usage.completion_tokens == 0


def test_lists_of_prompts_with_choices_are_numbered_prompt_by_prompt(server: Server) -> None:
    create = functools.partial(server.client.completions.create, model="demo", max_tokens=6, seed=3)
    prompts = ["import os\n", "class Parser:\n", "def main("]
    together: Any = create(prompt=prompts, n=2, extra_body={"ignore_eos": True})
    assert [choice.index for choice in together.choices] == list(range(6))
    alone: list[Any] = [create(prompt=prompt, n=2, extra_body={"ignore_eos": True}) for prompt in prompts]
    assert [c.text for c in together.choices] == [c.text for answer in alone for c in answer.choices]


def test_best_of_returns_the_likeliest(server: Server) -> None:
    create = functools.partial(server.client.completions.create, model="demo", prompt=PROMPT, max_tokens=6, seed=3, logprobs=0)
    everyone: Any = create(n=4)
    best: Any = create(n=2, best_of=4)
    means = {choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) for choice in everyone.choices}
    assert [choice.text for choice in best.choices] == sorted(means, key=lambda text: -means[text])[:2]
    assert best.usage.completion_tokens == everyone.usage.completion_tokens


def test_beam_search_finds_what_is_likeliest(server: Server) -> None:
    create = functools.partial(server.client.completions.create, model="demo", prompt=PROMPT, max_tokens=6)
    found: Any = create(n=2, best_of=4, logprobs=0, extra_body={"use_beam_search": True, "ignore_eos": True})
    totals = [sum(choice.logprobs.token_logprobs) for choice in found.choices]
    assert totals == sorted(totals, reverse=True)
    texts = ["", ""]
    stream: Any = create(n=2, best_of=4, stream=True, extra_body={"use_beam_search": True, "ignore_eos": True})
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in found.choices]
    status, body = server.post("/v1/completions", model="demo", prompt=PROMPT, use_beam_search=True, best_of=128, max_tokens=2)
    assert (status, body["error"]["param"]) == (400, "best_of")
    assert body["error"]["message"] == "'best_of' is 128, but at most 64 beams can be searched at once here."


def test_what_ends_an_output(server: Server) -> None:
    def create(**body: Any) -> Any:
        answer = server.post(
            "/v1/completions", model="demo", prompt=PROMPT, max_tokens=16, temperature=0, return_token_ids=True, **body
        )
        return answer[1]["choices"][0]

    ids = create(ignore_eos=True)["token_ids"]
    stop = ids[4]
    ended = create(stop_token_ids=[stop], ignore_eos=True)
    assert (ended["token_ids"], ended["finish_reason"], ended["stop_reason"]) == (ids[: ids.index(stop) + 1], "stop", stop)
    shown = create(stop_token_ids=[stop], ignore_eos=True, include_stop_str_in_output=True)
    assert len(shown["text"]) > len(ended["text"])
    later = create(stop_token_ids=[stop], ignore_eos=True, min_tokens=12)["token_ids"]
    assert stop not in later[:12]
    assert len(later) > 12
    eos = create(logit_bias={"0": 100})
    assert (eos["text"], eos["token_ids"], eos["finish_reason"]) == ("", [0], "stop")
    assert create(logit_bias={"0": 100}, include_stop_str_in_output=True, skip_special_tokens=False)["text"] == "<|endoftext|>"
    assert 0 not in create(logit_bias={"0": 100}, min_tokens=16)["token_ids"]


def test_tokenize_and_back(server: Server) -> None:
    _, answer = server.post("/tokenize", model="demo", prompt=PROMPT, return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > 0
    assert server.post("/detokenize", tokens=answer["tokens"]) == (200, {"prompt": PROMPT})
    _, chat = server.post("/tokenize", messages=[{"role": "user", "content": "Hi"}])
    assert server.post("/detokenize", tokens=chat["tokens"])[1]["prompt"].startswith("<|im_start|>user\nHi<|im_end|>")
    assert server.post("/tokenize", tokens=[1])[0] == 400
    assert set(json.loads(server.request("/version")[2])) == {"version"}


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
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": stream, "n": 32}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    if stream:
        assert connection.getresponse().read(20)
    server.wait_for_at_least("vllm:num_requests_running", 2)
    before = server.gauge("vllm:generation_tokens_total")
    connection.close()
    server.wait_for("vllm:num_requests_running", 0, timeout_s=60)
    server.wait_for("vllm:kv_cache_usage_perc", 0)
    assert server.gauge("vllm:generation_tokens_total") - before < 32 * 900 / 2, "they ran to their end"


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
    server.wait_for_at_least("vllm:generation_tokens_total", before + 10)
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_time_seconds"):
        assert server.gauge(f"vllm:{name}_count") > 0, name


def test_repetitive_text_is_speculated_on_where_that_is_switched_on(server: Server) -> None:
    before = server.gauge("vllm:spec_decode_num_accepted_tokens_total")
    answer = server.client.completions.create(
        model="demo", prompt="a = [1, 2, 3, 4]\n" * 12, max_tokens=48, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
    )
    text = answer.choices[0]
    assert text.logprobs is not None
    assert text.logprobs.token_logprobs is not None
    assert len(text.logprobs.token_logprobs) == 48
    if "--speculative" in server.process.args:  # type: ignore[operator]
        server.wait_for_at_least("vllm:spec_decode_num_accepted_tokens_total", before + 1)
        told = answer.to_dict()["usage"]["speculative"]  # type: ignore[index]
        assert told["proposed_tokens"] >= told["accepted_tokens"] > 0
        assert 48 > told["steps"] > 0
    else:
        assert "speculative" not in answer.to_dict()["usage"]  # type: ignore[operator]
