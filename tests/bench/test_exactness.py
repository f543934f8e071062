"""The table of flips: zero where the promise has no exception, and a page that says where its figures come from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import divided, exactness
from bench.exactness import CAUSES, Case, default_counts, load_bare, main, measure
from bench.exactness_page import BEGIN, END, HEADER, PAGE, Measured, Part, Tally, interval, rate, read_page, row, source, write_page
from cluster.model import DEMO_MODEL, open_model
from cluster.protocol import SamplingParams
from tests.workers.models import make_model, prompt


def test_fp32_flips_nothing_on_the_demo() -> None:
    files = open_model(str(DEMO_MODEL))
    causes = [
        cause for cause in CAUSES if cause not in ("batch of 2", "batch of 64", "prompt in chunks of 17", "prompt in chunks of 64")
    ]
    tallies = measure(load_bare(files, "float32", "cpu", 8), 64, causes, sequences=8)
    for cause, tally in tallies.items():
        assert (tally.greedy, tally.drawn) == (0, 0), cause
        assert tally.tokens >= 8, cause
        assert tally.largest == 0.0, cause


def test_bf16_flips_nothing_by_native_kernels() -> None:
    files = open_model(str(DEMO_MODEL))
    bare = load_bare(files, "bfloat16", "cpu", 8)
    causes = ["batch of 8", "prompt in chunks of 17", "prefill against decode", "preemption"]
    tallies = measure(bare, 32, causes, sequences=8)
    assert [tally.largest for tally in tallies.values()] == [0.0] * 4
    assert all(tally.tokens > 0 for tally in tallies.values())


def test_bf16_logits_differ_by_torch() -> None:
    files = open_model(str(DEMO_MODEL))
    bare = load_bare(files, "bfloat16", "cpu", 8, kernels="torch")
    tally = measure(bare, 32, ["prefill against decode"], sequences=4)["prefill against decode"]
    assert tally.largest > 1e-3
    assert "prefill against decode | 32" in row("demo", "bfloat16", "prefill against decode", tally)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As on the page. With more, attention over an odd number of query heads per key/value head gives other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def short_cases(count: int, length: int) -> list[Case]:
    """Prompts of 3 tokens and more."""
    return [Case(seq, prompt(3 + 5 * seq), SamplingParams(seed=seq, max_tokens=length)) for seq in range(count)]


@pytest.mark.usefixtures("one_thread")
def test_a_batch_on_ranks_gives_what_each_alone_gives_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "make_cases", lambda files, count, length: short_cases(count, length))
    files = open_model(str(make_model(tmp_path, "llama-biases").path))
    tallies = measure(load_bare(files, "float32", "cpu", 6), 48, divided.CAUSES, sequences=8)
    for cause in divided.CAUSES:
        tally = tallies[cause]
        assert (tally.tokens, tally.greedy, tally.drawn) == (48, 0, 0), cause
        assert tally.largest == 0.0 if "batch" in cause or "stages" in cause else 0.0 < tally.largest < 1e-4, cause


@pytest.mark.usefixtures("one_thread")
def test_ranks_that_a_model_has_no_heads_for_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "make_cases", lambda files, count, length: short_cases(count, length))
    files = open_model(str(make_model(tmp_path, "mistral-no-window").path))  # two heads
    tallies = measure(load_bare(files, "float32", "cpu", 2), 16, divided.CAUSES, sequences=8)
    assert {cause for cause, tally in tallies.items() if tally.tokens} == {cause for cause in divided.CAUSES if "4" not in cause}
    assert row("M", "float32", "4 tensor-parallel ranks", tallies["4 tensor-parallel ranks"]).endswith("| not counted | - |")


@pytest.mark.parametrize(
    ("flips", "tokens", "wanted"), [(0, 10_000, (0, 3.84)), (5, 10_000, (2.14, 11.7)), (50, 100, (4038, 5962))]
)
def test_the_interval_is_wilsons(flips: int, tokens: int, wanted: tuple[float, float]) -> None:
    assert [1e4 * edge for edge in interval(flips, tokens)] == pytest.approx(wanted, rel=5e-3)
    assert rate(0, 0) == "not counted"


def test_only_full_batches_count() -> None:
    files = open_model(str(DEMO_MODEL))
    tallies = measure(load_bare(files, "float32", "cpu", 4), 20, ["batch of 2", "batch of 8"], sequences=5)
    assert {cause: tally.tokens for cause, tally in tallies.items()} == {"batch of 2": 16, "batch of 8": 0}
    assert row("demo", "float32", "batch of 8", tallies["batch of 8"]).endswith("| 0 | not counted | not counted | - |")


def test_the_page_has_the_table_of_the_command() -> None:
    assert "python -m bench.exactness" in BEGIN
    assert "\n".join(HEADER) in PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    measured = read_page()
    assert {part.dtype for part in measured} == {"float32", "bfloat16"}
    assert Part("demo", "float32", divided=True) in measured
    for part, one in measured.items():
        assert "`python -m bench.exactness" in one.source
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in one.rows]
        assert [cells[2] for cells in rows] == list(divided.CAUSES if part.divided else CAUSES)
        for cells in rows:
            assert len(cells) == 7
            assert (int(cells[3]) == 0) == (cells[4] == "not counted")
            exact = "batch" in cells[2] or "stages" in cells[2]
            if part.dtype == "float32" and exact and one.source.startswith("cpu"):
                assert cells[6] == "0.0e+00"


def blank_page(path: Path) -> Path:
    path.write_text(f"before\n\n{BEGIN}\n\n{END}\n\nafter\n", encoding="utf-8")
    return path


def test_only_the_measured_parts_are_replaced(tmp_path: Path) -> None:
    page = blank_page(tmp_path / "page.md")

    def measured(part: Part, flips: int) -> Measured:
        command = f"python -m bench.exactness M --tokens {flips}"
        causes = divided.CAUSES if part.divided else CAUSES
        rows = [row(part.model, part.dtype, cause, Tally(10, flips)) for cause in causes]
        return Measured(source("cpu", command, "a CPU, torch 9"), rows)

    half, full, cut = Part("M", "bfloat16"), Part("M", "float32"), Part("M", "bfloat16", divided=True)
    kept, new, late = measured(full, 2), measured(half, 3), measured(cut, 4)
    write_page({half: measured(half, 1), full: kept}, page)
    write_page({half: new}, page)
    write_page({cut: late}, page)
    assert read_page(page) == {half: new, full: kept, cut: late}
    sources = [f"- M, bfloat16: {new.source}", f"- M, bfloat16, divided: {late.source}", f"- M, float32: {kept.source}"]
    table = ["", *HEADER, *new.rows, *late.rows, *kept.rows, "", "What gave the rows:", "", *sources, ""]
    assert page.read_text(encoding="utf-8") == "\n".join(("before", "", BEGIN, *table, END, "", "after", ""))


def test_a_row_that_nothing_gave_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join((BEGIN, row("M", "float32", "preemption", Tally(10)), END)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md does not say what gave"):
        read_page(page)


def test_the_command_writes_its_rows_and_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "measure", lambda bare, tokens, causes, sequences: {c: Tally(tokens) for c in causes})
    page = blank_page(tmp_path / "page.md")
    words = ["--dtypes", "float32", "--tokens", "7", "--threads", "1", "--device", "cpu", "--machine", "mine", "--write"]
    words += ["--page", str(page)]
    whole, cut = Part("demo", "float32"), Part("demo", "float32", divided=True)
    main([str(DEMO_MODEL), *words])
    assert [(part, one.rows) for part, one in read_page(page).items()] == [
        (whole, [row("demo", "float32", cause, Tally(7)) for cause in CAUSES]),
        (cut, [row("demo", "float32", cause, Tally(7)) for cause in divided.CAUSES]),
    ]
    main([str(DEMO_MODEL), *words, "--parts", "divided"])
    assert {part: one.source for part, one in read_page(page).items()} == {
        whole: f"cpu, `python -m bench.exactness {DEMO_MODEL} {' '.join(words)}`, mine",
        cut: f"cpu, `python -m bench.exactness {DEMO_MODEL} {' '.join(words)} --parts divided`, mine",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sequences", "65"], "at most 64 are kept"),
        (["--write", "--causes", "preemption"], "--write needs all causes"),
        (["--write", "--parts", "divided", "--causes", *CAUSES], "--write needs all causes"),
    ],
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
