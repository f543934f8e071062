"""A model served as `rayline serve` serves it, in a process of its own, for as long as a benchmark needs it.

The only place where bench.cluster meets the way a model is deployed: the command line of `rayline serve`, and the line that it says
when it is ready.
"""

import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import click

from cluster.cli import resolve, serve
from cluster.config import Config

_READY = re.compile(r"^serving .* at (http\S+)/v1")
_STOPPING = "stopping ..."
_END_S = 120.0
_NOTICE_S = 1.0
_KEPT = 40


class DeployError(RuntimeError):
    """`rayline serve` ended before it served; the text holds the last it said."""


def config_of(words: Sequence[str]) -> Config:
    """The settings that `rayline serve WORDS` runs with. Raises ConfigError; ConfigError or click.UsageError for bad words."""
    with serve.make_context("rayline serve", list(words)) as context:
        options = dict(context.params)
        return resolve(options.pop("model"), options.pop("config_file"), options)


@contextmanager
def deployed(words: Sequence[str]) -> Iterator[str]:
    """Run `rayline serve WORDS` while the context lasts; yields HTTP's base URL once the model answers.

    It uses the Ray cluster that RAY_ADDRESS names, else starts one. Raises DeployError.
    """
    command = [sys.executable, "-m", "cluster.cli", "serve", *words]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    said = _Said(process)
    interrupted = False
    try:
        yield said.url()
    except (KeyboardInterrupt, SystemExit):
        interrupted = True
        raise
    finally:
        # `ray job stop` signals this process's children too, and a second signal would end them without tidying up.
        if not (interrupted and said.stopping(_NOTICE_S)) and process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.close()


def used_error(error: Exception) -> str:
    """One line for the user, of what config_of raises."""
    return error.format_message() if isinstance(error, click.ClickException) else str(error)


class _Said:
    """What the process says, read in a thread of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._last: deque[str] = deque(maxlen=_KEPT)
        self._url: str | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def url(self) -> str:
        """The base URL, once it is said; `rayline serve` itself ends when loading takes too long."""
        with self._changed:
            self._changed.wait_for(lambda: self._url is not None or self._over)
            if self._url is None:
                raise DeployError("rayline serve did not come up:\n" + "\n".join(self._last))
            return self._url

    def stopping(self, within_s: float) -> bool:
        """Whether it has begun to stop by itself."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping or self._over, within_s)

    def close(self) -> None:
        """The process has ended. What it started may hold its output open for longer; that is not waited for."""
        self._thread.join(_NOTICE_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            self._take(self._process.stdout)

    def _take(self, lines: Iterable[str]) -> None:
        for line in lines:
            with self._changed:
                self._last.append(line.rstrip())
                if found := _READY.match(line):
                    self._url = found[1]
                self._stopping |= line.strip() == _STOPPING
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()
