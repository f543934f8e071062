"""Checkpoints: what is accepted, what is refused and how it is said; dtype, device and pool size."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.config import Config, ConfigError
from cluster.model import open_model
from parallel.partition import partition
from tests.workers.driver import generate, greedy
from tests.workers.models import MAX_LEN, TinyModel, make_model, prompt
from workers.device import resolve_device, resolve_dtype, resolve_kv_dtype, resolve_max_model_len, size_pool
from workers.kernels import TorchKernels
from workers.loader import load_decoder
from workers.runner import load_runner

CPU = torch.device("cpu")


def edited(model: TinyModel, target: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of the model with tensors replaced, added or (None) removed; dots in names are written as two underscores."""
    shutil.copytree(model.path, target)
    tensors = load_file(target / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, target / "model.safetensors")
    return target


def load(path: Path) -> None:
    load_runner(open_model(str(path)), Config(model=str(path), device="cpu"), num_blocks=4)


def test_a_pool_larger_than_the_memory_is_a_config_error(tiny_models: dict[str, TinyModel]) -> None:
    path = tiny_models["llama"].path
    with pytest.raises(ConfigError, match=r"the cpu has no \d{19} bytes for the KV pool; set kv_memory to less"):
        load_runner(open_model(str(path)), Config(model=str(path), device="cpu"), num_blocks=10**15)


def test_host_memory_is_so_many_blocks(tiny_models: dict[str, TinyModel]) -> None:
    path = tiny_models["llama"].path
    block = 2 * 3 * 2 * 12 * 4 * 16  # K and V, layers, heads, head_dim, fp32, tokens

    def blocks(host_kv_memory: int) -> int:
        config = Config(model=str(path), device="cpu", dtype="float32", host_kv_memory=host_kv_memory)
        return load_runner(open_model(str(path)), config, num_blocks=4).host_blocks

    assert [blocks(memory) for memory in (0, block, 10 * block - 1)] == [0, 1, 9]
    with pytest.raises(ConfigError, match="hold no block"):
        blocks(block - 1)
    with pytest.raises(ConfigError, match=r"the host has no \d{19} bytes for KV; set host_kv_memory to less"):
        blocks(10**18)


def test_a_sharded_checkpoint_is_the_whole_one(tmp_path: Path) -> None:
    whole = make_model(tmp_path / "whole", "qwen3")
    sharded = make_model(tmp_path / "sharded", "qwen3", max_shard_size="60KB")
    assert len(list(sharded.path.glob("*.safetensors"))) > 2
    assert generate(sharded.runner(), prompt(20), 16, greedy()) == generate(whole.runner(), prompt(20), 16, greedy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__norm__weight": None}, "lacks the tensor model.norm.weight"),
        ({"model__layers__1__self_attn__k_proj__weight": None}, "lacks the tensor model.layers.1.self_attn.k_proj.weight"),
        ({"model__layers__0__mlp__up_proj__weight": torch.zeros(72, 47)}, r"up_proj.weight has shape \[72, 47\].*\[72, 48\]"),
        (
            {"model__layers__0__mlp__up_proj__weight": torch.zeros(72, 48, dtype=torch.int8)},
            "is int8, of which config.json says",
        ),
        ({"model__layers__0__self_attn__q_proj__bias": torch.zeros(48)}, "doesn't speak of: model.layers.0.self_attn.q_proj.bias"),
        ({"model__layers__3__input_layernorm__weight": torch.zeros(48)}, "doesn't speak of: model.layers.3"),
        ({"lm_head__weight": None}, "lacks the tensor lm_head.weight"),
    ],
)
def test_odd_tensors_are_named(
    tiny_models: dict[str, TinyModel], tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load(edited(tiny_models["llama"], tmp_path / "odd", **change))
    assert "\n" not in str(raised.value)


def test_what_is_harmless_is_ignored(tiny_models: dict[str, TinyModel], tmp_path: Path) -> None:
    model = tiny_models["llama3-rope-tied"]
    load(
        edited(
            model,
            tmp_path / "old",
            lm_head__weight=torch.zeros(173, 40),
            model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4),
        )
    )


def test_broken_files_are_refused(tiny_models: dict[str, TinyModel], tmp_path: Path) -> None:
    path = tmp_path / "broken"
    shutil.copytree(tiny_models["llama"].path, path)
    (path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors cannot be read"):
        load(path)
    (path / "model.safetensors").rename(path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load(path)
    (path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match="no index of shards"):
        load(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ConfigError, match=r"gone\.safetensors"):
        load(path)


def test_a_bar_is_shown_only_when_asked_for(tiny_models: dict[str, TinyModel], capsys: pytest.CaptureFixture[str]) -> None:
    files = open_model(str(tiny_models["llama"].path))
    load_decoder(files, partition(files.shape), torch.float32, CPU, MAX_LEN, kernels=TorchKernels())
    assert capsys.readouterr().err == ""
    load_decoder(files, partition(files.shape), torch.float32, CPU, MAX_LEN, kernels=TorchKernels(), progress=True)
    assert "loading weights" in capsys.readouterr().err


def test_auto_dtype_is_one_the_cpu_is_fast_in(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    wide, both = (torch.float32,), (torch.float32, torch.bfloat16)
    assert resolve_dtype("auto", "bfloat16", CPU, wide) == torch.float32
    assert caplog.messages == ["computing in float32: this cpu has no fast bfloat16"]
    assert resolve_dtype("bfloat16", "bfloat16", CPU, wide) == torch.bfloat16
    assert resolve_dtype("auto", "bfloat16", CPU, both) == torch.bfloat16
    assert resolve_dtype("auto", "float32", CPU, both) == torch.float32
    assert resolve_dtype("auto", "float16", CPU, both) == torch.float32
    assert resolve_dtype("float16", "bfloat16", CPU, both) == torch.float16
    with pytest.raises(ConfigError, match="float8"):
        resolve_dtype("auto", "float8", CPU, both)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none_is_refused() -> None:
    assert resolve_device("auto") == CPU
    with pytest.raises(ConfigError, match="no CUDA"):
        resolve_device("cuda")


def test_max_model_len_is_the_models_unless_shortened(tiny_models: dict[str, TinyModel]) -> None:
    shape = open_model(str(tiny_models["llama"].path)).shape
    assert resolve_max_model_len(Config(model="m"), shape) == MAX_LEN
    assert resolve_max_model_len(Config(model="m", max_model_len=10), shape) == 10
    with pytest.raises(ConfigError, match=r"257.*256"):
        resolve_max_model_len(Config(model="m", max_model_len=257), shape)


def test_the_pool_takes_what_it_may_and_no_more_than_it_needs(
    tiny_models: dict[str, TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = open_model(str(tiny_models["llama"].path)).shape
    block = 2 * 3 * 2 * 12 * 4 * 16  # K and V, layers, heads, head_dim, fp32, tokens

    def blocks(**settings: int) -> int:
        config = Config(model="m", **settings)  # type: ignore[arg-type]
        return size_pool(config, shape, partition(shape), MAX_LEN, torch.float32, torch.float32, CPU)

    assert blocks(kv_memory=10 * block) == 10
    assert blocks(kv_memory=11 * block - 1) == 10
    assert blocks(kv_memory=2 * block) == 2
    assert blocks(kv_memory=10 * block, block_size=32) == 5
    assert blocks(kv_memory=1 << 40) == blocks() == 64 * (MAX_LEN // 16) + 1
    assert blocks(kv_memory=1 << 40, max_num_seqs=3, block_size=100, max_num_batched_tokens=8) == 3 * 3 + 1
    with pytest.raises(ConfigError, match="hold no pool"):
        blocks(kv_memory=2 * block - 1)
    monkeypatch.setattr("workers.device._available_memory", lambda: 100 * block)
    assert blocks() == 30


def test_the_runner_sizes_its_own_pool(tiny_models: dict[str, TinyModel]) -> None:
    path = str(tiny_models["llama"].path)
    runner = load_runner(open_model(path), Config(model=path, device="cpu", max_num_seqs=2, max_model_len=100))
    assert (runner.num_blocks, runner.max_model_len) == (2 * 7 + 1, 100)
    with pytest.raises(ConfigError, match="num_blocks is 1"):
        load_runner(open_model(path), Config(model=path, device="cpu"), num_blocks=1)


@pytest.mark.parametrize(("head_dim", "times"), [(128, 1.8), (32, 1.7)])
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantized_keys_and_values_of_nearly_twice_the_sequences_fit(
    tiny_models: dict[str, TinyModel], kv_dtype: str, head_dim: int, times: float
) -> None:
    shape = dataclasses.replace(open_model(str(tiny_models["llama"].path)).shape, head_dim=head_dim)
    config = Config(model="m", kv_memory=64 << 20, max_num_seqs=10**6, max_num_batched_tokens=10**6)

    def sequences(kept: str) -> float:
        """Of 200 tokens, without the null block."""
        dtype = resolve_kv_dtype(kept, torch.bfloat16)
        return (size_pool(config, shape, partition(shape), MAX_LEN, torch.bfloat16, dtype, CPU) - 1) / -(-200 // 16)

    assert sequences("auto") == sequences("bfloat16") == sequences("float16") > 100
    assert times * sequences("bfloat16") <= sequences(kv_dtype) < 2 * sequences("bfloat16")
    assert sequences("float32") == pytest.approx(sequences("bfloat16") / 2, rel=0.01)


def test_a_pool_takes_the_memory_it_was_given(tiny_models: dict[str, TinyModel]) -> None:
    path = str(tiny_models["llama"].path)
    for kv_dtype in ("auto", "int8", "fp8"):
        runner = load_runner(open_model(path), Config(path, device="cpu", kv_memory=100_000, kv_dtype=kv_dtype))
        pool = runner.pool
        assert 100_000 - pool.bytes_per_block < pool.keys.nbytes + pool.values.nbytes <= 100_000
        assert pool.dtype == resolve_kv_dtype(kv_dtype, runner.decoder.dtype)
        assert str(pool.dtype) in runner.layout, "a pull from a pool of another kind is refused"
