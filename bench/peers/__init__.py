"""Other engines as sides of a comparison, each in an environment and a process of its own.

A peer is a script in this folder that the peer's own interpreter runs; it imports nothing of ours. It gets its model and settings
as arguments and says "ready" in a line, and if it likes what it is: ready {"name": "vLLM 0.32.0", "computes": "float32"}. Then it
answers lines of JSON: {"prompts": [[token ids]], "output_tokens": [n]} with {"outputs": [[token ids]]}: greedy, end-of-sequence
ignored, all requests at once.

    python -m bench.peers.install    makes the environments, and models in the formats that peers read
    python -m bench.against          compares them with our engine
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.workload import Job

TIMEOUT_S = 900
"""For a start (vLLM may compile for minutes) and for an answer."""
SIGNAL_S = 5.0
"""For processes to stop or end once they were told."""


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
        self.said: dict[str, Any] = {}
        """What it says of itself: its name, what it computes in."""
        ready, _, about = self._line().partition(b" ")
        if ready.rstrip() != b"ready":
            raise self._gone()
        if about:
            self.said = json.loads(about)

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
        ticks = sum(int(fields[11]) + int(fields[12]) for fields in self._members().values())
        return ticks / os.sysconf("SC_CLK_TCK")

    def pids(self) -> list[int]:
        """Of its live processes."""
        return list(self._members())

    def pause(self) -> None:
        """Stop its processes, so that it takes no CPU while others are measured, whatever its threads do when idle."""
        self._signal(signal.SIGSTOP)
        self._wait_until(lambda members: all(fields[0] in "Tt" for fields in members.values()))

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it: no more requests come. A peer that does not end by itself is killed with all that it started."""
        self._end()
        self._close_files()

    def _members(self) -> dict[int, list[str]]:
        """Live processes of its session, with the fields of /proc/PID/stat from the state on."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:  # gone meanwhile
                    continue
                if int(fields[3]) == self._process.pid and fields[0] != "Z":
                    found[int(entry.name)] = fields
        return found

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _wait_until(self, holds: Callable[[dict[int, list[str]]], bool]) -> None:
        """Signals take effect a little later; not for ever."""
        limit = time.monotonic() + SIGNAL_S
        while not holds(self._members()) and time.monotonic() < limit:
            time.sleep(0.001)

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
        self.resume()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._wait_until(lambda members: not members)
        return status

    def _close_files(self) -> None:
        self._answers.close()
        self._log.close()
