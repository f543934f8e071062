"""The table of flips: zero where the promise has no exception, and a page that says where its figures come from."""

import re
from pathlib import Path

import pytest

from bench.exactness import BEGIN, CAUSES, DEMO, END, HEADER, PAGE, Tally, interval, load_bare, measure, rate, row, write_page
from cluster.model import open_model


def test_fp32_flips_nothing_on_the_demo() -> None:
    files = open_model(str(DEMO))
    causes = [
        cause for cause in CAUSES if cause not in ("batch of 2", "batch of 64", "prompt in chunks of 17", "prompt in chunks of 64")
    ]
    tallies = measure(load_bare(files, "float32", "cpu", 8), files, 64, causes, sequences=8)
    for cause, tally in tallies.items():
        assert (tally.greedy, tally.drawn) == (0, 0), cause
        assert tally.tokens >= 8, cause
        assert tally.largest == 0.0 if "batch" in cause else tally.largest < 1e-4, cause


def test_bf16_logits_differ_by_more() -> None:
    files = open_model(str(DEMO))
    runner = load_bare(files, "bfloat16", "cpu", 8)
    tally = measure(runner, files, 32, ["prefill against decode"], sequences=4)["prefill against decode"]
    assert tally.largest > 1e-3
    assert "prefill against decode | 32" in row("demo", "bfloat16", "prefill against decode", tally)


@pytest.mark.parametrize(
    ("flips", "tokens", "wanted"), [(0, 10_000, (0, 3.84)), (5, 10_000, (2.14, 11.7)), (50, 100, (4038, 5962))]
)
def test_the_interval_is_wilsons(flips: int, tokens: int, wanted: tuple[float, float]) -> None:
    assert [1e4 * edge for edge in interval(flips, tokens)] == pytest.approx(wanted, rel=5e-3)
    assert rate(0, 0) == "-"


def test_the_page_has_the_table_of_the_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.split(BEGIN)[1].split(END)[0].strip().split("\n")
    assert "python -m bench.exactness" in BEGIN
    assert re.match(r"Measured on: .*(CPU|GPU|NVIDIA|core).*torch", table[0])
    assert table[2:4] == list(HEADER)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[4:]]
    assert {cells[1] for cells in rows} == {"float32", "bfloat16"}
    for cells in rows:
        assert len(cells) == 7
        assert cells[2] in CAUSES
        assert int(cells[3]) >= 0
        if cells[1] == "float32" and "batch" in cells[2]:
            assert cells[6] == "0.0e+00"


def test_the_table_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n", encoding="utf-8")
    lines = [*HEADER, row("demo", "float32", "batch of 2", Tally(10, 0, 1, 0.5))]
    write_page(lines, page)
    assert page.read_text(encoding="utf-8") == "\n".join(("before", "", BEGIN, "", *lines, "", END, "", "after", ""))
