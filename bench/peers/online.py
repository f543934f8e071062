"""Servers under the same streams over HTTP: `rayline serve` and vLLM's OpenAI server, one at a time, in turn."""

import contextlib
import os
import signal
import statistics
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench import options
from bench.clients import Run as Clients
from bench.clients import body, run
from bench.deployed import DeployError, deployed
from bench.peers import TIMEOUT_S, PeerError
from bench.peers.known import KNOWN, variables
from bench.peers.measured import Pair, Run, counted, measuring, median_ratio
from bench.peers.vllm_peer import fastest_dtype, kv_gib
from bench.report import Cell, Report
from bench.workload import Job, Shape, jobs, uniform_shapes
from cluster.model import open_model
from cluster.ports import free_ports

HOST = "127.0.0.1"
REQUESTS = 64
WARM_UP = 16
COLUMNS = [
    "", "output tok/s", "TTFT ms p50", "TTFT p99", "ITL ms p50", "ITL p99", "its time / ours", "quiet runs", "others took at most",
    "client CPU",
]  # fmt: skip


@dataclass
class Served:
    """One run of one server: what its clients saw, and what others took."""

    machine: Run
    clients: Clients

    @property
    def figures(self) -> list[float | None]:
        """Output tokens per second, then percentiles in ms: TTFT 50 and 99, ITL 50 and 99."""
        seen = self.clients
        rate = seen.output_tokens / seen.seconds
        return [rate, *(seen.first_token_ms(p) for p in (50, 99)), *(seen.inter_token_ms(p) for p in (50, 99))]


def serve_rayline(model: Path, arguments: Namespace, longest: int) -> AbstractContextManager[str]:
    """`rayline serve` as a user starts it."""
    words = [str(model), "--host", HOST, "--port", str(free_ports(1)[0]), "--grpc-port", "0", "--haproxy", "on"]
    return deployed([*words, "--threads", str(arguments.threads), "--max-model-len", str(longest)])


@contextlib.contextmanager
def serve_vllm(model: Path, arguments: Namespace, longest: int) -> Iterator[str]:
    """vLLM's OpenAI server of the installed environment. Raises PeerError."""
    peer, port = KNOWN["vllm"], free_ports(1)[0]
    if not peer.environment.complete(arguments.peers):
        raise PeerError(f"vllm is not installed in {arguments.peers}: python -m bench.peers.install vllm --into {arguments.peers}")
    dtype = fastest_dtype()
    space = {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib(str(model), 2 * arguments.streams * longest, dtype))}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **space, **variables(peer, arguments.peers, arguments.threads)}
    python = peer.environment.python(arguments.peers).absolute()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", model.name]
    command += ["--dtype", dtype, "--max-model-len", str(longest), "--host", HOST, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            url = f"http://{HOST}:{port}"
            if not answers(url, process):
                log.seek(0)
                lines = log.read().decode(errors="replace").splitlines()
                raise PeerError(f"vLLM's server did not come up: {' / '.join(line[-200:] for line in lines[-5:])}")
            yield url
        finally:
            end(process)


def answers(url: str, process: "subprocess.Popen[bytes]", within_s: float = TIMEOUT_S) -> bool:
    """Wait until /health answers; False where the process ends before, or it takes too long."""
    limit = time.monotonic() + within_s
    with httpx.Client(base_url=url, timeout=5, trust_env=False) as client:
        while time.monotonic() < limit and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/health").status_code == 200:
                    return True
            time.sleep(0.5)
    return False


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask it to end, then kill what is left of what it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


SERVERS: dict[str, Callable[[Path, Namespace, int], AbstractContextManager[str]]] = {
    "rayline serve": serve_rayline,
    "vLLM's server": serve_vllm,
}


def measure(url: str, model: str, asked: Sequence[Job], warm: Sequence[Job], streams: int) -> Served:
    """One run after a warm-up. Raises PeerError where a request failed."""

    def through(some: Sequence[Job]) -> Clients:
        bodies: list[dict[str, Any]] = [body(job, model=model) for job in some]
        done = run(url, bodies, streams)
        if done.failed:
            raise PeerError(f"{len(done.failed)} of {len(some)} requests failed, the first one with {done.failed[0].error}")
        return done

    through(warm)
    with measuring() as machine:
        done = through(asked)
    return Served(machine, done)


def compare_servers(arguments: Namespace, report: Report) -> None:
    """All models, all servers, started and ended in turn for each repetition. Raises PeerError where one does not run."""
    shapes = uniform_shapes(REQUESTS)
    longest = max(shape.total for shape in shapes) + 1
    for model in arguments.models:
        vocab_size = open_model(str(model)).shape.vocab_size
        runs: dict[str, list[Served]] = {name: [] for name in SERVERS}
        for repetition in range(1, arguments.repetitions + 1):
            asked = jobs(shapes, vocab_size, salt=repetition)
            warm = jobs([Shape(64, 16)] * WARM_UP, vocab_size, salt=0)
            for name, serve in SERVERS.items():
                try:
                    with serve(model, arguments, longest) as url:
                        runs[name].append(measure(url, model.name, asked, warm, arguments.streams))
                except DeployError as error:
                    raise PeerError(str(error)) from error
                last = runs[name][-1]
                note = "" if last.machine.quiet else f" (not quiet: others took {last.machine.others:.0%})"
                report.say(f"  {name} {repetition}: {last.figures[0]:.0f} output tok/s{note}")
        report.table(
            f"{model.name}, {arguments.streams} streams over HTTP share {len(shapes)} requests: {options.summary(shapes)}",
            COLUMNS,
            rows(runs),
        )
        told = {name: [{"figures": one.figures, "others": one.machine.others} for one in some] for name, some in runs.items()}
        report.record(f"{model.name} online", told)


def rows(runs: dict[str, list[Served]]) -> list[list[Cell]]:
    """For COLUMNS; the first server is ours."""
    ours, *_ = runs.values()
    made: list[list[Cell]] = []
    for name, some in runs.items():
        count = counted([one.machine for one in some])
        kept = [one for one in some if any(one.machine is machine for machine in count)]
        figures = zip(*(one.figures for one in kept), strict=True)
        middle = [statistics.median(present) if (present := [v for v in values if v is not None]) else None for values in figures]
        ratio = median_ratio([Pair(one.machine, theirs.machine) for one, theirs in zip(ours, some, strict=True)])
        quiet = f"{sum(one.machine.quiet for one in some)}/{len(some)}"
        client = statistics.median(one.clients.cpu_s / one.clients.seconds for one in kept)
        told = None if some is ours else f"{ratio:.2f}x"
        made.append([name, *middle, told, quiet, f"{max(machine.others for machine in count):.0%}", client])
    return made
