"""What runs on a CUDA device against the same on a CPU, and against transformers. Skipped where there is none.

python -m pytest tests/gpu
"""

from pathlib import Path

import pytest
import torch

from bench.exactness import Case, Run
from cluster.config import Config
from cluster.model import open_model
from kv.pool import HostBlocks, KVPool
from parallel.partition import partition
from parallel.vocabulary import WideLinear
from tests.workers.driver import LENGTHS, MIXED, Driver, generate, greedy
from tests.workers.models import KINDS, VOCAB, TinyModel, make_model, prompt
from tests.workers.spans import make_span
from workers.attention import PagedSpans, make_attention
from workers.device import scratch_bytes, size_pool
from workers.keys import position_keys, sequence_key
from workers.noise import GumbelNoise
from workers.picker import TorchPicker
from workers.sampler import Sampler
from workers.sequences import Span

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    """One model of each kind; transformers' stays on the CPU."""
    root: Path = tmp_path_factory.mktemp("models")
    return {kind: make_model(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("attention", ["torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_logprobs_are_those_of_transformers(models: dict[str, TinyModel], kind: str, attention: str) -> None:
    model = models[kind]
    runner = model.runner(device="cuda", kernels=attention)
    for length in (1, 7, 40):
        ids = prompt(length)
        assert generate(runner, ids, 48, greedy(), chunk=16) == model.oracle_greedy(ids, 48)
    runner.reset()
    driver = Driver(runner)
    driver.add(0, prompt(90), greedy(logprobs=VOCAB))
    driver.run([0], 8, chunk=31)
    sequence = driver.sequences[0]
    wanted = model.oracle_logits(sequence.prompt + sequence.output)[len(sequence.prompt) - 1 : -1].log_softmax(-1)
    for row, reported in zip(wanted, sequence.logprobs, strict=True):
        ours = torch.empty(VOCAB)
        ours[reported.top_ids] = torch.tensor(reported.top_logprobs)
        torch.testing.assert_close(ours, row, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "llama3-rope-tied", "mistral", "qwen3"])
def test_a_token_does_not_depend_on_its_batch_nor_on_chunks_nor_on_preemption(models: dict[str, TinyModel], kind: str) -> None:
    runner = models[kind].runner(device="cuda")
    alone = [generate(runner, prompt(n), 16, MIXED[i]) for i, n in enumerate(LENGTHS)]
    everyone = list(range(len(LENGTHS)))
    for chunk in (1 << 30, 5):
        runner.reset()
        driver = Driver(runner)
        for seq, length in enumerate(LENGTHS):
            driver.add(seq, prompt(length), MIXED[seq])
        driver.run(everyone, 7, chunk)
        for seq in (1, 4, 6):
            driver.preempt(seq)
        driver.run(everyone, 16, chunk)
        assert [driver.sequences[seq].output for seq in everyone] == alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near(models: dict[str, TinyModel], kind: str, dtype: str) -> None:
    model = models[kind]
    found: dict[tuple[int, int], torch.Tensor] = {}

    def keep(case: Case, index: int, likeliest: int, token: int, logits: torch.Tensor) -> None:
        found[case.seq, index] = logits

    cases = [Case(seq, prompt(length), greedy()) for seq, length in enumerate((50, 20))]
    run = Run(model.runner(device="cuda", dtype=dtype), cases, keep)
    for case in cases:
        run.add(case)
    run.step({0: 16, 1: 3})
    run.step({0: 34, 1: 17})
    for case in cases:
        ours, wanted = found[case.seq, 0], model.oracle_logits(case.prompt)[-1]
        assert ours.dtype == torch.float32
        assert float((ours.softmax(-1) - wanted.softmax(-1)).abs().sum()) / 2 < 0.2


@pytest.mark.parametrize("vocab", [173, 4097, 152_064])
def test_noise_has_the_bits_it_has_on_a_cpu(vocab: int) -> None:
    keys = torch.from_numpy(position_keys([sequence_key(9, c) for c in range(6)], list(range(6))))
    here, there = GumbelNoise(vocab, CPU), GumbelNoise(vocab, GPU)
    assert torch.equal(here._hash_all(keys), there._hash_all(keys.to(GPU)).cpu())
    torch.testing.assert_close(there.whole(keys.to(GPU)).cpu(), here.whole(keys), atol=4e-6, rtol=4e-6)
    assert torch.equal(there.whole(keys[2:3].to(GPU)), there.whole(keys.to(GPU))[2:3])


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [173, 32_000])
def test_draws_are_those_of_a_cpu(vocab: int, spread: float) -> None:
    spans = [
        make_span(0, 5 + row, [], MIXED[row % len(MIXED)], [(row * i) % 173 for i in range(5 + row)], choice=row % 3)
        for row in range(70)
    ]
    logits = torch.randn(70, vocab, generator=torch.Generator().manual_seed(1)) * spread
    here = Sampler(TorchPicker(vocab, CPU)).draw(logits.clone(), spans)
    there = Sampler(TorchPicker(vocab, GPU)).draw(logits.to(GPU, copy=True), spans)
    assert [draw.token for draw in there] == [draw.token for draw in here]
    sampler, rows = Sampler(TorchPicker(vocab, GPU)), logits.to(GPU, copy=True)
    one = [sampler.draw(rows[row : row + 1], spans[row : row + 1])[0].token for row in range(14)]
    assert one == [draw.token for draw in here[:14]]


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 8), (6, 2, 16), (5, 1, 10), (32, 8, 128)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_attention_is_the_reference(
    name: str, window: int | None, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, near: float
) -> None:
    sizes = [(0, 30), (20, 21), (9, 30), (0, 1), (55, 56), (300, 301), (7, 8), (0, 17)]
    spans: list[Span] = []
    first = 1
    for start, end in sizes:
        spans.append(make_span(start, end, list(range(first, first + end // 4 + 2))))
        first += end // 4 + 2
    paged = PagedSpans.of(spans, 4)
    rows = int(paged.first_row[-1])
    torch.manual_seed(1)
    pools = [KVPool(2, first, 4, kv_heads, dim, kind, device) for kind, device in ((torch.float32, CPU), (dtype, GPU))]
    context = torch.randn(2, *pools[0].keys.shape).to(dtype)
    queries, keys, values = (torch.randn(rows, n, dim).to(dtype) for n in (heads, kv_heads, kv_heads))
    outputs = []
    for pool, backend in zip(pools, ("reference", name), strict=True):
        pool.keys.copy_(context[0])
        pool.values.copy_(context[1])
        own = [x.to(pool.keys.device, pool.keys.dtype) for x in (queries, keys, values)]
        pool.write(1, torch.from_numpy(paged.slots(paged.positions())).to(pool.keys.device), *own[1:])
        outputs.append(make_attention(backend, pool, [None, window], pool.dtype).prepare(paged).attend(1, *own))
    torch.testing.assert_close(outputs[1].float().cpu(), outputs[0], atol=near, rtol=near)


def test_blocks_are_copied_in_order() -> None:
    pool = KVPool(2, 5, 4, 2, 8, torch.bfloat16, GPU)
    pool.keys.normal_()
    pool.values.normal_()
    keys, values = pool.keys.clone(), pool.values.clone()
    pool.copy_blocks([(1, 2), (2, 3)])
    for after, before in ((pool.keys, keys), (pool.values, values)):
        assert torch.equal(after[:, 2], before[:, 1])
        assert torch.equal(after[:, 3], before[:, 1])
        assert torch.equal(after[:, 4], before[:, 4])


def test_logits_of_half_precision_are_not_rounded() -> None:
    torch.manual_seed(2)
    weight, hidden = torch.randn(1000, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    logits = WideLinear(weight.to(GPU))(hidden.to(GPU))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.cpu(), hidden.float() @ weight.float().T, atol=1e-4, rtol=1e-4)


def test_the_pool_leaves_room(models: dict[str, TinyModel]) -> None:
    shape = open_model(str(models["llama"].path)).shape
    config = Config(model="m", max_num_seqs=1 << 20, max_num_batched_tokens=1 << 20)
    torch.cuda.empty_cache()  # as size_pool does before it looks
    free = torch.cuda.mem_get_info()[0]
    part = partition(shape)
    blocks = size_pool(Config(model="m"), shape, part, 256, torch.float32, torch.float32, GPU)
    assert blocks == 64 * 16 + 1
    blocks = size_pool(config, shape, part, 256, torch.float32, torch.float32, GPU)
    taken = blocks * part.kv_bytes_per_token(4 * shape.head_dim) * config.block_size
    room = scratch_bytes(config, shape, 256, torch.float32, torch.float32) + (1 << 30)
    assert taken > 0
    assert 0.89 * free < taken + room <= 0.9 * free


def test_blocks_go_to_pinned_memory_and_come_back_in_the_order_of_the_calls() -> None:
    pool = KVPool(3, 200, 4, 2, 5, torch.float16, GPU)
    pool.keys.normal_()
    pool.values.normal_()
    keys, values = pool.keys.clone(), pool.values.clone()
    host = HostBlocks(pool, 150)
    assert host.slots.is_pinned()
    host.store(range(1, 151), range(150))
    host.load(range(0, 150, 2), range(199, 124, -1))
    host.store(range(125, 200), range(75))
    host.load(range(75), range(1, 76))
    torch.cuda.synchronize()
    for place, source in ((199, 1), (198, 3), (125, 149), (1, 149), (75, 1), (76, 76)):
        assert torch.equal(pool.keys[:, place], keys[:, source])
        assert torch.equal(pool.values[:, place], values[:, source])
