"""Over real sockets: the openai client, and clients that go away."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn

from router.generation import ChoiceDelta, Generation, Overloaded
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, Script, Step, one_by_one, with_logprobs

PATIENCE_S = 10.0
"""How long a test waits for what should come at once."""


@contextmanager
def serving(api: Api) -> Iterator[int]:
    """The port at which the application listens, in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # connections wait until the server has started
    server = uvicorn.Server(uvicorn.Config(api.app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()
        assert not thread.is_alive()


@contextmanager
def client_of(api: Api) -> Iterator[openai.OpenAI]:
    with serving(api) as port, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def answers(tokenizer: Tokenizer, text: str) -> Script:
    tokens = [*tokenizer.encode_now(text, False), 2]
    return lambda g: with_logprobs(one_by_one(tokens, "stop", g.params.n), lambda t: {t: -0.5})


def hangs(generation: Generation) -> Iterator[Step]:
    """A token, then nothing for longer than any test waits."""
    yield [ChoiceDelta(0, [50])]
    yield asyncio.sleep(3600)


def test_openai_chat(tokenizer: Tokenizer, served: ServedModel) -> None:
    with client_of(Api(tokenizer, served, answers(tokenizer, "Ça va 🙂"))) as client:
        whole = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], n=2, logprobs=True, top_logprobs=1
        )
        assert [choice.message.content for choice in whole.choices] == ["Ça va 🙂"] * 2
        entry = whole.choices[0].logprobs
        assert entry is not None
        assert entry.content
        assert entry.content[0].top_logprobs[0].logprob == -0.5
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == "Ça va 🙂"
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_openai_completions_and_models(tokenizer: Tokenizer, served: ServedModel) -> None:
    with client_of(Api(tokenizer, served, answers(tokenizer, "Ça va 🙂"))) as client:
        whole = client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1, extra_body={"return_token_ids": True})
        assert [choice.text for choice in whole.choices] == ["Ça va 🙂"] * 2
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.token_logprobs is not None
        chunks = list(client.completions.create(model="tiny", prompt="a", stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Ça va 🙂"
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"


def test_openai_errors(tokenizer: Tokenizer, served: ServedModel) -> None:
    def script(generation: Generation) -> Iterator[Step]:
        if generation.prompt == [5]:
            yield Overloaded(1.5)
        yield [ChoiceDelta(0, [50])]
        yield RuntimeError("secret")

    with client_of(Api(tokenizer, served, script)) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="other", prompt="a")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="tiny", prompt="a", temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="tiny", prompt=[5])
        assert full.value.response.headers["retry-after"] == "2"
        with pytest.raises(openai.APIError, match="Internal error"):
            list(client.completions.create(model="tiny", prompt="a", stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_cancels(
    tokenizer: Tokenizer, served: ServedModel, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    api = Api(tokenizer, served, hangs)
    with serving(api) as port:
        body = json.dumps({"prompt": [[5], [6]], "stream": stream, "n": 2}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + body)
            if stream:
                received = b""
                while b"data: " not in received:
                    received += connection.recv(4096)
            else:
                _until(lambda: len(api.generator.generations) == 2)
            assert api.generator.closed == []
        _until(lambda: len(api.generator.closed) == 2)
    ends = {sample.labels: sample.value for sample in api.metrics.samples() if sample.name == "vllm:request_success_total"}
    assert ends[("finished_reason", "abort"),] == 4
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_client_that_goes_away_before_its_body(tokenizer: Tokenizer, served: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    api = Api(tokenizer, served, answers(tokenizer, "x"))
    with serving(api) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a"}, timeout=PATIENCE_S).status_code == 200
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_slow_reader_gets_what_has_come_in_one_piece(tokenizer: Tokenizer, served: ServedModel) -> None:
    """All that one item of the generator says of a choice is one event, and all its events are one write."""
    fox = tokenizer.encode_now("The quick brown fox", False)
    burst = [ChoiceDelta(c, [token]) for token in fox for c in (0, 1)]
    api = Api(tokenizer, served, lambda _: [burst, [ChoiceDelta(c, [], [], "length") for c in (0, 1)]])
    events = api.events("/v1/completions", prompt="x", n=2)
    assert [choice["text"] for event in events for choice in event["choices"]] == ["The quick brown fox"] * 2 + ["", ""]


def _until(condition: Callable[[], bool]) -> None:
    deadline = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if condition():
            return
        deadline.wait(0.005)
    raise AssertionError("it did not come")
