"""What is recorded of the stages comes back as spans, and a file that can't be written harms nobody."""

from pathlib import Path

import pytest

from bench.timeline import Span, bubble, main, read
from cluster.protocol import StageTime, StageTimes
from cluster.recorder import Recorder


def test_what_is_written_is_read_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    recorder = Recorder(path, "engine-0")
    recorder.write(StageTimes(7, 0, [StageTime(0, 100.0, 101.0, 16), StageTime(1, 101.0, 102.0, 4)]))
    recorder.write(StageTimes(7, 1, [StageTime(0, 101.0, 102.0, 16)]))
    recorder.write(StageTimes(8, 0, [StageTime(0, 200.0, 201.0, 1)]))
    found = read(path)
    assert found == {
        ("engine-0", 7): [Span(0, 0, 100.0, 101.0, 16), Span(0, 1, 101.0, 102.0, 4), Span(1, 0, 101.0, 102.0, 16)],
        ("engine-0", 8): [Span(0, 0, 200.0, 201.0, 1)],
    }
    assert bubble(found["engine-0", 7], 2, 100.0, 102.0) == pytest.approx(0.25)
    assert bubble(found["engine-0", 7], 2, 101.5, 102.0) == pytest.approx(0.0)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "timeline-engine-0-7.png",
        "timeline-engine-0-8.png",
        "timeline.json",
    ]


def test_a_line_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken"
    path.write_text('{"engine": "e", "epoch": 1, "stage": 0, "step": 0, "start": 1.0, "end": 2.0, "tokens": 1}\n{"engine": 1}\n')
    assert main([str(path)]) == 2
    assert "line 2" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_complained_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path / "no" / "such", "engine-0")
    for _ in range(3):
        recorder.write(StageTimes(1, 0, [StageTime(0, 1.0, 2.0, 1)]))
    assert len(caplog.messages) == 1
