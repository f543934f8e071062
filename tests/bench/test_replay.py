"""Replaying a trace with shared prefixes: a tiny one, in which some talks go on by turns."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench import replay
from bench.replay import one_by_one
from bench.replay_cluster import PullTime, Replay, StepTime
from bench.replay_workload import Workload
from bench.workload import read_trace
from cluster.config import BatchConfig

TALKS, TURNS, ENGINES = 11, 5, 3


def written(directory: Path, gap_ms: int) -> Path:
    """All talks begin with the same block; each turn adds one of its own to the talk's last prompt. Who comes next is chance."""
    turns = [talk for talk in range(TALKS) for _ in range(TURNS)]
    random.Random(1).shuffle(turns)
    talks: list[list[int]] = [[0, 1000 * talk] for talk in range(1, TALKS + 1)]
    lines = []
    for number, talk in enumerate(turns):
        talks[talk].append(talks[talk][-1] + 1)
        length = 512 * len(talks[talk]) - number % 500
        row = {"timestamp": number * gap_ms, "input_length": length, "output_length": 3, "hash_ids": talks[talk]}
        lines.append(json.dumps(row))
    path = directory / "trace.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def config(blocks: int) -> BatchConfig:
    return BatchConfig(num_blocks=blocks + 1, max_model_len=8192, max_num_batched_tokens=2048)


def test_equal_blocks_are_equal_tokens(tmp_path: Path) -> None:
    workload = Workload(read_trace(written(tmp_path, 100)))
    tokens: dict[int, list[int]] = {}
    for index, shape in enumerate(workload.shapes):
        prompt = workload.prompt(index)
        assert len(prompt) == shape.prompt_tokens
        for place, id in enumerate(shape.blocks[:-1]):
            assert tokens.setdefault(id, prompt[512 * place : 512 * (place + 1)]) == prompt[512 * place : 512 * (place + 1)]
    everything = [token for block in tokens.values() for token in block]
    everything += [token for index in range(len(workload.shapes)) for token in workload.output(index)]
    assert len(set(everything)) == len(everything)


def test_one_engine_hits_as_often_as_the_shared_cache(tmp_path: Path) -> None:
    workload = Workload(read_trace(written(tmp_path, 2000)))
    settings = config(workload.different_blocks // 3)
    shared, _ = one_by_one(workload, settings, 1)
    everything, _ = one_by_one(workload, config(2 * workload.different_blocks), 1)
    outcome = Replay(workload, "prefix", settings, 1, 1.0, StepTime()).run()
    assert 0.1 < shared < everything
    assert outcome.hit_rate == pytest.approx(shared)


def test_prefix_placement_hits_more_than_taking_turns(tmp_path: Path) -> None:
    workload = Workload(read_trace(written(tmp_path, 200)))
    settings = config(workload.different_blocks // ENGINES)
    shared, _ = one_by_one(workload, dataclasses.replace(settings, num_blocks=ENGINES * settings.num_blocks), 1)
    by_policy = {policy: Replay(workload, policy, settings, ENGINES, 1.0, StepTime()).run() for policy in replay.POLICIES}
    for outcome in by_policy.values():
        assert len(outcome.ttft) == len(workload.shapes)
        assert min(outcome.ttft) > 0
        assert sum(map(sum, outcome.by_minute)) == pytest.approx(sum(outcome.work))
    assert by_policy["round_robin"].hit_rate + 0.1 < by_policy["prefix"].hit_rate <= shared


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--engines", "2", "--shares", "2", "3", "--output-scale", "0.5", "--out", str(tmp_path)]
    replay.main(["--trace", str(written(tmp_path, 200)), *words])
    data: dict[str, Any] = json.loads((tmp_path / "replay.json").read_text())
    tables = list(data["tables"].values())
    assert [[row[""] for row in table][2:] for table in tables] == [[*replay.POLICIES, replay.PULLING]] * 2
    assert float(tables[0][2]["hit rate"]) < float(tables[0][4]["hit rate"])
    assert "step time" in capsys.readouterr().out


def test_what_a_holder_has_no_time_for_is_pulled_from_it(tmp_path: Path) -> None:
    """Requests come faster than the holders of their prefixes can take them."""
    workload = Workload(read_trace(written(tmp_path, 20)))
    settings = config(2 * workload.different_blocks)
    alone = Replay(workload, "prefix", settings, ENGINES, 1.0, StepTime()).run()
    pulling = Replay(workload, "prefix", settings, ENGINES, 1.0, StepTime(), PullTime()).run()
    assert pulling.pulls["done"] > 0
    assert pulling.pulled_tokens > 0
    assert not alone.pulls
