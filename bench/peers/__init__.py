"""Other engines as sides of a comparison, each in an environment and a process of its own.

A peer is a script in this folder that the peer's own interpreter runs; it imports nothing of ours. It gets its model and settings
as arguments, says "ready" in a line, then answers lines of JSON: {"prompts": [[token ids]], "output_tokens": [n]} with
{"outputs": [[token ids]]}: greedy, end-of-sequence ignored, all requests at once.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.workload import Job

TIMEOUT_S = 900
"""For a start (vLLM may compile for minutes) and for an answer."""


class PeerError(RuntimeError):
    """A peer that doesn't start, or gave up; with the end of its log."""


class Peer:
    """A running peer. Its standard error, and what it prints besides answers, goes to a log."""

    def __init__(self, script: str, python: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        """Start `script` (of this folder, unless it is a whole path) with the interpreter `python`; wait until it is ready.

        Raises PeerError.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the peer
        answers, their_end = os.pipe()
        self._answers = os.fdopen(answers, "rb")
        command = [str(python), str(Path(__file__).parent / script), str(their_end), *arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[their_end],
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
            )
        except OSError as error:
            self._close_files()
            raise PeerError(f"{python} does not run: {error.strerror}") from None
        finally:
            os.close(their_end)
        if self._line() != b"ready\n":
            raise self._gone()

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Outputs in the order of the jobs. Raises PeerError."""
        asked = {"prompts": [job.prompt for job in jobs], "output_tokens": [job.output_tokens for job in jobs]}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        line = self._line()
        if not line:
            raise self._gone()
        answer: dict[str, Any] = json.loads(line)
        outputs: list[list[int]] = answer["outputs"]
        return outputs

    def cpu_s(self) -> float:
        """CPU seconds that the peer's live processes have used (all of its session)."""
        ticks = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:  # gone meanwhile
                    continue
                if int(fields[3]) == self._process.pid and fields[0] != "Z":
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it: no more requests come. A peer that does not end by itself is killed with all that it started."""
        self._end()
        self._close_files()

    def _line(self) -> bytes:
        ready, _, _ = select.select([self._answers], [], [], TIMEOUT_S)
        if not ready:
            raise self._gone(f"no answer in {TIMEOUT_S} s")
        return self._answers.readline()

    def _gone(self, why: str | None = None) -> PeerError:
        """End it, and what is to be raised. why: where it did not end by itself."""
        status = self._end()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        self._close_files()
        return PeerError(f"{why or f'the peer ended with {status}'}: {lines[-1][-300:] if lines else 'it said nothing'}")

    def _end(self) -> int:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _close_files(self) -> None:
        self._answers.close()
        self._log.close()
