"""The table of flips: zero where the promise has no exception, and a page that says where its figures come from."""

from pathlib import Path

import pytest
import torch

from bench import exactness
from bench.exactness import CAUSES, default_counts, load_bare, main, measure
from bench.exactness_page import BEGIN, END, HEADER, PAGE, Measured, Tally, interval, rate, read_page, row, source, write_page
from cluster.model import DEMO_MODEL, open_model


def test_fp32_flips_nothing_on_the_demo() -> None:
    files = open_model(str(DEMO_MODEL))
    causes = [
        cause for cause in CAUSES if cause not in ("batch of 2", "batch of 64", "prompt in chunks of 17", "prompt in chunks of 64")
    ]
    tallies = measure(load_bare(files, "float32", "cpu", 8), files, 64, causes, sequences=8)
    for cause, tally in tallies.items():
        assert (tally.greedy, tally.drawn) == (0, 0), cause
        assert tally.tokens >= 8, cause
        assert tally.largest == 0.0 if "batch" in cause else tally.largest < 1e-4, cause


def test_bf16_logits_differ_by_more() -> None:
    files = open_model(str(DEMO_MODEL))
    runner = load_bare(files, "bfloat16", "cpu", 8)
    tally = measure(runner, files, 32, ["prefill against decode"], sequences=4)["prefill against decode"]
    assert tally.largest > 1e-3
    assert "prefill against decode | 32" in row("demo", "bfloat16", "prefill against decode", tally)


@pytest.mark.parametrize(
    ("flips", "tokens", "wanted"), [(0, 10_000, (0, 3.84)), (5, 10_000, (2.14, 11.7)), (50, 100, (4038, 5962))]
)
def test_the_interval_is_wilsons(flips: int, tokens: int, wanted: tuple[float, float]) -> None:
    assert [1e4 * edge for edge in interval(flips, tokens)] == pytest.approx(wanted, rel=5e-3)
    assert rate(0, 0) == "not counted"


def test_only_full_batches_count() -> None:
    files = open_model(str(DEMO_MODEL))
    tallies = measure(load_bare(files, "float32", "cpu", 4), files, 20, ["batch of 2", "batch of 8"], sequences=5)
    assert {cause: tally.tokens for cause, tally in tallies.items()} == {"batch of 2": 16, "batch of 8": 0}
    assert row("demo", "float32", "batch of 8", tallies["batch of 8"]).endswith("| 0 | not counted | not counted | - |")


def test_the_page_has_the_table_of_the_command() -> None:
    assert "python -m bench.exactness" in BEGIN
    assert "\n".join(HEADER) in PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    measured = read_page()
    assert {dtype for _, dtype in measured} == {"float32", "bfloat16"}
    for (_, dtype), one in measured.items():
        assert "`python -m bench.exactness" in one.source
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in one.rows]
        assert [cells[2] for cells in rows] == list(CAUSES)
        for cells in rows:
            assert len(cells) == 7
            assert (int(cells[3]) == 0) == (cells[4] == "not counted")
            if dtype == "float32" and "batch" in cells[2] and one.source.startswith("cpu"):
                assert cells[6] == "0.0e+00"


def blank_page(path: Path) -> Path:
    path.write_text(f"before\n\n{BEGIN}\n\n{END}\n\nafter\n", encoding="utf-8")
    return path


def test_only_the_measured_pairs_are_replaced(tmp_path: Path) -> None:
    page = blank_page(tmp_path / "page.md")

    def measured(dtype: str, flips: int) -> Measured:
        command = f"python -m bench.exactness M --tokens {flips}"
        return Measured(source("cpu", command, "a CPU, torch 9"), [row("M", dtype, cause, Tally(10, flips)) for cause in CAUSES])

    old, kept, new = measured("bfloat16", 1), measured("float32", 2), measured("bfloat16", 3)
    write_page({("M", "bfloat16"): old, ("M", "float32"): kept}, page)
    write_page({("M", "bfloat16"): new}, page)
    assert read_page(page) == {("M", "bfloat16"): new, ("M", "float32"): kept}
    sources = [f"- M, bfloat16: {new.source}", f"- M, float32: {kept.source}"]
    table = ["", *HEADER, *new.rows, *kept.rows, "", "What gave the rows:", "", *sources, ""]
    assert page.read_text(encoding="utf-8") == "\n".join(("before", "", BEGIN, *table, END, "", "after", ""))


def test_a_row_that_nothing_gave_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join((BEGIN, row("M", "float32", "preemption", Tally(10)), END)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md does not say what gave"):
        read_page(page)


def test_the_command_writes_its_rows_and_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "measure", lambda runner, files, tokens, causes, sequences: {c: Tally(tokens) for c in causes})
    page = blank_page(tmp_path / "page.md")
    words = ["--dtypes", "float32", "--tokens", "7", "--threads", "1", "--device", "cpu", "--machine", "mine", "--write"]
    main([str(DEMO_MODEL), *words, "--page", str(page)])
    ((pair, one),) = read_page(page).items()
    assert pair == ("demo", "float32")
    assert one.rows == [row("demo", "float32", cause, Tally(7)) for cause in CAUSES]
    assert one.source == f"cpu, `python -m bench.exactness {DEMO_MODEL} {' '.join(words)} --page {page}`, mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--sequences", "65"], "at most 64 are kept"), (["--write", "--causes", "preemption"], "--write needs all causes")],
)
def test_what_cannot_work_is_said_at_once(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_less_is_counted_where_arithmetic_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = open_model(str(DEMO_MODEL))
    (tmp_path / "model.safetensors").touch()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(70 << 20)
    large = type(small)(tmp_path, small.shape, small.eos_token_ids)
    cases = [(files, dtype) for files in (small, large) for dtype in ("float32", "bfloat16")]

    def counts(device: str) -> list[tuple[int, int]]:
        return [default_counts(files, dtype, torch.device(device)) for files, dtype in cases]

    monkeypatch.setattr(exactness, "cpu_computes_bfloat16", lambda: False)
    assert counts("cpu") == [(10_000, 64), (2560, 64), (2560, 64), (512, 16)]
    assert counts("cuda") == [(10_000, 64)] * 4
    monkeypatch.setattr(exactness, "cpu_computes_bfloat16", lambda: True)
    assert counts("cpu") == [(10_000, 64)] * 4
