"""The benchmarks of single parts and of speculation, as small as they go."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import enlarged, index, sampling, scheduling, speculation, trees
from cluster.model import DEMO_MODEL
from cluster.offline import LLM
from cluster.protocol import SamplingParams


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


def test_sampling(tmp_path: Path) -> None:
    sampling.main(["--rows", "1,3", "--vocab", "200", "--threads", "1", "--repetitions", "2", "--out", str(tmp_path)])
    (table,) = json.loads((tmp_path / "sampling.json").read_text())["tables"].values()
    assert [row["rows"] for row in table] == [1] * 5 + [3] * 5
    assert all(row["native"] > 0 and row["torch"] > 0 for row in table)


def test_an_enlarged_model_computes_the_same_and_speculation_changes_no_token(tmp_path: Path) -> None:
    large = tmp_path / "large"
    enlarged.main([str(DEMO_MODEL), str(large), "--hidden", "1024", "--intermediate", "640", "--layers", "6"])
    prompt = list(range(50, 90))
    given = []
    for path in (DEMO_MODEL, large):
        with LLM(str(path), threads=1, dtype="float32") as llm:
            given.append(
                llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=12), ignore_eos=True)[0].outputs[0].token_ids
            )
    assert given[0] == given[1]
    words = f"{large} --draft {DEMO_MODEL} --batches 1,3 --repetitions 1 --threads 1 --dtype float32 --output-tokens 10".split()
    assert speculation.main([*words, "--out", str(tmp_path)]) == 0
    (table,) = json.loads((tmp_path / "speculation.json").read_text())["tables"].values()
    assert [row[""] for row in table] == ["off", "adaptive", "always K"] * 2
    assert all(row["proposed"] == 0 for row in table if row[""] == "off")
    assert all(row["accepted"] > 0.9 for row in table if row[""] == "always K")
    assert (tmp_path / "speculation.png").exists()
    assert speculation.main([*words, "--hopeless", "--out", str(tmp_path)]) == 0
    (table,) = json.loads((tmp_path / "speculation.json").read_text())["tables"].values()
    assert [row[""] for row in table] == ["off", "adaptive"] * 2
    assert table[1]["proposed"] > table[1]["accepted"] == 0
