"""Peers in processes of their own: what they are asked, what they answer, and how their end is told."""

import sys
import time
from pathlib import Path

import pytest

from bench import peers
from bench.peers import Peer, PeerError
from bench.workload import Job

JOBS = [Job([5, 6, 7], 4), Job([9], 2)]
ECHO = """
import json, subprocess, sys
answers = open(int(sys.argv[1]), "w")
helper = subprocess.Popen([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.2: pass\\ntime.sleep(600)"])
print("noise on standard output", flush=True)
print("ready", file=answers, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    outputs = [(ids * n)[:n] for ids, n in zip(asked["prompts"], asked["output_tokens"])]
    print(json.dumps({"outputs": outputs}), file=answers, flush=True)
"""


def script(tmp_path: Path, text: str) -> str:
    (tmp_path / "peer.py").write_text(text)
    return str(tmp_path / "peer.py")


def test_a_peer_answers_and_leaves_no_process(tmp_path: Path) -> None:
    peer = Peer(script(tmp_path, ECHO), Path(sys.executable))
    assert peer.generate(JOBS) == peer.generate(JOBS) == [[5, 6, 7, 5], [9, 9]]
    end = time.monotonic() + 60
    while peer.cpu_s() < 0.2:  # its helper's, too
        assert time.monotonic() < end
    peer.close()
    assert peer.cpu_s() == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nprint('loading')\nsys.exit('no such model')", "ended with 1: no such model"),
        ("raise SystemExit(3)", "ended with 3: it said nothing"),
    ],
)
def test_a_peer_that_does_not_start_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        Peer(script(tmp_path, text), Path(sys.executable))


def test_a_peer_that_dies_later_says_why(tmp_path: Path) -> None:
    text = (
        "import sys\nprint('ready', file=open(int(sys.argv[1]), 'w'), flush=True)\nsys.stdin.readline()\nsys.exit('out of memory')"
    )
    peer = Peer(script(tmp_path, text), Path(sys.executable))
    with pytest.raises(PeerError, match="ended with 1: out of memory"):
        peer.generate(JOBS)
    peer.close()


def test_a_peer_that_does_not_answer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_S", 0)
    with pytest.raises(PeerError, match="no answer in 0 s: "):
        Peer(script(tmp_path, "import sys\nsys.stdin.read()"), Path(sys.executable))


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="nowhere/python does not run"):
        Peer("vllm_peer.py", tmp_path / "nowhere" / "python")
