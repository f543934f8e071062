"""`rayline chat`: a conversation with a served model in the terminal. It knows the server by its OpenAI interface only."""

import contextlib
import io
import json
import sys
from collections.abc import Generator, Iterator
from typing import Any

import click
import httpx

from cluster.config import ConfigError

NEW = "/new"
"""Said instead of a question, it begins another conversation."""
_JSON = {"Content-Type": "application/json"}
_TIMEOUT = httpx.Timeout(None, connect=10.0)
"""An answer may wait for its turn as long as the server lets it: Ctrl-C ends the wait."""


class Refused(Exception):
    """The server's own words on why there is no answer, in one line."""

    def __init__(self, words: str, code: str | None = None) -> None:
        """code: OpenAI's, where the server names one."""
        super().__init__(" ".join(words.split()))
        self.code = code


class Conversation:
    """What was said so far. Its client is to be closed by whoever opened it."""

    def __init__(self, client: httpx.Client, model: str | None, system_prompt: str | None, parameters: dict[str, Any]) -> None:
        """client: with the server's base URL, /v1 included. model: the first one served where None. Raises Refused."""
        self._client = client
        self._parameters = {"model": model or self._first_model(), **parameters}
        self._system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self.messages = list(self._system)

    @property
    def model(self) -> str:
        """The model that answers."""
        return str(self._parameters["model"])

    def start_over(self) -> None:
        """Forget what was said."""
        self.messages = list(self._system)

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer, as it comes. Closing the iterator ends it; what had come by then is remembered. Raises Refused."""
        question = {"role": "user", "content": text}
        body = json.dumps({**self._parameters, "messages": [*self.messages, question], "stream": True})
        parts: list[str] = []
        try:
            with _told(self._client), self._client.stream("POST", "chat/completions", content=body, headers=_JSON) as response:
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
            if response.status_code == 404:
                raise Refused(f"{_refusal(response)}: {_no_server(self._client)}")
            _check(response)
            return str(response.json()["data"][0]["id"])


def chat(
    url: str, api_key: str | None, model: str | None, system_prompt: str | None, quick: str | None, parameters: dict[str, Any]
) -> None:
    """Answer `quick`, or else line by line what comes from standard input, until it ends (Ctrl-D). Raises ConfigError.

    parameters: of the request (max_tokens, temperature), beside model and messages.
    """
    try:
        with _client(url, api_key) as client:
            conversation = Conversation(client, model, system_prompt, parameters)
            if quick is not None:
                _say(conversation.ask(quick))
            else:
                _talk(conversation)
    except Refused as refusal:
        raise ConfigError(str(refusal)) from None


def _client(url: str, api_key: str | None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx.Client(base_url=url, timeout=_TIMEOUT, headers=headers)
    except httpx.InvalidURL as error:
        raise Refused(f"{url} is no URL: {error}") from None
    except UnicodeEncodeError:
        raise Refused("the API key has characters other than ASCII") from None


def _talk(conversation: Conversation) -> None:
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing and history)
        click.echo(f"{conversation.model} listens. Ctrl-C ends an answer, Ctrl-D the conversation; {NEW} begins another.")
    answered = False
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
        if text.strip() == NEW:
            conversation.start_over()
        if text.strip() in ("", NEW):
            continue
        answer = conversation.ask(text)
        try:
            _say(answer)
            answered = True
        except KeyboardInterrupt:
            answer.close()
            click.echo()
        except Refused as refusal:
            if not terminal and not answered:  # a script should learn of it
                raise
            full = refusal.code == "context_length_exceeded" or "context length" in str(refusal)
            hint = f" ({NEW} starts over)" if full else ""
            click.echo(f"rayline: {refusal}{hint}", err=True)


def _say(answer: Iterator[str]) -> None:
    begun = False
    try:
        for part in answer:
            click.echo(part, nl=False)
            begun = True
    except Refused:
        if begun:
            click.echo()
        raise
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
        raise Refused(_no_server(client)) from None


def _no_server(client: httpx.Client) -> str:
    return f"what answers at {client.base_url} is no OpenAI server (does the URL end in /v1?)"


def _check(response: httpx.Response) -> None:
    if response.status_code != 200:
        response.read()
        raise _refusal(response)


def _refusal(response: httpx.Response) -> Refused:
    """What a server says that gives no answer: in OpenAI's words, those of older vLLM or FastAPI, or any."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        if isinstance(error := answer.get("error"), dict) and error.get("message"):
            return _error(error)
        for words in ("message", "detail"):
            if answer.get(words):
                return Refused(f"{answer[words]} (status {response.status_code})")
    first = next((line.strip() for line in response.text.splitlines() if line.strip()), "")
    return Refused(f"status {response.status_code}: {first[:200] or response.reason_phrase}")


def _error(error: dict[str, Any]) -> Refused:
    return Refused(str(error["message"]), error.get("code"))


def _deltas(response: httpx.Response) -> Iterator[str]:
    """The texts of a stream of server-sent events."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        event = json.loads(data) if data else {}
        if "error" in event or event.get("object") == "error":
            raise _error(event.get("error", event))
        for choice in event.get("choices", []):
            if text := choice["delta"].get("content"):
                yield text
    raise Refused("the answer broke off")
