"""Ends of processes on this machine: a frozen one goes too, and nobody else's does."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.processes import Process, end_here


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def described(pid: int) -> Process:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return Process("here", pid, int(file.read().rpartition(")")[2].split()[19]))


def test_a_frozen_process_is_gone_afterwards(sleeper: "subprocess.Popen[bytes]") -> None:
    process = described(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert end_here([process], 10.0) == []
    assert sleeper.wait(1) == -signal.SIGKILL


def test_one_that_ended_by_itself_and_is_not_reaped_counts_as_gone(sleeper: "subprocess.Popen[bytes]") -> None:
    process = described(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGTERM)
    assert end_here([process], 10.0) == []
    assert sleeper.wait(1) == -signal.SIGTERM, "it was given time to go"


def test_a_later_process_of_the_same_number_is_left_alone(sleeper: "subprocess.Popen[bytes]") -> None:
    process = described(sleeper.pid)
    assert end_here([Process("here", process.pid, process.started - 1)], 10.0) == []
    assert sleeper.poll() is None


def test_what_does_not_go_in_time_is_told(sleeper: "subprocess.Popen[bytes]") -> None:
    process = described(sleeper.pid)
    assert end_here([process], 0.1) == [process], "less than the time it is given to go by itself"
