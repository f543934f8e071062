"""bench.against without any peer installed: what is asked, how figures are made of runs, and a whole run with fake sides."""

import json
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bench import against
from bench.against import WORKLOADS, Results, Side, Workload, at_a_time, main, setting
from bench.clients import Answer
from bench.clients import Run as Clients
from bench.peers import Peer, PeerError, measured, online
from bench.peers.known import Setting
from bench.peers.measured import Pair, Run, counted, enough, median_ratio, median_seconds, others_share
from bench.workload import Shape, jobs
from cluster.model import DEMO_MODEL, open_model

FAKE = """
import json, sys, time
name, delay = sys.argv[2:]
answers = open(int(sys.argv[1]), "w")
print("ready", json.dumps({"name": name, "computes": "float32"}), file=answers, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if delay == "dies" and max(asked["output_tokens"]) > 8:
        sys.exit("out of memory")
    time.sleep(0.0 if delay == "dies" else float(delay))
    outputs = [[ids[0]] * n for ids, n in zip(asked["prompts"], asked["output_tokens"])]
    print(json.dumps({"outputs": outputs}), file=answers, flush=True)
"""


def runs(*seconds: float, others: float = 0.0) -> list[Run]:
    return [Run(each, others, [[1, 2]]) for each in seconds]


# --- workloads ------------------------------------------------------------------------------------------------------


def test_the_workloads_have_the_shapes_they_are_told_to_have() -> None:
    offline, single, prefix = WORKLOADS["offline"], WORKLOADS["single"], WORKLOADS["prefix"]
    assert len(offline.shapes) == len(prefix.shapes) == 64
    assert all(32 <= shape.prompt_tokens <= 256 and 16 <= shape.output_tokens <= 128 for shape in offline.shapes)
    assert [(shape.prompt_tokens, shape.output_tokens) for shape in single.shapes] == [(128, 128)]
    assert {(shape.prompt_tokens, shape.output_tokens) for shape in prefix.shapes} == {(544, 32)}
    assert [each.prefix_cache for each in (offline, single, prefix)] == [False, False, True]


def test_prefixes_are_shared_and_new_in_each_repetition() -> None:
    first, second = (jobs(WORKLOADS["prefix"].shapes, 32_000, salt) for salt in (1, 2))
    for asked in (first, second):
        assert len({tuple(job.prompt[:512]) for job in asked}) == 1
        assert len({tuple(job.prompt[512:]) for job in asked}) == 64
    assert first[0].prompt[:512] != second[0].prompt[:512]


def test_figures_are_in_the_workloads_unit() -> None:
    assert WORKLOADS["single"].figure(1.28) == pytest.approx(10.0)
    prefix = WORKLOADS["prefix"]
    assert prefix.figure(2.0) == 64 * 32 / 2


def test_sides_have_room_for_all_requests_of_a_workload() -> None:
    made = setting([WORKLOADS["offline"], WORKLOADS["single"]], 2)
    shapes = WORKLOADS["offline"].shapes
    assert made.max_model_len == max(shape.total for shape in shapes) + 1
    assert made.kv_tokens == sum(shape.total for shape in shapes)
    assert made.words() == ["auto", "64", str(made.max_model_len), "--prefix-cache", "off", "--threads", "2", "--kv-tokens",
                            str(made.kv_tokens)]  # fmt: skip
    assert setting([WORKLOADS["prefix"]], 2).prefix_cache


def test_few_peers_run_at_a_time_where_memory_is_short() -> None:
    shape = open_model(str(DEMO_MODEL)).shape
    small = Setting(64, 385, 1000, 2, prefix_cache=False)
    assert at_a_time(DEMO_MODEL, shape, small, 2**40) > 4
    assert at_a_time(DEMO_MODEL, shape, small, 0) == 1
    assert against.available_bytes() > 0


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_medians_are_of_quiet_runs_where_half_are() -> None:
    loud = runs(9.0, 9.0, others=0.5)
    assert median_seconds([*runs(1.0, 2.0, 3.0), *loud]) == 2.0
    assert median_seconds([*runs(1.0), *loud]) == 9.0
    assert counted(loud) == loud
    assert median_seconds(runs(4.0)) == 4.0


@pytest.mark.parametrize(
    ("quiet", "total", "expected"), [(1, 1, True), (0, 1, False), (1, 2, False), (2, 3, True), (2, 5, False), (3, 5, True)]
)
def test_enough_is_half_and_two(quiet: int, total: int, expected: bool) -> None:
    assert enough(quiet, total) is expected


def test_a_ratio_is_the_median_of_pairs_that_are_quiet_on_both_sides() -> None:
    pairs = [Pair(*runs(1.0, ratio)) for ratio in (1.0, 2.0, 3.0)]
    loud = [Pair(Run(1.0, 0.0), Run(50.0, 0.2)), Pair(Run(1.0, 0.2), Run(50.0, 0.0))]
    assert median_ratio([*pairs, *loud]) == 2.0
    assert median_ratio(loud) == 50.0


def test_what_others_took_is_what_is_left_of_the_busy_time() -> None:
    assert others_share(own_s=6.0, busy_s=10.0, seconds=4.0, cores=2) == 0.5
    assert others_share(own_s=6.0, busy_s=5.9, seconds=4.0, cores=2) == 0.0


def test_measuring_counts_this_process_as_ours() -> None:
    before = measured.family_cpu_s()
    with measured.measuring() as run:
        sum(range(5_000_000))
    assert run.seconds > 0
    assert 0 <= run.others <= 1.5
    assert measured.family_cpu_s() >= before
    assert measured.busy_cpu_s() > 0


def test_the_table_and_the_verdict_name_the_best_peer() -> None:
    results = Results(Workload("tiny", [Shape(4, 2)]), runs(1.0, 1.0), titles={"fast": "Fast 1.0 (float32)"})
    results.pairs = {
        "slow": [Pair(*runs(1.0, 3.0)), Pair(*runs(1.0, 3.0))],
        "fast": [Pair(*runs(1.0, 1.5)), Pair(*runs(1.0, 1.5, others=0.3))],
    }
    ours, slow, fast = results.rows()
    assert ours == ["rayline", 2.0, 2.0, 1.0, None, "2/2", "0%", None]
    assert slow[4:] == ["3.00x", "2/2", "0%", "1/1"]
    assert fast[0] == "Fast 1.0 (float32)"
    assert len(ours) == len(results.columns())
    assert results.best == "fast"
    assert results.verdict().startswith("tiny: 1.50x the speed of the best peer, Fast 1.0 (float32) (median")
    assert Results(WORKLOADS["single"], runs(1.0)).verdict() == "single: no peer ran"


# --- whole runs -----------------------------------------------------------------------------------------------------


def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delays: dict[str, str]) -> None:
    (tmp_path / "fake.py").write_text(FAKE)

    def start(name: str, into: Path, model: Path, chosen: Setting) -> Peer:
        if name not in delays:
            raise PeerError("it is not installed")
        return Peer(str(tmp_path / "fake.py"), Path(sys.executable), name, delays[name])

    monkeypatch.setattr(against, "start", start)


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fakes(tmp_path, monkeypatch, {"rayline": "0.01", "vllm": "0.1", "openvino": "dies"})
    words = [str(DEMO_MODEL), "--workloads", "single,prefix", "--repetitions", "2", "--at-a-time", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    data = json.loads((tmp_path / "against.json").read_text())
    single, prefix = data["tables"].values()
    assert [row[""] for row in single] == ["rayline (float32)", "vllm (float32)"]
    assert [row["same outputs"] for row in single] == [None, "1/1"]
    assert [row["same outputs"] for row in prefix] == [None, "64/64"]
    said = capsys.readouterr().out
    assert "left out: openvino: the peer ended with 1: out of memory" in said
    assert "left out: llamacpp: it is not installed" in said
    assert "single: " in said
    assert "the speed of the best peer, vllm (float32)" in said
    told = data[f"{DEMO_MODEL.name} single"]
    assert len(told["runs"]["vllm"]) == len(told["ratios"]["vllm"]) == 2
    assert len(told["runs"]["rayline"]) == 4  # beside vllm and openvino, then beside the other two
    assert min(told["ratios"]["vllm"]) > 1


def test_without_ours_there_is_no_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes(tmp_path, monkeypatch, {"vllm": "0.0"})
    assert main([str(DEMO_MODEL), "--workloads", "single", "--repetitions", "1", "--out", str(tmp_path)]) == 1
    assert "FAILED: it is not installed" in capsys.readouterr().out


def test_a_side_is_stopped_between_its_turns(tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    side = Side("fake", Peer(str(tmp_path / "fake.py"), Path(sys.executable), "fake", "0.0"))
    (pid,) = side.peer.pids()
    run = side.run(Workload("tiny", [Shape(4, 2)]), 1000, 1)
    assert len(run.outputs[0]) == 2
    assert state(pid) == "T"
    side.peer.close()
    assert not Path(f"/proc/{pid}").exists()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is no Hugging Face directory"),
        ([str(DEMO_MODEL), "--workloads", "offline,online"], "'online' is not one of offline, single, prefix"),
        ([str(DEMO_MODEL), "--only", "ollama"], "'ollama' is not one of vllm, openvino, llamacpp, transformers"),
        ([str(DEMO_MODEL), "--repetitions", "0"], "0 is below 1"),
        ([], "required: MODEL_DIR"),
    ],
)
def test_bad_words_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


# --- over HTTP ------------------------------------------------------------------------------------------------------


def served(seconds: float, others: float = 0.0) -> online.Served:
    answer = Answer(0.0, [1, 2, 3], [0.1, 0.2, 0.3], 0.3)
    return online.Served(Run(seconds, others), Clients([answer] * 4, seconds, seconds / 10))


def test_online_rows_are_medians_of_quiet_runs() -> None:
    ours = [served(1.0), served(2.0), served(9.0, others=0.5)]
    theirs = [served(2.0), served(4.0), served(18.0)]
    first, second = online.rows({"ours": ours, "theirs": theirs})
    assert first[:6] == ["ours", pytest.approx(9.0), *(pytest.approx(100.0) for _ in range(4))]
    assert first[6:] == [None, "2/3", "0%", pytest.approx(0.1)]
    assert second[6:8] == ["2.00x", "3/3"]
    assert len(first) == len(online.COLUMNS)


def test_servers_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Serves:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, model: Path, arguments: Namespace, longest: int) -> "Serves":
            return self

        def __enter__(self) -> str:
            order.append(f"start {self.name}")
            return self.name

        def __exit__(self, *_: Any) -> None:
            order.append(f"end {self.name}")

    def answered(url: str, bodies: list[dict[str, Any]], streams: int) -> Clients:
        assert streams == 3
        assert {each["model"] for each in bodies} == {DEMO_MODEL.name}
        order.append(f"{len(bodies)} to {url}")
        answer = Answer(0.0, [1, 2, 3], [0.1, 0.2, 0.3], 0.3)
        return Clients([answer] * len(bodies), 1.0, 0.1)

    monkeypatch.setattr(online, "SERVERS", {"a": Serves("a"), "b": Serves("b")})
    monkeypatch.setattr(online, "run", answered)
    assert main(["--online", str(DEMO_MODEL), "--streams", "3", "--repetitions", "2", "--out", str(tmp_path)]) == 0
    once = [word for name in "ab" for word in (f"start {name}", f"16 to {name}", f"64 to {name}", f"end {name}")]
    assert order == once * 2
    data = json.loads((tmp_path / "against-online.json").read_text())
    assert len(next(iter(data["tables"].values()))) == 2


def test_a_failed_request_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "run", lambda *_: Clients([Answer(0.0, error="HTTP 500")], 1.0, 0.1))
    with pytest.raises(PeerError, match="1 of 1 requests failed, the first one with HTTP 500"):
        online.measure("http://nowhere", "m", jobs([Shape(4, 2)], 1000), jobs([Shape(4, 2)], 1000), 1)


def test_a_server_that_is_not_installed_says_how_to(tmp_path: Path) -> None:
    arguments = Namespace(peers=tmp_path, threads=1, streams=1)
    with pytest.raises(PeerError, match=r"python -m bench\.peers\.install vllm"), online.serve_vllm(DEMO_MODEL, arguments, 100):
        pass


def test_a_server_that_ends_does_not_answer() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True)
    assert not online.answers("http://127.0.0.1:9", process)
    online.end(process)
    assert process.returncode == 0
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    online.end(sleeping)
    assert sleeping.returncode == -signal.SIGTERM
