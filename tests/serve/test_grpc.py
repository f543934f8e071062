"""gRPC through Serve's proxy: the same model, the same tokens, as over HTTP."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router import inference_pb2
from router.client import AsyncClient, Client, RaylineError, Turn
from tests.serve.conftest import Server

pytestmark = pytest.mark.serve
PROMPT = "def read_file(path):\n"
PATIENCE_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def log_start(server: Server) -> int:
    """How long the server's log was before these tests."""
    return len(server.log.read_text())


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with server.grpc_client() as client:
        yield client


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel


@pytest.mark.parametrize("parameters", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95, "seed": 11, "n": 2}])
def test_the_same_tokens_as_over_http(server: Server, client: Client, parameters: dict[str, Any]) -> None:
    asked = {**parameters, "max_tokens": 24, "logprobs": 1}
    _, http = server.post("/v1/completions", prompt=PROMPT, return_token_ids=True, **asked)
    whole = client.complete(PROMPT, **asked)
    events = list(client.generate(PROMPT, **asked))
    assert len(whole.outputs) == len(http["choices"]) == parameters.get("n", 1)
    for choice, output in zip(http["choices"], whole.outputs, strict=True):
        own = [event for event in events if event.index == choice["index"]]
        assert choice["token_ids"] == output.token_ids == [token for event in own for token in event.token_ids]
        assert choice["text"] == output.text == "".join(event.text for event in own)
        assert choice["finish_reason"] == output.finish_reason == own[-1].finish_reason
        assert choice["logprobs"]["token_logprobs"] == pytest.approx([entry.chosen.logprob for entry in output.logprobs], abs=1e-4)
        assert len(own) > 2, "it came in steps"
    usage = (http["usage"]["prompt_tokens"], http["usage"]["completion_tokens"])
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == usage
    told = events[-1].usage  # what was proposed depends on the time that iterations took
    assert told is not None
    assert (told.prompt_tokens, told.completion_tokens) == usage


def test_a_chat_is_the_same_as_over_http(server: Server, client: Client) -> None:
    turns: list[Turn] = [{"role": "user", "content": "Write a function called main."}]
    _, http = server.post("/v1/chat/completions", messages=turns, max_tokens=20, seed=5, return_token_ids=True)
    assert client.complete(turns, max_tokens=20, seed=5).outputs[0].token_ids == http["choices"][0]["token_ids"]


def test_log_probabilities_of_a_prompt(server: Server, client: Client) -> None:
    ids = client.tokenize(PROMPT).token_ids
    assert ids == server.post("/tokenize", prompt=PROMPT)[1]["tokens"]
    _, http = server.post("/v1/completions", prompt=ids, max_tokens=0, prompt_logprobs=0)
    told = client.complete(ids, max_tokens=0, prompt_logprobs=0).prompt_logprobs
    for token, entry, theirs in zip(ids[1:], told, http["choices"][0]["prompt_logprobs"][1:], strict=True):
        assert entry.chosen.token_id == token
        assert entry.chosen.logprob == pytest.approx(theirs[str(token)]["logprob"], abs=1e-4)


def test_models_and_status(client: Client) -> None:
    (model,) = client.models()
    status = client.status()
    assert (model.id, status.ready, len(status.engines)) == ("demo", True, 1)
    assert status.engines[0].max_sequence_tokens >= model.max_model_len
    assert status.engines[0].blocks_total > 0


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"temperature": -1.0}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"prompt": [1] * 5000}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"model": "nobody"}, grpc.StatusCode.NOT_FOUND, "model"),
    ],
)
def test_bad_fields_are_named(client: Client, change: dict[str, Any], code: grpc.StatusCode, field: str) -> None:
    for call in (client.complete, lambda **parameters: list(client.generate(**parameters))):
        with pytest.raises(RaylineError) as caught:
            call(**{"prompt": "x", **change})
        assert (caught.value.code, caught.value.field) == (code, field)


def test_streams_that_are_left_free_their_blocks(server: Server, client: Client) -> None:
    events = client.generate(PROMPT, n=2, max_tokens=900, ignore_eos=True)
    next(events)
    server.wait_for("vllm:num_requests_running", 2)
    events.close()
    server.wait_for("vllm:num_requests_running", 0, timeout_s=5)
    server.wait_for("vllm:kv_cache_usage_perc", 0)


def test_a_cancelled_task_frees_its_blocks(server: Server) -> None:
    async def leave() -> None:
        async with AsyncClient(f"127.0.0.1:{server.grpc_port}") as client:
            task = asyncio.ensure_future(client.complete(PROMPT, max_tokens=900, ignore_eos=True))
            await asyncio.to_thread(server.wait_for, "vllm:num_requests_running", 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(server.wait_for, "vllm:num_requests_running", 0, 5)

    asyncio.run(leave())
    server.wait_for("vllm:kv_cache_usage_perc", 0)


def test_deadlines_end_generations(server: Server, client: Client, channel: grpc.Channel) -> None:
    with pytest.raises(RaylineError) as caught:
        client.complete(PROMPT, max_tokens=900, ignore_eos=True, timeout_s=0.3)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    request = inference_pb2.GenerationRequest(text=PROMPT, max_tokens=900, ignore_eos=True)
    with pytest.raises(grpc.RpcError) as ended:  # a deadline that the proxy keeps to itself
        list(client._stub.Generate(request, timeout=0.5))
    assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_for("vllm:num_requests_running", 0, timeout_s=5)
    request.timeout_s = 0.3
    with pytest.raises(grpc.RpcError) as ended:  # the server's own
        list(client._stub.Generate(request, timeout=PATIENCE_S))
    assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, "no answer within 0.3 s")
    server.wait_for("vllm:kv_cache_usage_perc", 0)


def test_health(channel: grpc.Channel) -> None:
    """As a probe asks that knows nothing of Serve's applications."""
    stub = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "rayline.v1.Inference"):
        request = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(request, timeout=PATIENCE_S).status == serving
        assert next(stub.Watch(request, timeout=PATIENCE_S)).status == serving
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=PATIENCE_S)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection(channel: grpc.Channel) -> None:
    """Services are listed, and described well enough to be called."""
    asked = reflection_pb2.ServerReflectionRequest
    answers = list(
        reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([asked(list_services=""), asked(file_containing_symbol="rayline.v1.Inference")]), timeout=PATIENCE_S
        )
    )
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"rayline.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(file) for file in answers[1].file_descriptor_response.file_descriptor_proto
    ]
    methods = {method.name for file in files for service in file.service for method in service.method}
    assert methods == {"Generate", "Complete", "Tokenize", "ListModels", "ClusterStatus"}


def test_a_bad_field_is_also_told_to_programs(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(client._stub.Generate(inference_pb2.GenerationRequest(text="x", top_p=2.0)))
    error: Any = caught.value
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.message, len(status.details)) == (error.details(), 1)


def test_nothing_of_this_is_a_failure_of_the_server(server: Server, log_start: int) -> None:
    """Neither what was refused nor what was called off. Serve's proxy itself may tell of a stream that was dropped, when the
    garbage collector comes upon it."""
    lines = [re.sub(r"^\S*\(ProxyActor pid=\d+\)\S*", "", line).strip() for line in server.log.read_text()[log_start:].splitlines()]
    said = "\n".join(lines)
    rest = r"\n[^\n]*/ray/serve/_private/proxy\.py[^\n]*\nyield result\nGeneratorExit|\Z"  # or it is being written just now
    dropped = rf"Traceback \(most recent call last\):(?:{rest})"
    assert "Traceback" not in re.sub(dropped, "", said)
    assert "never retrieved" not in said
