"""The measurement of KV dtypes once, as small as it goes."""

import json
import math
from pathlib import Path

import pytest
import torch

from bench import kv_dtype
from cluster.model import DEMO_MODEL


def test_all_kinds_are_measured(tmp_path: Path) -> None:
    words = ["--text-tokens", "128", "--context", "64", "--sequences", "2", "--repetitions", "1", "--kv-memory", "4MiB"]
    kv_dtype.main([str(DEMO_MODEL), *words, "--threads", "1", "--out", str(tmp_path)])
    (rows,) = json.loads((tmp_path / "kv_dtype.json").read_text())["tables"].values()
    found = {row["kv_dtype"]: row for row in rows}
    assert list(found) == ["float32", "bfloat16", "float16", "int8", "fp8"]
    assert found["float32"]["KL"] == 0
    assert 0 < found["int8"]["KL"] < found["fp8"]["KL"] < 0.02
    assert found["int8"]["same top 1"] > 0.95
    assert found["int8"]["times bf16's"] > 1.7
    assert all(row["step ms"] > row["attention ms"] >= 0 for row in rows)


def test_a_divergence_is_that_of_the_definition() -> None:
    wanted, own = torch.tensor([[0.6, 0.4], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    divergence, same = kv_dtype.compared(own, wanted)
    assert divergence == pytest.approx((0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75)) / 2, rel=1e-5)
    assert same == 0.5
