"""`rayline chat`: a conversation with a served model in the terminal. It knows the server by its OpenAI interface only."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import click
import httpx

from cluster.config import ConfigError

_TIMEOUT = httpx.Timeout(None, connect=10.0)
"""An answer may wait for its turn as long as the server lets it: Ctrl-C ends the wait."""


class Refused(Exception):
    """The server's own words on why there is no answer, in one line."""


class Conversation:
    """What was said so far. Its client is to be closed by whoever opened it."""

    def __init__(self, client: httpx.Client, model: str | None, system_prompt: str | None, parameters: dict[str, Any]) -> None:
        """client: with the server's base URL, /v1 included. model: the first one served where None. Raises Refused."""
        self._client = client
        self._parameters = {"model": model or self._first_model(), **parameters}
        self.messages: list[dict[str, str]] = []
        if system_prompt is not None:
            self.messages.append({"role": "system", "content": system_prompt})

    @property
    def model(self) -> str:
        """The model that answers."""
        return str(self._parameters["model"])

    @property
    def answered(self) -> bool:
        """At least one question was."""
        return any(message["role"] == "assistant" for message in self.messages)

    def ask(self, text: str) -> Iterator[str]:
        """The answer, as it comes. Closing the iterator ends it; what had come by then is remembered. Raises Refused."""
        question = {"role": "user", "content": text}
        body = {**self._parameters, "messages": [*self.messages, question], "stream": True}
        parts: list[str] = []
        try:
            with _told(self._client), self._client.stream("POST", "chat/completions", json=body) as response:
                _check(response)
                for part in _deltas(response):
                    parts.append(part)
                    yield part
        finally:
            if parts:
                self.messages += [question, {"role": "assistant", "content": "".join(parts)}]

    def _first_model(self) -> str:
        with _told(self._client):
            response = self._client.get("models")
            _check(response)
            return str(response.json()["data"][0]["id"])


def chat(url: str, model: str | None, system_prompt: str | None, quick: str | None, parameters: dict[str, Any]) -> None:
    """Answer `quick`, or else line by line what comes from standard input, until it ends (Ctrl-D). Raises ConfigError.

    parameters: of the request (max_tokens, temperature), beside model and messages.
    """
    try:
        with _client(url) as client:
            conversation = Conversation(client, model, system_prompt, parameters)
            if quick is not None:
                _say(conversation.ask(quick))
            else:
                _talk(conversation)
    except Refused as refusal:
        raise ConfigError(str(refusal)) from None


def _client(url: str) -> httpx.Client:
    try:
        return httpx.Client(base_url=url, timeout=_TIMEOUT)
    except httpx.InvalidURL as error:
        raise Refused(f"{url} is no URL: {error}") from None


def _talk(conversation: Conversation) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing and history)
        click.echo(f"{conversation.model} listens. Ctrl-C ends an answer, Ctrl-D the conversation.")
    while True:
        try:
            text = input("> " if terminal else "")
        except EOFError:
            if terminal:
                click.echo()
            return
        except KeyboardInterrupt:  # as in a shell: the line is forgotten
            click.echo()
            continue
        if not text.strip():
            continue
        answer = conversation.ask(text)
        try:
            _say(answer)
        except KeyboardInterrupt:
            answer.close()  # type: ignore[attr-defined]
            click.echo()
        except Refused as refusal:
            if not conversation.answered:
                raise
            click.echo(f"rayline: {refusal}", err=True)


def _say(answer: Iterator[str]) -> None:
    for part in answer:
        click.echo(part, nl=False)
    click.echo()


@contextlib.contextmanager
def _told(client: httpx.Client) -> Iterator[None]:
    """What can go wrong on the way to a server, in one line."""
    try:
        yield
    except httpx.ConnectError as error:
        raise Refused(f"no server answers at {client.base_url}: {error}") from None
    except httpx.HTTPError as error:
        raise Refused(f"the connection to {client.base_url} failed: {error or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Refused(f"what answers at {client.base_url} is no OpenAI server (does the URL end in /v1?)") from None


def _check(response: httpx.Response) -> None:
    if response.status_code != 200:
        response.read()
        raise Refused(_message(response.json()))


def _message(answer: dict[str, Any]) -> str:
    return " ".join(str(answer["error"]["message"]).split())


def _deltas(response: httpx.Response) -> Iterator[str]:
    """The texts of a stream of server-sent events."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        event = json.loads(data) if data else {}
        if "error" in event:
            raise Refused(_message(event))
        for choice in event.get("choices", []):
            if text := choice["delta"].get("content"):
                yield text
    raise Refused("the answer broke off")
