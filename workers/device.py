"""Where and in which precision a worker computes, and how much KV memory it takes."""

import logging
from collections.abc import Collection

import torch

from cluster.config import Config, ConfigError
from cluster.shape import ModelShape
from kv.formats import DEQUANTIZED_BYTES, DTYPES, is_quantized, vector_bytes
from parallel.partition import Partition

_CPU_SHARE, _CPU_MOST = 0.30, 4 << 30
_CUDA_SHARE = 0.90
_SLACK = 1 << 30
"""Bytes left on a GPU beside what is reckoned: what decodes gather, cuBLAS workspaces, kernels loaded late."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """The device that `Config.device` names; ConfigError where it isn't there."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here")
    # Products are summed in fp32: operands not cut to TF32, and no half precision where cuBLAS splits a sum. cuDNN's attention
    # builds a plan for every new shape, and every iteration has one.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", torch.cuda.current_device())


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in Config or config.json."""
    if name not in _DTYPES:
        raise ConfigError(f"dtype '{name}' is not supported; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def resolve_dtype(name: str, checkpoint: str, device: torch.device, on_cpu: Collection[torch.dtype]) -> torch.dtype:
    """The dtype to compute in. "auto" is the checkpoint's own where the device multiplies it well, else the next best one.

    on_cpu: dtypes that are multiplied well where the device is a CPU.
    """
    if name != "auto":
        return torch_dtype(name)
    wanted = torch_dtype(checkpoint)
    best_on_cpu = wanted if wanted in on_cpu else torch.float32
    chosen = best_on_cpu if device.type == "cpu" else _best_cuda_dtype(wanted)
    if chosen != wanted:
        log.info("computing in %s: this %s has no fast %s", str(chosen)[6:], device.type, checkpoint)
    return chosen


def resolve_kv_dtype(name: str, computed: torch.dtype) -> torch.dtype:
    """The dtype of the KV pool (see KVPool) that `Config.kv_dtype` names, where weights are in dtype `computed`."""
    return computed if name == "auto" else DTYPES[name]


def resolve_max_model_len(config: Config, shape: ModelShape) -> int:
    """The longest sequence the model is run with: what was asked for, else all that the model allows."""
    allowed = shape.max_position_embeddings
    if config.max_model_len is None:
        return allowed
    if config.max_model_len > allowed:
        raise ConfigError(f"max_model_len is {config.max_model_len}, but the model has positions for {allowed} tokens")
    return config.max_model_len


def size_pool(
    config: Config,
    shape: ModelShape,
    part: Partition,
    max_model_len: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
    neighbours: int = 0,
    beside: int = 0,
) -> int:
    """Blocks that a rank's KV pool holds, the null block included: what the memory allows, at most what the sequences can ever
    need.

    dtype: of weights. kv_dtype: of the pool. neighbours: how many ranks beside this one share a CPU's memory. beside: bytes per
    token that a draft model's KV takes. Raises ConfigError where the memory doesn't hold the null block and one more.
    """
    bytes_per_block = (part.kv_bytes_per_token(vector_bytes(kv_dtype, shape.head_dim)) + beside) * config.block_size
    budget = config.kv_memory if config.kv_memory is not None else _free_share(device, neighbours)
    if config.kv_memory is None and device.type == "cuda":
        budget = max(0, budget - scratch_bytes(config, shape, max_model_len, dtype, kv_dtype) - _SLACK)
    if budget < 2 * bytes_per_block:
        needed = f"the null block and one more of {config.block_size} tokens take {2 * bytes_per_block}"
        raise ConfigError(f"{budget} bytes of KV memory hold no pool: {needed}")
    blocks_per_sequence = -(-max_model_len // config.block_size)
    return min(budget // bytes_per_block, config.max_num_seqs * blocks_per_sequence + 1)


def scratch_bytes(config: Config, shape: ModelShape, max_model_len: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> int:
    """What an iteration takes beside weights and pool, at most, roughly: activations of one layer, a context gathered for attention
    with its mask, logits and noise."""
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    tokens = config.max_num_batched_tokens
    activations = tokens * (6 * shape.hidden_size + 4 * heads + 4 * shape.intermediate_size) * max(4, dtype.itemsize)
    numbers = 2 * shape.num_kv_heads * shape.head_dim
    context = max_model_len * (numbers + tokens) * dtype.itemsize
    if is_quantized(kv_dtype):
        context += max_model_len * numbers * DEQUANTIZED_BYTES
    drawn = min(tokens, config.max_num_seqs * (1 if config.speculative == "off" else 1 + config.speculative_tokens))
    logits = 6 * drawn * shape.vocab_size * 4
    return activations + context + logits


def _best_cuda_dtype(wanted: torch.dtype) -> torch.dtype:
    if wanted == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return wanted


def _free_share(device: torch.device, neighbours: int) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left in torch's cache counts as free
        return int(_CUDA_SHARE * torch.cuda.mem_get_info(device)[0])
    return min(_CPU_MOST, int(_CPU_SHARE * _available_memory())) // (1 + neighbours)


def _available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ConfigError("the free memory cannot be read from /proc/meminfo; set kv_memory")
