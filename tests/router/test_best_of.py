"""best_of: many choices are generated, the likeliest are the answer."""

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.protocol import TokenLogprobs
from router.generation import ChoiceDelta, Generation
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, Step

ENDPOINTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
]
MEANS = {0: [-1.0, -3.0], 1: [-0.5], 2: [-0.75, -0.25, -0.25], 3: [-0.5], 4: [float("-inf"), -0.1]}
"""Log-probabilities of each choice's tokens: means -2, -0.5, -0.42, -0.5, -inf."""


def script(generation: Generation) -> Iterator[Step]:
    """Choice c puts out tokens 70 + c, spread over two deltas, the last choice first."""
    for part in (slice(1), slice(1, None)):
        for choice in reversed(range(generation.params.n)):
            logprobs = [TokenLogprobs(value, [], []) for value in MEANS[choice][part]]
            if logprobs:
                end = part.start is not None or len(MEANS[choice]) == 1
                yield [ChoiceDelta(choice, [70 + choice] * len(logprobs), logprobs, "length" if end else None)]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize(("n", "best"), [(1, [2]), (2, [2, 1]), (4, [2, 1, 3, 0]), (5, [2, 1, 3, 0, 4])])
def test_the_likeliest_are_the_answer(
    tokenizer: Tokenizer, served: ServedModel, path: str, body: dict[str, Any], n: int, best: list[int]
) -> None:
    api = Api(tokenizer, served, script)
    answer = api.post(path, **body, n=n, best_of=5, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(n))
    assert [choice["token_ids"][0] - 70 for choice in answer["choices"]] == best
    assert answer["usage"]["completion_tokens"] == sum(map(len, MEANS.values())), "all that was generated counts"
    assert all(choice["logprobs"] is None for choice in answer["choices"]), "not asked for"
    (generation,) = api.generator.generations
    assert (generation.params.n, generation.params.logprobs) == (5, 0)


def test_of_each_prompt_its_own(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, script)
    answer = api.post("/v1/completions", prompt=[[5], [6]], n=2, best_of=4, return_token_ids=True, logprobs=0)
    told = [(choice["index"], choice["prompt_token_ids"], choice["token_ids"][0] - 70) for choice in answer["choices"]]
    assert told == [(0, [5], 2), (1, [5], 1), (2, [6], 2), (3, [6], 1)]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == MEANS[2]


def test_without_a_choice_nothing_is_ranked(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, script)
    assert api.post("/v1/completions", prompt="x", best_of=1)["usage"]["completion_tokens"] == 2
    assert api.generator.generations[0].params.logprobs is None
    api.events("/v1/completions", prompt="x", best_of=1)
