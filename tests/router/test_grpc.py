"""The gRPC services and the client for them, on a plain grpc.aio server."""

import asyncio
import dataclasses
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.protocol import TokenLogprobs
from router import inference_pb2 as pb
from router.client import AsyncClient, Client, RaylineError, Speculation, Turn, Usage
from router.client_messages import generation_request as request_of
from router.generation import ChoiceDelta, Generation, Overloaded, TimedOut, TooLarge, Unavailable
from router.grpc_messages import MAX_DETAILS, generation_request
from router.prepare import ServedModel
from router.schemas import CompletionRequest, GenerationRequest
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, Script, Step, one_by_one, status_of, with_logprobs
from tests.router.grpc_server import PATIENCE_S, GrpcApi, first

CHAT: list[Turn] = [{"role": "user", "content": "Hello"}]
PARAMETERS: dict[str, Any] = {
    "max_tokens": 7,
    "min_tokens": 2,
    "n": 3,
    "temperature": 0.5,
    "top_k": 9,
    "top_p": 0.25,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "logit_bias": {"5": 2.5, "7": -100.0},
    "seed": -3,
    "stop": ["x", "yz"],
    "stop_token_ids": [3, 4],
    "ignore_eos": True,
    "prompt_logprobs": 1,
    "cache_salt": "salt",
}


@contextmanager
def client_of(api: GrpcApi) -> Iterator[Client]:
    with api.serving() as target, Client(target, timeout_s=PATIENCE_S) as client:
        yield client


def answers(tokenizer: Tokenizer, text: str) -> Script:
    tokens = [*tokenizer.encode_now(text, False), 2]
    return lambda g: with_logprobs(one_by_one(tokens, "stop", g.params.n), lambda t: {t: -0.5, t + 1: -1.5})


def hangs(generation: Generation) -> Iterator[Step]:
    """A token, then nothing for longer than any test waits."""
    yield [ChoiceDelta(0, [50])]
    yield asyncio.sleep(3600)


def test_generate_streams_tokens_and_text(tokenizer: Tokenizer, served: ServedModel) -> None:
    tokens = tokenizer.encode_now("Ça va 🙂", False)
    with client_of(GrpcApi(tokenizer, served, answers(tokenizer, "Ça va 🙂"))) as client:
        events = list(client.generate("The fox", n=2, max_tokens=50, stop_token_ids=[2]))
    for index in (0, 1):
        own = [event for event in events if event.index == index]
        assert "".join(event.text for event in own) == "Ça va 🙂"
        assert [token for event in own for token in event.token_ids] == [*tokens, 2]
        assert [event.finish_reason for event in own] == [None] * len(tokens) + ["stop"]
        assert own[-1].stop_reason == 2
        assert not own[0].logprobs
    assert len({event.id for event in events}) == 1
    prompt = len(tokenizer.encode_now("The fox", True))
    assert [event.usage for event in events] == [None] * (len(events) - 1) + [Usage(prompt, 2 * (len(tokens) + 1), 0)]


def test_complete(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = GrpcApi(tokenizer, served, answers(tokenizer, "fox jumps over"))
    with client_of(api) as client:
        answer = client.complete("The", n=2, max_tokens=50, stop="jumps", logprobs=1)
        plain = client.complete([5, 6], max_tokens=50)
    assert (answer.model, answer.text, len(answer.outputs)) == ("tiny", "fox ", 2)
    for output in answer.outputs:
        assert (output.finish_reason, output.stop_reason) == ("stop", "jumps")
        for token, entry in zip(output.token_ids, output.logprobs, strict=True):
            assert (entry.chosen.token_id, entry.chosen.logprob, entry.chosen.rank) == (token, -token / 1000, None)
            assert entry.chosen.token == tokenizer.vocabulary.token_bytes(token)
            assert [(top.token_id, top.logprob) for top in entry.top] == [(token, -0.5)]
    assert api.generator.finished_choices
    assert plain.outputs[0].logprobs == []
    assert plain.prompt_logprobs == []
    assert plain.usage == Usage(2, len(plain.outputs[0].token_ids), 0)
    assert api.generator.generations[1].prompt == [5, 6]


def test_what_speculation_did(tokenizer: Tokenizer, served: ServedModel) -> None:
    steps = [[ChoiceDelta(0, [50], verified=(0, 0))], [ChoiceDelta(0, [51, 52], [], "length", verified=(4, 1))]]
    with client_of(GrpcApi(tokenizer, served, lambda _: steps)) as client:
        assert client.complete([5, 6], max_tokens=3).usage.speculative == Speculation(4, 1, 1)
        *_, last = client.generate([5, 6], max_tokens=3)
    assert last.usage == Usage(2, 3, 0, Speculation(4, 1, 1))


def test_log_probabilities_of_the_prompt(tokenizer: Tokenizer, served: ServedModel) -> None:
    scores = [TokenLogprobs(-1.0, [6, 7], [-0.5, -1.5], 2), TokenLogprobs(-math.inf, [8, 9], [-0.1, -3.0], 400)]
    with client_of(GrpcApi(tokenizer, served, lambda g: [[ChoiceDelta(0, [], [], "length", None, scores)]])) as client:
        answer = client.complete([5, 6, 7], max_tokens=0, prompt_logprobs=1)
    told = [(entry.chosen.token_id, entry.chosen.logprob, entry.chosen.rank) for entry in answer.prompt_logprobs]
    assert told == [(6, -1.0, 2), (7, -math.inf, 400)]
    assert [[top.token_id for top in entry.top] for entry in answer.prompt_logprobs] == [[6], [8]]
    assert answer.outputs[0].token_ids == []


def test_best_of_ranks(tokenizer: Tokenizer, served: ServedModel) -> None:
    def script(generation: Generation) -> Iterator[Step]:
        assert generation.params.n == 3
        for choice, logprob in enumerate((-2.0, -1.0, -3.0)):
            yield [ChoiceDelta(choice, [50 + choice], [TokenLogprobs(logprob, [], [])], "length")]

    with client_of(GrpcApi(tokenizer, served, script)) as client:
        answer = client.complete("The fox", n=2, best_of=3, max_tokens=1)
    assert [(output.index, output.token_ids, output.logprobs) for output in answer.outputs] == [(0, [51], []), (1, [50], [])]
    assert answer.usage.completion_tokens == 3


def test_a_request_means_what_it_means_over_http(tokenizer: Tokenizer, served: ServedModel) -> None:
    """All parameters, as the cluster gets them."""
    scores = [TokenLogprobs(-1.0, [6], [-0.5], 2)]
    script: Script = lambda g: [[ChoiceDelta(0, [], [], None, None, scores)], *one_by_one([50], "length", 3)]  # noqa: E731
    http, grpc_api = Api(tokenizer, served, script), GrpcApi(tokenizer, served, script)
    http.post("/v1/completions", prompt=[5, 6], **PARAMETERS)
    with client_of(grpc_api) as client:
        client.complete([5, 6], **{**PARAMETERS, "logit_bias": {5: 2.5, 7: -100.0}})
    (ours,), (theirs,) = grpc_api.generator.generations, http.generator.generations
    assert (ours.params, ours.prompt, ours.cache_salt) == (theirs.params, theirs.prompt, theirs.cache_salt)


def test_chat_means_what_it_means_over_http(tokenizer: Tokenizer, served: ServedModel) -> None:
    http, grpc_api = Api(tokenizer, served, answers(tokenizer, "Hi")), GrpcApi(tokenizer, served, answers(tokenizer, "Hi"))
    body: dict[str, Any] = {"messages": CHAT, "seed": 1, "chat_template_kwargs": {"add": [1, {"x": 2.5}], "text": "a"}}
    http.post("/v1/chat/completions", **body, logprobs=True, top_logprobs=2)
    http.post("/v1/chat/completions", **body, add_generation_prompt=False)
    with client_of(grpc_api) as client:
        list(client.generate(CHAT, seed=1, logprobs=2, chat_template_kwargs=body["chat_template_kwargs"]))
        list(client.generate(CHAT, seed=1, add_generation_prompt=False))
    for ours, theirs in zip(grpc_api.generator.generations, http.generator.generations, strict=True):
        assert (ours.params, ours.prompt) == (theirs.params, theirs.prompt)
    asked = generation_request(request_of(CHAT, {"chat_template_kwargs": {"a": 1, "b": [2.5, {"c": None}]}}, None), streamed=True)
    kwargs = asked.chat_template_kwargs  # type: ignore[union-attr]
    assert repr(kwargs["a"]) == "1", "whole numbers stay whole"
    assert kwargs["b"] == [2.5, {"c": None}]


def test_every_field_is_a_parameter_of_http() -> None:
    """So that none is forgotten, and each error names a field."""
    names = {field.name for field in pb.GenerationRequest.DESCRIPTOR.fields} - {"text", "token_ids", "chat", "timeout_s"}
    assert names <= set(CompletionRequest.model_fields)
    harmless = {"user", "metadata", "store", "service_tier", "safety_identifier"}
    served = {name for name, field in GenerationRequest.model_fields.items() if not field.metadata and "prompt_cache" not in name}
    assert served - names - harmless == {"stream", "stream_options", "return_token_ids"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1000}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"logit_bias": {1: 101.0}}, "logit_bias"),
    ({"logit_bias": {100_000: 1.0}}, "logit_bias"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"timeout_s": 0.0}, "timeout_s"),
    ({"timeout_s": math.nan}, "timeout_s"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1] * 257}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"prompt": CHAT, "logprobs": 21}, "logprobs"),
    ({"prompt": CHAT, "add_special_tokens": True}, "add_special_tokens"),
]


def test_bad_fields_are_named(tokenizer: Tokenizer, served: ServedModel) -> None:
    with client_of(GrpcApi(tokenizer, served)) as client:
        for change, field in BAD:
            parameters = {"prompt": "x", **change}
            with pytest.raises(RaylineError) as caught:
                list(client.generate(**parameters))
            assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field), change
            assert caught.value.message.startswith(f"{field}: ")
            assert f"'{field}'" not in caught.value.message
        with pytest.raises(RaylineError, match=r"prompt: is required"):
            client._call(client._stub.Complete, pb.GenerationRequest(), None)
        with pytest.raises(RaylineError, match="typo") as caught:
            client.complete("x", typo=1)  # type: ignore[call-arg]
        assert caught.value.field == "typo"


def test_unknown_models_are_not_found(tokenizer: Tokenizer, served: ServedModel) -> None:
    with client_of(GrpcApi(tokenizer, served)) as client:
        for call in (client.complete, client.tokenize, lambda prompt, model: list(client.generate(prompt, model=model))):
            with pytest.raises(RaylineError) as caught:
                call("x", model="ü" * 3000)
            assert (caught.value.code, caught.value.field) == (grpc.StatusCode.NOT_FOUND, "model")
            assert len(caught.value.message) == MAX_DETAILS


@pytest.mark.parametrize(
    ("failure", "code", "field"),
    [
        (Overloaded(1.0), grpc.StatusCode.RESOURCE_EXHAUSTED, None),
        (TimedOut("too late"), grpc.StatusCode.DEADLINE_EXCEEDED, None),
        (Unavailable("none left"), grpc.StatusCode.UNAVAILABLE, None),
        (TooLarge("too large"), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL, None),
    ],
)
def test_what_the_cluster_refuses(
    tokenizer: Tokenizer, served: ServedModel, failure: Exception, code: grpc.StatusCode, field: str | None
) -> None:
    api = GrpcApi(tokenizer, served, lambda _: [failure])
    with client_of(api) as client:
        for call in (client.complete, lambda prompt: list(client.generate(prompt))):
            with pytest.raises(RaylineError) as caught:
                call("x")
            assert (caught.value.code, caught.value.field) == (code, field)
            assert "secret" not in caught.value.message
        api.generator.script = lambda _: [[ChoiceDelta(0, [50])], failure]
        events = client.generate("x")
        assert next(events).token_ids == [50]
        with pytest.raises(RaylineError) as caught:
            next(events)
        assert caught.value.code == code


def test_the_field_is_also_told_to_programs(tokenizer: Tokenizer, served: ServedModel) -> None:
    with client_of(GrpcApi(tokenizer, served)) as client, pytest.raises(grpc.RpcError) as caught:
        client._stub.Complete(pb.GenerationRequest(text="x", top_p=2.0))
    error: Any = caught.value
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], error.details())
    told = error_details_pb2.BadRequest.FromString(status.details[0].value)
    assert [violation.field for violation in told.field_violations] == ["top_p"]


def test_too_large_a_request(tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.grpc_service.MAX_REQUEST_BYTES", 100)
    with client_of(GrpcApi(tokenizer, served)) as client, pytest.raises(RaylineError) as caught:
        client.complete("x" * 100)
    assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_client_that_leaves_cancels(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = GrpcApi(tokenizer, served, hangs)
    with client_of(api) as client:
        events = client.generate("x")
        assert next(events).token_ids == [50]
        assert not api.generator.closed
        events.close()
        assert api.generator.any_closed.wait(PATIENCE_S)


def test_a_cancelled_task_cancels(tokenizer: Tokenizer, served: ServedModel) -> None:
    begun = threading.Event()

    def begins(generation: Generation) -> Iterator[Step]:
        begun.set()
        return hangs(generation)

    api = GrpcApi(tokenizer, served, begins)

    async def leave(target: str) -> None:
        async with AsyncClient(target) as client:
            assert (await first(client.generate("x"))).token_ids == [50]
            assert await asyncio.to_thread(api.generator.any_closed.wait, PATIENCE_S)
            api.generator.any_closed.clear()
            begun.clear()
            task = asyncio.ensure_future(client.complete("x"))
            assert await asyncio.to_thread(begun.wait, PATIENCE_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(api.generator.any_closed.wait, PATIENCE_S)

    with api.serving() as target:
        asyncio.run(leave(target))


def test_deadlines(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = GrpcApi(tokenizer, served, hangs)
    with client_of(api) as client:
        for call in (client.complete, lambda prompt, timeout_s: list(client.generate(prompt, timeout_s=timeout_s))):
            api.generator.any_closed.clear()
            with pytest.raises(RaylineError) as caught:
                call("x", timeout_s=0.2)
            assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
            assert api.generator.any_closed.wait(PATIENCE_S)
        api.generator.script = lambda _: one_by_one([50])
        client.complete("x", timeout_s=5.0)
        client._stub.Complete(pb.GenerationRequest(text="x"), timeout=4.0)
        client._stub.Complete(pb.GenerationRequest(text="x", timeout_s=3.0))
        client._stub.Complete(pb.GenerationRequest(text="x", timeout_s=10_000.0))
    short, five, four, three, most = (generation.timeout_s for generation in api.generator.generations[1:])
    assert 0 < short <= 0.2
    assert (five, four) == pytest.approx((5.0, 4.0), abs=0.9), "the call's deadline is the generation's"
    assert (three, most) == (3.0, served.timeout_s)


def test_tokenize(tokenizer: Tokenizer, served: ServedModel) -> None:
    with client_of(GrpcApi(tokenizer, served)) as client:
        told = client.tokenize("The fox", return_token_strs=True)
        assert told.token_ids == tokenizer.encode_now("The fox", True)
        assert told.token_strs == [tokenizer.vocabulary.token_string(token) for token in told.token_ids]
        assert told.max_model_len == 256
        assert client.tokenize("").token_ids == []
        text = "<|im_start|>user\nHello<|im_end|>\n"
        assert client.tokenize(CHAT, add_generation_prompt=False).token_ids == tokenizer.encode_now(text, False)
        with pytest.raises(RaylineError, match="prompt: is required"):
            client._call(client._stub.Tokenize, pb.TokenizeRequest(), None)


def test_models_and_status(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = GrpcApi(tokenizer, served)
    api.generator.cluster = status_of(True, False, reason="loading")
    with client_of(api) as client:
        (model,) = client.models()
        assert (model.id, model.root, model.created, model.max_model_len) == ("tiny", "tiny", 1700000000, 256)
        status = client.status()
        assert (status.ready, status.reason) == (True, "")
        assert [(engine.name, engine.ready, engine.reason) for engine in status.engines] == [
            ("engine-0", True, "loading"),
            ("engine-1", False, "loading"),
        ]
        api.generator.cluster = status_of(False, reason="loading")
        assert (client.status().ready, client.status().reason) == (False, "no engine is ready: loading")
        api.generator.cluster = None
        with pytest.raises(RaylineError, match="scheduler") as caught:
            client.status()
        assert caught.value.code == grpc.StatusCode.UNAVAILABLE


def test_the_asynchronous_client(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = GrpcApi(tokenizer, served, answers(tokenizer, "fox"))

    async def talk(target: str) -> None:
        async with AsyncClient(target, timeout_s=PATIENCE_S) as client:
            assert "".join([event.text async for event in client.generate("The")]) == "fox"
            assert (await client.complete("The")).text == "fox"
            assert (await client.tokenize("The")).token_ids
            assert [model.id for model in await client.models()] == ["tiny"]
            assert (await client.status()).ready
            with pytest.raises(RaylineError) as caught:
                await client.complete("The", top_p=2.0)
            assert caught.value.field == "top_p"

    with api.serving() as target:
        asyncio.run(talk(target))


def test_health(tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.grpc_service.WATCH_S", 0.01)
    api = GrpcApi(tokenizer, served)
    ok, ill, unknown = (getattr(health_pb2.HealthCheckResponse, name) for name in ("SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"))
    with api.serving() as target, grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def ask(service: str) -> Any:
            return health_pb2.HealthCheckRequest(service=service)

        for service in ("", "rayline.v1.Inference"):
            assert stub.Check(ask(service), timeout=PATIENCE_S).status == ok
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(ask("nobody"), timeout=PATIENCE_S)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watched = stub.Watch(ask(""), timeout=PATIENCE_S)
        assert next(watched).status == ok
        api.generator.cluster = status_of(False)
        assert next(watched).status == ill
        api.generator.leaving = True
        assert list(watched) == [], "a process that is to end waits for no watcher"
        api.generator.leaving = False
        monkeypatch.setattr("router.grpc_service.WATCHED_S", 0.05)
        assert [state.status for state in stub.Watch(ask(""), timeout=PATIENCE_S)] == [ill], "nor does one watcher stay for ever"
        monkeypatch.setattr("router.grpc_service.WATCHED_S", 60.0)
        assert stub.Check(ask(""), timeout=PATIENCE_S).status == ill
        assert {state.status for state in stub.List(health_pb2.HealthListRequest(), timeout=PATIENCE_S).statuses.values()} == {ill}
        assert next(stub.Watch(ask("nobody"), timeout=PATIENCE_S)).status == unknown


def test_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    """`make proto` writes it."""
    root = Path(__file__).parents[2]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, "router/inference.proto"]
    subprocess.run(command, cwd=root, check=True, timeout=60, capture_output=True)
    names = {path.name for path in (tmp_path / "router").iterdir()}
    assert names == {path.name for path in (root / "router").glob("inference_pb2*")}
    for name in names:
        assert (tmp_path / "router" / name).read_text() == (root / "router" / name).read_text(), f"{name}: run `make proto`"


def test_the_client_needs_nothing_of_the_server() -> None:
    script = "import sys, router.client\nprint(*sorted({n.partition('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "ray", "fastapi", "pydantic", "msgspec", "tokenizers", "cluster"} & set(done.stdout.split())


def test_prefixes_are_kept_apart_by_api_key_as_over_http(tokenizer: Tokenizer, served: ServedModel) -> None:
    apart = dataclasses.replace(served, apart_by_key=True)
    api, http = GrpcApi(tokenizer, apart, lambda _: one_by_one([50])), Api(tokenizer, apart, lambda _: one_by_one([50]))
    with api.serving() as target:
        for key in ("a", "b", None):
            with Client(target, timeout_s=PATIENCE_S, api_key=key) as client:
                client.complete([5, 6])
            headers = {"authorization": f"Bearer {key}"} if key else {}
            http.request("POST", "/v1/completions", json={"prompt": [5, 6]}, headers=headers)
    ours, theirs = ([g.cache_salt for g in made.generator.generations] for made in (api, http))
    assert ours == theirs
    assert len(set(ours)) == 3
