"""What is not generation: models, health, errors of routing, documentation."""

import pytest

from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, one_by_one, status_of


def test_models(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served)
    (listed,) = api.request("GET", "/v1/models").json()["data"]
    assert listed == api.request("GET", "/v1/models/tiny").json()
    assert listed == {
        "id": "tiny",
        "object": "model",
        "created": 1700000000,
        "owned_by": "rayline",
        "root": "tiny",
        "parent": None,
        "max_model_len": 256,
    }
    response = api.request("GET", "/v1/models/org/other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_context_is_what_the_largest_engine_holds(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, lambda _: one_by_one([50]))
    api.generator.cluster = status_of(True, True)
    small, large = api.generator.cluster.engines
    small.max_sequence_tokens, large.max_sequence_tokens = 50, 100
    assert api.request("GET", "/v1/models/tiny").json()["max_model_len"] == 100
    api.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}])
    (generation,) = api.generator.generations
    assert len(generation.prompt) + generation.params.max_tokens == 100
    assert api.error("/v1/completions", prompt=[5] * 100) == (400, "prompt", "context_length_exceeded")
    large.max_sequence_tokens = small.max_sequence_tokens = 10**6
    assert api.request("GET", "/v1/models/tiny").json()["max_model_len"] == 256


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_model_must_be_known(tokenizer: Tokenizer, served: ServedModel, path: str) -> None:
    prompt = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    api = Api(tokenizer, served, lambda _: one_by_one([50]))
    assert api.error(path, model="other", **prompt) == (404, "model", "model_not_found")
    assert api.post(path, **prompt)["model"] == "tiny"


def test_health(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served)
    api.generator.cluster = status_of(False, True)
    response = api.request("GET", "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok", "engines": {"ready": 1, "total": 2}})
    api.generator.cluster = status_of(False, reason="loading")
    response = api.request("GET", "/health")
    assert response.status_code == 503
    assert response.json()["reason"] == "no engine is ready: loading"
    api.generator.cluster = None
    response = api.request("GET", "/health")
    assert response.status_code == 503
    assert "scheduler" in response.json()["reason"]


def test_routing_errors(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served)
    for method, path, status, code in [
        ("GET", "/v2", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
    ]:
        response = api.request(method, path, json={})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (status, code, None)
        assert error["type"] == "invalid_request_error"


def test_unforeseen_errors_tell_nothing(tokenizer: Tokenizer, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("secret")

    api = Api(tokenizer, served)
    monkeypatch.setattr("router.api.render", broken)
    response = api.request("GET", "/metrics")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text


def test_documentation_names_the_bodies(tokenizer: Tokenizer, served: ServedModel) -> None:
    document = Api(tokenizer, served).request("GET", "/openapi.json").json()
    assert {"CompletionRequest", "ChatRequest", "Message", "TokenizeRequest", "DetokenizeRequest"} <= set(
        document["components"]["schemas"]
    )
    assert "requestBody" in document["paths"]["/v1/completions"]["post"]
