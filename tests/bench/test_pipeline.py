"""The benchmarks of the pipeline: a small one of real processes, and what is reckoned from what stages tell."""

import json
from pathlib import Path

import pytest

from bench import hops
from bench.pipeline import Pipeline, Sleep, ask
from bench.timeline import Span, bubble


def test_a_pipeline_of_processes_says_when_each_stage_computed(tmp_path: Path) -> None:
    sleep = Sleep(0.001, 0.0001)
    with Pipeline(2, sleep, tmp_path) as running:
        for in_flight in (2, 3, 1):
            asked = [ask(f"r{number}", 20, 12) for number in range(5)]
            trace = running.run(in_flight, asked, until=lambda trace: trace.finished == 5)
            assert trace.counts == {f"r{number}": 12 for number in range(5)}
            assert len(trace.tokens_at) == 5 * 12
            steps = {span.step for span in trace.spans}
            assert steps == set(range(len(steps)))
            assert sorted((s.step, s.stage) for s in trace.spans) == [(step, stage) for step in sorted(steps) for stage in (0, 1)]
            by = {(s.step, s.stage): s for s in trace.spans}
            for step in steps:
                first, second = by[step, 0], by[step, 1]
                assert first.tokens == second.tokens
                assert first.end - first.start >= sleep.seconds(first.tokens)
                assert second.start > first.start + sleep.seconds(first.tokens), "it waits for what it computes on"
            assert sum(by[step, 0].tokens for step in steps) == 5 * (20 + 11)
            overlapping = sum(by[step + 1, 0].start < by[step, 1].end for step in sorted(steps)[:-1])
            assert (overlapping > 0) == (in_flight > 1)


def test_the_bubble_is_what_no_stage_used() -> None:
    spans = [Span(stage, step, step + stage, step + stage + 1.0, 1) for step in range(10) for stage in (0, 1)]
    assert bubble(spans, 2, 1.0, 10.0) == 0.0
    assert bubble(spans, 2, 0.0, 11.0) == pytest.approx(2 / 22)
    assert bubble(spans[:1], 2, 0.0, 1.0) == pytest.approx(0.5)


def test_hops(tmp_path: Path) -> None:
    hops.main(["--stages", "3", "--messages", "20", "--rounds", "2", "--without-ray", "--out", str(tmp_path)])
    (rows,) = json.loads((tmp_path / "hops.json").read_text())["tables"].values()
    assert [row[""] for row in rows] == ["mailboxes"]
    assert 0 < rows[0]["p10"] <= rows[0]["median, us"] <= rows[0]["p99"]
