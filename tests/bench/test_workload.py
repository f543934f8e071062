"""Traces, scaling, fitting, arrivals and token ids."""

from pathlib import Path

import numpy as np
import pytest

from bench import options
from bench.workload import (
    Shape,
    TraceError,
    at_once,
    clipped,
    dropped,
    jobs,
    lognormal_shapes,
    poisson,
    read_trace,
    scaled,
    uniform_shapes,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:48.1805900,396,109
2023-11-16 18:16:46.6805900,879,55
"""
MOONCAKE = """{"timestamp": 27000, "input_length": 1000, "output_length": 500, "hash_ids": [7, 1]}
{"timestamp": 30500, "input_length": 600, "output_length": 3, "hash_ids": [7, 2]}
"""


def write(directory: Path, text: str, name: str = "trace") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [AZURE, AZURE.replace("\n", "\r\n"), "\ufeff" + AZURE])
def test_azure(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"  # the name says nothing
    path.write_bytes(text.encode())
    assert read_trace(path) == [Shape(374, 44, 0.0), Shape(396, 109, 1.5), Shape(879, 55, 60.0)]
    assert read_trace(path, 2) == read_trace(path)[:2]


def test_mooncake(tmp_path: Path) -> None:
    path = write(tmp_path, MOONCAKE + "\n", "trace.csv")
    assert read_trace(path) == [Shape(1000, 500, 0.0, (7, 1)), Shape(600, 3, 3.5, (7, 2))]
    assert read_trace(path, 1) == [Shape(1000, 500, 0.0, (7, 1))]


def test_order_of_arrival(tmp_path: Path) -> None:
    lines = MOONCAKE.splitlines()
    assert [s.arrival_s for s in read_trace(write(tmp_path, "\n".join(lines[::-1])))] == [0.0, 3.5]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (AZURE.replace("396", "many"), 3, "'many'"),
        (AZURE.replace(",55", ",0"), 4, "GeneratedTokens is 0"),
        (AZURE.replace(",55", ""), 4, "int()"),
        (AZURE.replace("2023-11-16 18:16", "noon"), 4, "noon"),
        (MOONCAKE.replace('"output_length": 3, ', ""), 2, "'output_length' is missing"),
        (MOONCAKE.replace("600", '"600"'), 2, "input_length is '600'"),
        (MOONCAKE.replace("600", "true"), 2, "input_length is True"),
        (MOONCAKE + "{", 3, "Expecting property name"),
        (MOONCAKE + "[]", 3, "not a JSON object"),
        ("a,b,c\n1,2,3\n", 1, "neither"),
        ("", 1, "neither"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert reason in str(error.value)


def test_no_requests_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no requests in it"):
        read_trace(write(tmp_path, AZURE.splitlines()[0] + "\n"))
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "missing")


def test_scaling() -> None:
    shapes = [Shape(1000, 3, blocks=(7, 1)), Shape(3, 400)]
    assert scaled(shapes, 0.1, 0.25) == [Shape(100, 1, blocks=(7, 1), block_tokens=51), Shape(1, 100, block_tokens=51)]
    assert [s.prompt_tokens for s in scaled(shapes, 0.1, 1.0, prompt_tokens=32)] == [32, 32]


def test_too_long() -> None:
    shapes = [Shape(60, 40), Shape(61, 40), Shape(5, 500)]
    assert dropped(shapes, 100) == shapes[:1]
    assert [(s.prompt_tokens, s.output_tokens) for s in clipped(shapes, 100)] == [(60, 40), (60, 40), (1, 99)]


def test_synthetic_shapes_are_the_same_every_time() -> None:
    assert uniform_shapes() == uniform_shapes()
    assert (sum(s.prompt_tokens for s in uniform_shapes()), sum(s.output_tokens for s in uniform_shapes())) == (8836, 4249)
    shapes = lognormal_shapes(4000)
    assert shapes == lognormal_shapes(4000) != lognormal_shapes(4000, seed=1)
    outputs = [s.output_tokens for s in shapes]
    assert np.median(outputs) == pytest.approx(128, rel=0.1)
    assert np.mean(outputs) > 1.25 * np.median(outputs)


def test_poisson() -> None:
    some = jobs([Shape(1, 1)] * 4000, 100)
    slow, fast, other = (poisson(some, rate, seed) for rate, seed in ((2.0, 1), (8.0, 1), (2.0, 2)))
    times = [job.arrival_s for job in slow]
    assert times[0] == 0.0
    assert times == sorted(times)
    gaps = np.diff(times)
    assert np.mean(gaps) == pytest.approx(0.5, rel=0.1)
    assert np.std(gaps) == pytest.approx(0.5, rel=0.1)
    assert times == pytest.approx([4 * job.arrival_s for job in fast])
    assert times == [job.arrival_s for job in poisson(some, 2.0, 1)] != [job.arrival_s for job in other]
    assert poisson([], 1.0, 1) == []


def test_equal_hash_ids_are_equal_tokens() -> None:
    shapes = scaled([Shape(1000, 5, blocks=(7, 1)), Shape(600, 5, blocks=(7, 2)), Shape(1200, 5, blocks=(7, 1, 3))], 0.125, 1.0)
    one, two, three = (job.prompt for job in jobs(shapes, 1000))
    assert [len(one), len(two), len(three)] == [125, 75, 150]
    assert one[:64] == two[:64] == three[:64]
    assert one[64:75] != two[64:75]
    assert one[64:] == three[64:125]
    assert jobs(shapes, 1000, salt=1)[0].prompt[:64] != one[:64]


def test_prompts_without_hash_ids_differ() -> None:
    one, two = jobs([Shape(40, 7), Shape(40, 7)], 4096)
    assert one.prompt != two.prompt
    assert all(300 <= id < 4096 for id in one.prompt + two.prompt)
    assert (one.output_tokens, one.asked) == (7, 7)


def test_workload_options(tmp_path: Path) -> None:
    parser = options.parser(None)
    options.add_workload(parser, requests=2, prompt_scale=1.0, output_scale=1.0)
    path = str(write(tmp_path, AZURE))
    said: list[str] = []

    def shapes(*words: str, longest: int = 10_000) -> list[int]:
        made = at_once(options.workload(parser.parse_args(["--trace", path, *words]), longest, said.append))
        return [shape.prompt_tokens for shape in made]

    assert shapes() == [374, 396]
    assert shapes("--requests", "0") == [374, 396, 879]
    assert shapes("--requests", "2", "--spread") == [374, 396]
    assert shapes("--requests", "1", "--prompt-tokens", "16") == [16]
    assert shapes("--requests", "3", longest=600) == [374, 396]
    assert "1 requests longer than 600 tokens dropped; 2 remain" in said[-1]
    assert shapes("--requests", "3", "--too-long", "clip", longest=600) == [374, 396, 545]
    with pytest.raises(ValueError, match="none of 2 requests fits 9 tokens"):
        shapes(longest=9)
