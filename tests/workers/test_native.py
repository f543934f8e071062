"""The native kernels: linears against float64, rows against themselves, instruction sets, sanitizers, and what happens without."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import Config, ConfigError
from cluster.protocol import NewSequence
from kv.formats import DTYPES
from kv.pool import KVPool
from tests.workers.builds import built_for
from tests.workers.driver import LENGTHS, MIXED, generate
from tests.workers.models import TinyModel, prompt
from tests.workers.spans import make_span
from workers.attention import PagedSpans
from workers.attention.reference import ReferenceAttention
from workers.draws import DrawSetup
from workers.kernels import TorchKernels, choose_kernels
from workers.native import build as building
from workers.native import library as natives
from workers.native.kernels import NativeAttention, NativeKernels
from workers.native.library import Library, PackedLinear, Threads

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (17, 5), (64, 48), (33, 257), (1024, 100), (513, 130)])
def test_a_packed_linear_is_the_product_whatever_the_number_of_rows(
    library: Library, dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    torch.manual_seed(0)
    threads = Threads(library, 2)
    weight, bias, x = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs), torch.randn(131, inputs)
    linear = PackedLinear(weight, bias, threads)
    whole = linear(x)
    exact = x.to(dtype).double() @ weight.double().T + bias.double()
    torch.testing.assert_close(whole.double(), exact, atol=2e-6 * inputs**0.5 + 1e-6, rtol=1e-5)
    for rows in (*range(1, 21), 64, 130):
        assert torch.equal(linear(x[:rows]), whole[:rows])
        assert torch.equal(linear(x[-rows:]), whole[-rows:])
    alone = PackedLinear(weight, bias, Threads(library, 1))
    assert torch.equal(alone(x), whole)


def test_avx2_multiplies_bf16_in_the_order_of_avx512() -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(100, 75, dtype=torch.bfloat16), torch.randn(11, 75)
    one, other = (PackedLinear(weight, None, Threads(built_for(name), 1))(x) for name in ("avx2", "avx512-bf16"))
    assert torch.equal(one, other)


def test_a_row_of_bad_numbers_spoils_no_other(library: Library) -> None:
    threads = Threads(library, 2)
    weight, x = torch.randn(70, 40, dtype=torch.bfloat16), torch.randn(9, 40)
    linear = PackedLinear(weight, None, threads)
    good = linear(x)
    x[4] = torch.nan
    spoilt = linear(x)
    assert spoilt[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(spoilt[others], good[others])


def lay_out(sizes: list[tuple[int, int]], block: int) -> tuple[PagedSpans, int]:
    """Spans of (tokens before, tokens) on shuffled blocks; and the number of blocks in the pool."""
    counts = [-(-(start + n) // block) for start, n in sizes]
    ids = (np.random.default_rng(0).permutation(sum(counts)) + 1).tolist()
    spans = [
        make_span(start, start + n, [ids.pop() for _ in range(count)]) for (start, n), count in zip(sizes, counts, strict=True)
    ]
    return PagedSpans.of(spans, block), sum(counts) + 1


def filled(pool: KVPool) -> KVPool:
    """With a key and a value in every slot of every layer, and nothing that anybody may look at in the null block."""
    slots = torch.arange(pool.num_blocks * pool.block_size)
    shape = (len(slots), pool.num_kv_heads, pool.head_dim)
    for layer in range(pool.num_layers):
        pool.write(layer, slots, torch.randn(shape), torch.randn(shape) + 0.5)
    pool.keys[:, 0] = pool.values[:, 0] = 0xFF if pool.quantized else torch.nan  # no number in either
    return pool


FORMS = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@FORMS
@given(
    st.lists(st.tuples(st.integers(0, 100), st.sampled_from([1, 1, 1, 2, 5, 17, 40])), min_size=1, max_size=12),
    st.sampled_from([(4, 4, 8), (6, 2, 16), (5, 1, 10), (16, 8, 64), (3, 3, 34), (40, 1, 12)]),
    st.sampled_from([None, 1, 3, 31, 32, 33, 50, 100]),
    st.sampled_from([4, 7, 16]),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_attention_is_the_reference(
    library: Library, dtype: torch.dtype, sizes: list[tuple[int, int]], model: tuple[int, int, int], window: int | None, block: int
) -> None:
    torch.manual_seed(1)
    heads, kv_heads, dim = model
    paged, num_blocks = lay_out(sizes, block)
    pool = filled(KVPool(2, num_blocks, block, kv_heads, dim, dtype, CPU))
    queries = torch.randn(int(paged.first_row[-1]), heads, dim)
    nothing = torch.empty(0)
    expected = ReferenceAttention(pool, [None, window]).prepare(paged).attend(1, queries, nothing, nothing)
    actual = NativeAttention(pool, [None, window], Threads(library, 2)).prepare(paged).attend(1, queries, nothing, nothing)
    torch.testing.assert_close(actual, expected, atol=1e-5 if pool.quantized else 3e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 40])
@FORMS
def test_a_query_has_the_same_bits_in_every_batch_and_chunk(library: Library, dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(2)
    threads = Threads(library, 2)
    length = 150
    pool = filled(KVPool(1, 40, 16, 2, 24, dtype, CPU))
    table = (np.random.default_rng(3).permutation(39) + 1).tolist()[:10]
    queries = torch.randn(length, 6, 24)
    nothing = torch.empty(0)

    def run(pieces: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Each piece [first, end) of the sequence as a span of one batch."""
        paged = PagedSpans.of([make_span(first, end, table) for first, end in pieces], 16)
        rows = torch.cat([queries[first:end] for first, end in pieces])
        attended = NativeAttention(pool, [window], threads).prepare(paged).attend(0, rows, nothing, nothing)
        return list(torch.split(attended, [end - first for first, end in pieces]))

    (whole,) = run([(0, length)])
    for first, end in [(0, 1), (31, 33), (64, 100), (149, 150), (7, 8), (90, 97)]:
        assert torch.equal(run([(first, end)])[0], whole[first:end])
    pieces = [(p, p + 1) for p in range(0, length, 7)] + [(3, 44), (128, 150)]
    for (first, end), attended in zip(pieces, run(pieces), strict=True):
        assert torch.equal(attended, whole[first:end])


@pytest.mark.parametrize(
    ("kind", "kv_dtype"),
    [
        *((kind, "auto") for kind in ("llama-biases", "qwen3", "qwen3-window")),
        *(("qwen3", "int8"), ("qwen3-window", "fp8"), ("qwen3", "float16")),
    ],
)
def test_bf16_is_the_same_alone_batched_and_in_chunks(tiny_models: dict[str, TinyModel], kind: str, kv_dtype: str) -> None:
    runner = tiny_models[kind].runner(kernels="native", dtype="bfloat16", kv_dtype=kv_dtype)
    for length, params in zip(LENGTHS, MIXED, strict=True):
        ids = prompt(length, seed=length)
        alone = generate(runner, ids, 20, params)
        assert generate(runner, ids, 20, params, chunk=5) == alone
        if not DrawSetup.of(
            NewSequence(choice=0, prompt=ids, emitted=[], params=params)
        ).penalized:  # penalties know an answer from a prompt
            assert generate(runner, ids + alone[:12], 8, params) == alone[12:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "int8", "fp8"])
def test_keys_and_values_are_kept_as_the_formulas_say(
    library: Library, tiny_models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch, kv_dtype: str, dtype: str
) -> None:
    """To the bit, in the first layer, whose keys and values do not depend on what any layer keeps."""
    monkeypatch.setattr(natives, "library", lambda: library)
    ids = prompt(60)
    wide, narrow = (tiny_models["qwen3"].runner(kernels="native", dtype=dtype, kv_dtype=kept) for kept in ("float32", kv_dtype))
    again = KVPool(1, wide.num_blocks, 8, 1, 18, DTYPES[kv_dtype], CPU)
    for runner in (wide, narrow):
        generate(runner, ids, 1, MIXED[0])
    again.write(0, torch.arange(wide.num_blocks * 8), wide.pool.keys[0].flatten(0, 1), wide.pool.values[0].flatten(0, 1))
    assert torch.equal(narrow.pool.keys[0], again.keys[0])
    assert torch.equal(narrow.pool.values[0], again.values[0])
    assert narrow.pool.keys[0].any()


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    folder = Path(natives.__file__).parent
    program = tmp_path / "stress"
    flags = [flag for flag in building.FLAGS if flag not in ("-shared", "-fPIC", "-O2")]
    command = ["c++", *flags, "-O1", "-g", *building.OWN_CPU, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{folder}"]
    subprocess.run([*command, str(Path(__file__).parent / "native_stress.cpp"), "-o", str(program)], check=True, timeout=200)
    done = subprocess.run(
        [program, "20" if sanitizer == "thread" else "60"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == Library().instructions


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without one."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    natives._built.cache_clear()
    yield
    natives._built.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_torch_computes_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert isinstance(choose_kernels(Config("m"), CPU), TorchKernels)
    assert caplog.messages == ["native kernels are not used: no C++ compiler: no-such-compiler is not there"]
    with pytest.raises(ConfigError, match="--kernels torch"):
        choose_kernels(Config("m", kernels="native"), CPU)


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(building.BuildError, match="no-such-flag"):
        building.build(("-fno-such-flag",))
    assert list((tmp_path / "rayline").iterdir()) == []


def test_kernels_are_chosen_by_name_device_and_dtype() -> None:
    assert isinstance(choose_kernels(Config("m"), CPU), NativeKernels)
    assert isinstance(choose_kernels(Config("m", kernels="torch"), CPU), TorchKernels)
    assert isinstance(choose_kernels(Config("m", dtype="float16"), CPU), TorchKernels)
    assert isinstance(choose_kernels(Config("m"), torch.device("cuda")), TorchKernels)
    with pytest.raises(ConfigError, match="float16 on cpu"):
        choose_kernels(Config("m", kernels="native", dtype="float16"), CPU)


def test_a_library_that_was_cut_off_is_built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(building, "SOURCE", tmp_path / "tiny.cpp")
    building.SOURCE.write_text("int nothing;")
    whole = building.build()
    whole.write_bytes(whole.read_bytes()[:-1])
    anew = building.build()
    assert anew.stat().st_size == int(anew.stem.rsplit("-", 1)[1])
    assert list(anew.parent.iterdir()) == [anew]


def test_a_cache_that_others_can_write_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "rayline").mkdir()
    (tmp_path / "rayline").chmod(0o777)
    assert building._cache().parent != tmp_path


@FORMS
def test_attention_over_a_bad_number_is_a_bad_number(library: Library, dtype: torch.dtype) -> None:
    paged, num_blocks = lay_out([(40, 1), (9, 3)], 16)
    pool = filled(KVPool(1, num_blocks, 16, 1, 16, dtype, CPU))
    where = torch.tensor([int(paged.tables[0]) * 16 + 3])
    pool.write(0, where, torch.full((1, 1, 16), torch.nan), torch.ones(1, 1, 16))
    queries, nothing = torch.randn(4, 2, 16), torch.empty(0)
    attended = NativeAttention(pool, [None], Threads(library, 2)).prepare(paged).attend(0, queries, nothing, nothing)
    assert attended[0].isnan().all()
    assert attended[1:].isfinite().all()
