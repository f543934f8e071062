"""`rayline chat` as a user runs it: a process of its own, with pipes or a terminal, before the router's HTTP edge."""

import asyncio
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import httpx
import pytest
from click.testing import CliRunner

from cluster.chat import Conversation, Refused
from cluster.cli import cli
from router.generation import ChoiceDelta, Generation, Overloaded
from router.prepare import ServedModel
from router.tokenizer import Tokenizer
from tests.router.fakes import Api, Step, one_by_one
from tests.router.test_client import PATIENCE_S, serving

STUCK = "stuck"
"""A question that gets the beginning of an answer and no end."""


def talker(tokenizer: Tokenizer) -> Any:
    """Answers the k-th question with "answer k"."""
    count = 0

    def script(generation: Generation) -> Iterator[Step]:
        nonlocal count
        count += 1
        tokens = tokenizer.encode_now(f"answer {count}", False)
        if STUCK not in tokenizer._encoder.decode(generation.prompt[-20:]):
            yield from one_by_one([*tokens, 2], "stop")
            return
        yield [ChoiceDelta(0, tokens)]
        yield asyncio.sleep(3600)

    return script


def prompts(api: Api, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer._encoder.decode(g.prompt, skip_special_tokens=False) for g in api.generator.generations]


def said(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def command(port: int, *words: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", "chat", "--url", f"http://127.0.0.1:{port}/v1", *words]


def run(port: int, *words: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(port, *words), input=text, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def running(port: int, stdin: int, stdout: int) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command(port), stdin=stdin, stdout=stdout, stderr=subprocess.STDOUT, close_fds=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)


class Screen:
    """What a process writes, in pieces that end where a test wants them to: what came after is kept for the next."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._unread = b""

    def until(self, wanted: bytes) -> bytes:
        while wanted not in self._unread:
            ready, _, _ = select.select([self._stream], [], [], PATIENCE_S)
            assert ready, (wanted, self._unread)
            more = os.read(self._stream.fileno(), 4096)
            assert more, (wanted, self._unread)
            self._unread += more
        end = self._unread.index(wanted) + len(wanted)
        seen, self._unread = self._unread[:end], self._unread[end:]
        return seen


def test_quick(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, talker(tokenizer))
    with serving(api) as port:
        done = run(port, "-q", "Hello", "--system-prompt", "Be brief.", "--max-tokens", "9", "--temperature", "0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "answer 1\n", "")
    assert prompts(api, tokenizer) == [said(("system", "Be brief."), ("user", "Hello"))]
    (generation,) = api.generator.generations
    assert (generation.params.max_tokens, generation.params.temperature) == (9, 0.5)


def test_the_conversation_is_kept(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, talker(tokenizer))
    with serving(api) as port:
        done = run(port, "--model", "tiny", text="one\n\ntwo\n")
    assert (done.returncode, done.stdout) == (0, "answer 1\nanswer 2\n"), done.stderr
    assert prompts(api, tokenizer)[1] == said(("user", "one"), ("assistant", "answer 1"), ("user", "two"))


def test_an_interrupt_ends_the_answer_and_not_the_conversation(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, talker(tokenizer))
    with serving(api) as port, running(port, subprocess.PIPE, subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin as questions, process.stdout as stdout:
            answers = Screen(stdout)
            questions.write(f"{STUCK}\n".encode())
            questions.flush()
            answers.until(b"answer 1")
            process.send_signal(signal.SIGINT)
            assert api.generator.any_closed.wait(PATIENCE_S), "the server was told"
            questions.write(b"two\n")
            questions.close()
            assert answers.until(b"answer 2\n") == b"\nanswer 2\n"
            assert process.wait(PATIENCE_S) == 0
    assert prompts(api, tokenizer)[1] == said(("user", STUCK), ("assistant", "answer 1"), ("user", "two"))


def test_at_a_terminal(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, talker(tokenizer))
    terminal, theirs = pty.openpty()
    with serving(api) as port, running(port, theirs, theirs) as process, os.fdopen(terminal, "r+b", buffering=0) as screen:
        os.close(theirs)
        seen = Screen(screen)
        assert b"tiny listens" in seen.until(b"> ")
        screen.write(b"long " * 400 + b"\n")
        seen.until(b"context")
        assert b"(/new starts over)" in seen.until(b"> "), "a first question that is refused ends nothing"
        screen.write(b"one\n")
        seen.until(b"answer 1\r\n")
        seen.until(b"> ")
        screen.write(b"/new\n")
        seen.until(b"> ")
        screen.write(b"two\n")
        seen.until(b"answer 2\r\n")
        seen.until(b"> ")
        screen.write(b"\x04")
        assert process.wait(PATIENCE_S) == 0
    assert prompts(api, tokenizer) == [said(("user", "one")), said(("user", "two"))]


def test_errors_are_one_line(tokenizer: Tokenizer, served: ServedModel) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        cases: list[tuple[Any, str]] = [(run(nobody.getsockname()[1], "-q", "x"), "no server answers")]
    with serving(Api(Tokenizer(tokenizer._encoder, {}, None), served)) as port:
        cases += [(run(port, "-q", "x"), "no chat template"), (run(port, text="x\n"), "no chat template")]
    with serving(Api(tokenizer, served, lambda _: [Overloaded(1.0)])) as port:
        cases += [(run(port, "-q", "x"), "queue is full"), (run(port, "-q", "x", "--model", "other"), "'other' does not exist")]
        cases += [(run(port, "--url", f"http://127.0.0.1:{port}", "-q", "x"), "Unknown request URL")]
        cases += [(run(port, "--url", "nonsense", "-q", "x"), "nonsense")]
    for done, reason in cases:
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("rayline: ")
        assert reason in line


def test_one_refused_answer_does_not_end_the_conversation(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, talker(tokenizer))
    with serving(api) as port:
        done = run(port, text="one\n" + "long " * 400 + "\ntwo\n")
    assert (done.returncode, done.stdout) == (0, "answer 1\nanswer 2\n")
    assert "context" in done.stderr
    assert prompts(api, tokenizer)[1] == said(("user", "one"), ("assistant", "answer 1"), ("user", "two"))


def test_a_refusal_in_mid_answer_has_a_line_of_its_own(tokenizer: Tokenizer, served: ServedModel) -> None:
    tokens = tokenizer.encode_now("answer", False)
    with serving(Api(tokenizer, served, lambda _: [[ChoiceDelta(0, tokens)], Overloaded(1.0)])) as port:
        done = run(port, "-q", "x")
    assert (done.returncode, done.stdout) == (2, "answer\n")
    assert "queue is full" in done.stderr


def test_what_is_no_utf8_is_asked_all_the_same(tokenizer: Tokenizer, served: ServedModel) -> None:
    api = Api(tokenizer, served, talker(tokenizer))
    with serving(api) as port:
        done = subprocess.run(command(port), input=b"caf\xe9\n", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"answer 1\n"), done.stderr
    assert prompts(api, tokenizer) == [said(("user", "caf\ufffd"))]


@contextmanager
def talking_to(answer: Callable[[httpx.Request], httpx.Response]) -> Iterator[httpx.Client]:
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x/v1") as client:
        yield client


REFUSALS = [
    (401, b'{"error": {"message": "no such\\nkey", "code": null}}', "no such key"),
    (400, b'{"object": "error", "message": "too long", "code": 400}', "too long (status 400)"),
    (422, b'{"detail": "Field required"}', "Field required (status 422)"),
    (500, b'{"error": "broken"}', 'status 500: {"error": "broken"}'),
    (502, b"\n<html>\nBad Gateway\n", "status 502: <html>"),
    (503, b"", "status 503: Service Unavailable"),
    (404, b"not here", "status 404: not here"),
]


@pytest.mark.parametrize(("status", "body", "words"), REFUSALS)
def test_a_refusal_is_told_in_the_servers_words(status: int, body: bytes, words: str) -> None:
    with talking_to(lambda request: httpx.Response(status, content=body)) as client:
        with pytest.raises(Refused) as refusal:
            list(Conversation(client, "m", None, {}).ask("x"))
        assert str(refusal.value) == words
        with pytest.raises(Refused) as refusal:
            Conversation(client, None, None, {})
        assert str(refusal.value).startswith(words)
        assert ("does the URL end in /v1?" in str(refusal.value)) == (status == 404)


@pytest.mark.parametrize("event", ['{"error": {"message": "no room"}}', '{"object": "error", "message": "no room", "code": 500}'])
def test_an_error_within_a_stream(event: str) -> None:
    with talking_to(lambda request: httpx.Response(200, content=f"data: {event}\n\n")) as client:
        with pytest.raises(Refused) as refusal:
            list(Conversation(client, "m", None, {}).ask("x"))
        assert str(refusal.value) == "no room"


@pytest.mark.parametrize(
    ("words", "environment", "sent"),
    [((), {}, None), ((), {"OPENAI_API_KEY": "a"}, "Bearer a"), (("--api-key", "b"), {"OPENAI_API_KEY": "a"}, "Bearer b")],
)
def test_the_key_is_sent_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], environment: dict[str, str], sent: str | None
) -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200, content=b"data: [DONE]\n\n")

    original = httpx.Client.__init__

    def opened(client: httpx.Client, **options: Any) -> None:
        original(client, transport=httpx.MockTransport(answer), **options)

    monkeypatch.setattr(httpx.Client, "__init__", opened)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    done = CliRunner().invoke(cli, ["chat", "--model", "m", "-q", "x", *words], env=environment)
    assert (done.exit_code, seen) == (0, [sent]), done.output


@pytest.mark.parametrize("body", [b"data: {broken\n\n", b"<html></html>", b'data: {"choices": [{}]}\n\n', b""])
def test_what_is_no_openai_server_is_said_so(body: bytes) -> None:
    with talking_to(lambda request: httpx.Response(200, content=body)) as client:
        with pytest.raises(Refused, match="no OpenAI server"):
            Conversation(client, None, None, {})
        conversation = Conversation(client, "m", None, {})
        with pytest.raises(Refused, match=r"no OpenAI server|broke off"):
            list(conversation.ask("x"))
        assert conversation.messages == []
