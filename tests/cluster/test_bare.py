"""A machine with torch and its companions only: the engine in one process works there, and so does the GPU's benchmark."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.model import DEMO_MODEL
from cluster.structs import PlainStruct

ROOT = Path(__file__).parents[2]
BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"msgspec", "ray", "fastapi", "pydantic", "zmq", "starlette", "uvicorn"}:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Missing())
"""
GENERATE = """
from cluster.offline import LLM
from cluster.protocol import SamplingParams

def generate(model):
    llm = LLM(model, dtype="float32", threads=1, kv_memory="8MiB", max_model_len=128)
    params = [SamplingParams(temperature=0.0, max_tokens=12), SamplingParams(seed=3, max_tokens=12, n=2, logprobs=1)]
    return [output.token_ids for completion in llm.generate(["def main(argv):", "import"], params) for output in completion.outputs]
"""


def run(code: str, *words: str) -> str:
    """Standard output of Python code."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_generate_gives_the_same_without_msgspec() -> None:
    here: dict[str, Any] = {}
    exec(GENERATE, here)
    assert json.loads(run(f"{BARE}{GENERATE}print(generate(sys.argv[1]))", str(DEMO_MODEL))) == here["generate"](str(DEMO_MODEL))


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "S").symlink_to(DEMO_MODEL, target_is_directory=True)
    words = ["--device", "cpu", "--models", "S", "--directory", str(tmp_path), "--out", str(tmp_path / "out")]
    words += ["--requests", "2", "--repetitions", "1", "--tokens", "3", "--dtypes", "bfloat16"]
    code = "\nimport torch; torch.set_num_threads(1)\nfrom bench.gpu import main\nraise SystemExit(main(sys.argv[1:]))"
    said = run(BARE + code, *words)
    assert "fp32: all tokens are those of transformers" in said
    tables = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))["tables"]
    parity, speed = tables["against transformers on the same tokens"], tables["output tokens per second"]
    assert [row["same outputs"] for row in parity] == ["8 of 8", None]
    assert {row["side"] for row in speed} >= {"rayline", "transformers generate, static"}
    assert (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8").count("\n|---|") == 2


class Base(PlainStruct, array_like=True):
    """As cluster.protocol.Wire."""


class Point(Base, tag=True):
    x: int
    y: int = 0
    seen: list[int] = []


class Named(Point, kw_only=True):
    name: str


def test_the_stand_in_is_built_like_a_struct() -> None:
    assert Point(1) == Point(1, 0, [])
    assert Point(1) != Point(2)
    assert Point(1).seen is not Point(1).seen
    assert repr(Point(1, 2)) == "Point(x=1, y=2, seen=[])"
    assert Named(1, name="a") != Point(1)
    assert (Named(1, 2, name="a").y, Named(x=1, name="a").name) == (2, "a")
    for wrong in (lambda: Point(), lambda: Named(1, 2, [], "a"), lambda: hash(Point(1))):  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError, match="empty"):

        class Full(PlainStruct):
            seen: list[int] = [1]
