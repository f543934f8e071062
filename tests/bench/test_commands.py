"""Each command once, as small as it goes; and what reports look like."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as whole
from bench import arrivals, batching, channel, occupancy, offline, options, prefix, pull, waste
from bench.contenders import Contender, continuous_generate, rayline, static_generate
from bench.peers import PeerError
from bench.report import Report, cpu_ticks, render, steal_share
from bench.workload import Shape, jobs
from cluster.model import DEMO_MODEL
from cluster.offline import LLM

DEMO = str(DEMO_MODEL)
SMALL = ["--requests", "6", "--prompt-tokens", "4", "--output-scale", "0.02", "--threads", "1", "--dtype", "float32"]
SMALL += ["--kv-memory", "8MiB"]


def written(directory: Path, name: str) -> dict[str, Any]:
    assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    data: dict[str, Any] = json.loads((directory / f"{name}.json").read_text())
    assert data["command"].startswith(f"python -m bench.{name} ")
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["cpu_steal_share"] is None or 0 <= data["machine"]["cpu_steal_share"] <= 1
    return data


def test_batching(tmp_path: Path) -> None:
    words = ["--slots", "2", "--sweep", "1,2,8", "--sweep-requests", "2", "--repetitions", "2", "--out", str(tmp_path)]
    batching.main([DEMO, *SMALL, *words])
    data = written(tmp_path, "batching")
    (rows,) = data["tables"].values()
    kinds = [row[""].split()[0] for row in rows]
    assert kinds == ["continuous", "static", "static-skip", "continuous"]
    assert "default" in rows[3][""]
    assert set(data["sweep static"]) == {"1", "2"}
    assert all(len(runs["wall_s"]) == 2 for runs in data["repetitions"].values())


def test_a_peer_that_does_not_run_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any) -> Any:
        raise NotImplementedError("not on this machine")

    def dies(jobs: Any) -> Any:
        raise PeerError("it ended with 3")

    closed = []
    monkeypatch.setattr(batching, "continuous_generate", fails)
    monkeypatch.setattr(batching, "vllm_offline", lambda *arguments: Contender("vLLM", dies, lambda: closed.append("vLLM")))
    words = ["--slots", "2", "--sweep", "2", "--repetitions", "1", "--peers", "--peer-dtype", "float32", "--vllm", "python"]
    batching.main([DEMO, *SMALL, *words, "--out", str(tmp_path)])
    data = written(tmp_path, "batching")
    names = [row[""] for row in next(iter(data["tables"].values()))]
    assert names[-1] == "transformers generate float32 (batch 2, as they come)"
    assert set(data["sweep transformers generate"]) == {"2"}
    said = capsys.readouterr().out
    assert "left out: transformers' continuous batching does not run here: NotImplementedError" in said
    assert "left out: vLLM does not run here: PeerError: it ended with 3" in said
    assert closed == ["vLLM"]


def test_all_sides_are_closed_where_one_fails_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def peer(name: str) -> Contender:
        return Contender(name, lambda jobs: [[1]] * len(jobs), lambda: closed.append(name))  # too few tokens

    monkeypatch.setattr(batching, "peers", lambda *arguments: [peer("transformers")])
    monkeypatch.setattr(batching, "vllm_offline", lambda *arguments: peer("vLLM"))
    words = ["--slots", "2", "--sweep", "2", "--peers", "--vllm", "python", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="transformers did not give the number"):
        batching.main([DEMO, *SMALL, *words])
    assert sorted(closed) == ["transformers", "vLLM"]


def test_the_best_batch_is_the_fastest() -> None:
    rates = {4: 1.0, 8: 3.0, 16: 3.0, 32: 2.0}
    assert batching.best_batch([32, 8, 4, 16], 64, lambda size: rates[size]) == (8, rates)


def test_the_sweep_goes_on_while_the_largest_batch_is_the_best() -> None:
    def rate(size: int) -> float:
        return min(size, 50)

    assert batching.best_batch([8, 16], 200, rate) == (64, {8: 8, 16: 16, 32: 32, 64: 50, 128: 50})
    assert batching.best_batch([8, 16], 48, rate) == (48, {8: 8, 16: 16, 32: 32, 48: 48})
    assert batching.best_batch([8, 16, 32], 10, rate) == (10, {8: 8, 10: 10})


def test_arrivals(tmp_path: Path) -> None:
    words = [
        "--batches",
        "2",
        "--waits",
        "0",
        "--factors",
        "4",
        "--seeds",
        "1",
        "--tolerance",
        "1",
        "--window",
        "1",
        "--out",
        str(tmp_path),
    ]
    arrivals.main([DEMO, *SMALL, *words])
    data = written(tmp_path, "arrivals")
    assert data["unloaded"]["p90_s_per_token"] > 0
    assert len(data["tables"]) == 2


def test_arrivals_refuses_cpu_time_of_several_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arrivals.main([DEMO, "--threads", "2"])
    assert "--clock wall" in capsys.readouterr().err


def test_pull(tmp_path: Path) -> None:
    assert pull.main([DEMO, "--tokens", "64", "--repetitions", "1", "--out", str(tmp_path)]) == 0
    (rows,) = json.loads((tmp_path / "pull.json").read_text())["tables"].values()
    assert rows[0]["tokens"] == 64
    assert rows[0]["MiB/s"] > 0


def test_prefix(tmp_path: Path) -> None:
    assert prefix.main([DEMO, "--requests", "3", "--repetitions", "1", "--out", str(tmp_path)]) == 0
    tables = json.loads((tmp_path / "prefix.json").read_text())["tables"]
    shared, apart, host, choices = tables.values()
    assert [row["cache"] for row in shared] == [row["cache"] for row in apart] == ["off", "on"]
    assert [row["host memory"] for row in host] == ["off", "on"]
    assert shared[1]["times"] > 1
    assert (choices[1]["n"], choices[1]["times n = 1"]) == (8, 1.25)


def test_waste(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    rows = [f"2023-11-16 18:15:{i:02}.0,{100 + i},{1 + 7 * i}" for i in range(40)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    waste.main(["--trace", str(trace), "--max-model-len", "512", "--pool-sequences", "4", "--out", str(tmp_path)])
    data = written(tmp_path, "waste")
    assert data["paged (default)"]["waste"] < data["max_tokens, exact"]["waste"] < data["contiguous"]["waste"]


def test_occupancy(tmp_path: Path) -> None:
    occupancy.main(["--slots", "2,4", "--checked", "10", "--out", str(tmp_path)])
    (rows,) = written(tmp_path, "occupancy")["tables"].values()
    assert [row["slots"] for row in rows] == [2, 4]
    assert all(float(row["static"].rstrip("%")) < float(row["continuous"].rstrip("%")) for row in rows)


def test_channel(tmp_path: Path) -> None:
    channel.main(["--messages", "3", "--rounds", "2", "--out", str(tmp_path)])
    (rows,) = written(tmp_path, "channel")["tables"].values()
    assert [row[""] for row in rows] == ["plain", "curve"]
    assert all(0 < row["one way, us"] < row["round trip, us"] for row in rows)


def test_a_trace_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (waste.main, occupancy.main):
        with pytest.raises(SystemExit):
            command(["--trace", str(tmp_path / "missing")])
        assert "No such file" in capsys.readouterr().err.splitlines()[-1]


def test_offline_and_its_sides_agree(tmp_path: Path) -> None:
    words = ["--requests", "3", "--repetitions", "1", "--threads", "1", "--peer-dtype", "float32", "--no-warmup"]
    offline.main([DEMO, *words, "--dtype", "float32", "--out", str(tmp_path)])
    assert written(tmp_path, "offline")["ratio"]["same_outputs"] == 3


def test_peers_give_our_tokens() -> None:
    some = jobs([Shape(9, 5), Shape(20, 9), Shape(3, 12)], 4096)
    ours = rayline(LLM(DEMO, dtype="float32", threads=1, kv_memory="8MiB"))
    peers = [static_generate(DEMO, "float32", 2, by_length=False), continuous_generate(DEMO, "float32", 2, 32)]
    for side in (ours, *peers):
        side.run(some)
        side.close()
    assert ours.outputs == peers[0].outputs == peers[1].outputs
    assert peers[1].how == "sdpa"


def test_a_side_with_too_few_tokens_is_an_error() -> None:
    side = rayline(LLM(DEMO, dtype="float32", threads=1, kv_memory="8MiB"))
    side.generate = lambda jobs: [[1]] * len(jobs)
    with pytest.raises(RuntimeError, match="number of tokens"):
        side.run(jobs([Shape(3, 2)], 4096))


def test_the_set_hands_its_options_on() -> None:
    parser = options.parser(None)
    parser.add_argument("--model")
    parser.add_argument("--trace")
    names = ["bench.offline", "bench.batching", "bench.arrivals", "bench.occupancy", "bench.waste", "bench.prefix"]
    commands = whole.commands(parser.parse_args(["--model", "M", "--trace", "T", "--out", "O"]))
    assert [words[0] for words in commands] == names
    assert all(words[-2:] == ["--out", "O"] for words in commands)
    assert [("T" in words, "M" in words) for words in commands] == [
        (False, True),
        *[(True, True)] * 2,
        *[(True, False)] * 2,
        (False, True),
    ]
    assert [words[0] for words in commands if "--spread" in words] == ["bench.batching", "bench.arrivals", "bench.waste"]


def test_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(["", "rate"], [["a", 1234.5], ["long", 0.12345], ["c", None], ["d", math.inf]]) == (
        "       rate\na      1234\nlong  0.123\nc         -\nd       inf"
    )
    report = Report("batching", ["MODEL"])
    report.say("hello")
    report.table("title", ["", "x"], [["a", 1]])
    report.record("points", {0.5: [1.0, math.inf]})
    data = json.loads(report.save(tmp_path / "new").read_text())
    assert data["command"] == "python -m bench.batching MODEL"
    assert data["tables"] == {"title": [{"": "a", "x": 1}]}
    assert data["points"] == {"0.5": [1.0, None]}
    assert "hello" in data["text"]
    assert "title" in capsys.readouterr().out


def test_stolen_time_is_a_share_of_all() -> None:
    assert steal_share((10, 1000), (40, 1200)) == 0.15
    assert steal_share(None, (40, 1200)) is steal_share((10, 1000), None) is steal_share((10, 1000), (10, 1000)) is None
    ticks = cpu_ticks()
    assert ticks is None or 0 <= ticks[0] <= ticks[1]
