"""The benchmarks of the Batcher, the radix tree, the prefix index and placement, as small as they go."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import index, scheduling, trees


def test_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "SAMPLES", 5)
    trees.main(["--blocks", "1200", "--out", str(tmp_path)])
    assert (tmp_path / "trees.png").read_bytes().startswith(b"\x89PNG")
    tree, root = json.loads((tmp_path / "trees.json").read_text())["tables"].values()
    assert [row["in the tree"] for row in tree] == [1000, 1200] * 6
    assert all(row["p99, us"] >= row["median, us"] > 0 for row in [*tree, *root])
    assert all(row["us / block"] > 0 for row in tree if row[""] != "match, none")


def test_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SAMPLES", 5)
    index.main(["--engines", "3", "--blocks", "4000", "--out", str(tmp_path)])
    data = json.loads((tmp_path / "index.json").read_text())
    costs, placement = data["tables"].values()
    assert all(row["p99, us"] >= row["median, us"] > 0 for row in costs)
    assert data["index"]["names"] > 2000
    assert _holders(placement) == ["100%", "100%", None, "100%", "100%", None, None, None]


def test_engines_have_room_for_what_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        index.main(["--engines", "10", "--blocks", "1000"])
    assert "less than" in capsys.readouterr().err


def _holders(rows: list[dict[str, Any]]) -> list[Any]:
    assert all(row["p99, ms"] >= row["median, ms"] > 0 for row in rows)
    return [row["at the holder"] for row in rows]


def test_scheduling(tmp_path: Path) -> None:
    scheduling.main(["--sequences", "3,8", "--iterations", "5", "--out", str(tmp_path)])
    (table,) = json.loads((tmp_path / "scheduling.json").read_text())["tables"].values()
    assert [row["sequences"] for row in table] == [3, 8]
    assert all(row["schedule, us"] > 0 and row["update, us"] > 0 for row in table)
    assert len(scheduling.measure(4, 7)[0].us) == 7
