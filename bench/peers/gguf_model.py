"""A Hugging Face directory (Llama or Qwen3) as a GGUF file for llama.cpp. Run by an interpreter that has numpy and gguf:

python gguf_model.py MODEL_DIR FILE.gguf [bf16|f16|f32]

Safetensors are read by hand, since numpy has no bfloat16; torch is not needed.
"""

import argparse
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURES = ("llama", "qwen3")
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


class ConversionError(ValueError):
    """A model that this can't convert, said in one line."""


def tensor_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor. Raises ConversionError."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"]:
        part, _, kind = parts[3].rpartition(".")
        if part in _LAYER and kind in ("weight", "bias"):
            return f"blk.{parts[2]}.{_LAYER[part]}.{kind}"
    raise ConversionError(f"tensor {name} has no name in GGUF")


def architecture(config: Mapping[str, Any]) -> str:
    """GGUF's, of a config.json. Raises ConversionError."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConversionError(f"model type {kind} is not one of {', '.join(ARCHITECTURES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConversionError("scaled rotary embeddings are not converted")
    return str(kind)


def metadata(config: Mapping[str, Any]) -> dict[str, int | float]:
    """What llama.cpp needs to know of a model's shape: GGUF keys without the architecture in front."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "vocab_size": config["vocab_size"],
    }


def interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """[heads x head_dim, ...] rows as llama.cpp's Llama wants queries and keys: its rotary embedding pairs neighbours, Hugging
    Face's pairs halves. Qwen3 has halves in both."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def converted(name: str, weight: NDArray[Any], config: Mapping[str, Any]) -> tuple[str, NDArray[Any]]:
    """Name and values in GGUF. Raises ConversionError."""
    if architecture(config) == "llama" and ("q_proj" in name or "k_proj" in name):
        shape = metadata(config)
        heads = int(shape["attention.head_count" if "q_proj" in name else "attention.head_count_kv"])
        weight = interleaved(weight, heads)
    return tensor_name(name), weight


def tensors(directory: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """All tensors of a directory's safetensors, as fp32."""
    for path in sorted(directory.glob("*.safetensors")):
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        (length,) = struct.unpack("<Q", raw[:8].tobytes())
        for name, about in json.loads(raw[8 : 8 + length].tobytes()).items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                data = raw[8 + length + start : 8 + length + end]
                yield name, _float32(data, about["dtype"], name).reshape(about["shape"])


def _float32(data: NDArray[Any], dtype: str, name: str) -> NDArray[Any]:
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("F16", "F32"):
        raise ConversionError(f"tensor {name} is {dtype}, not BF16, F16 or F32")
    return data.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _add_tokenizer(writer: Any, directory: Path, vocab_size: int) -> None:
    """Token ids go in and come out, so that only their number must be right; texts and merges are handed on where they are."""
    found = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    model = found["model"]
    if model.get("type") != "BPE":
        raise ConversionError(f"tokenizer of type {model.get('type')}, not BPE")
    texts = {number: text for text, number in model["vocab"].items()}
    added = {each["id"]: each["content"] for each in found.get("added_tokens", ())}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([added.get(i) or texts.get(i) or f"<unused{i}>" for i in range(vocab_size)])
    writer.add_token_types([3 if i in added else 1 if i in texts else 5 for i in range(vocab_size)])  # control, normal, unused
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])


def convert(directory: Path, target: Path, dtype: str) -> None:
    """Write `target`. Raises ConversionError."""
    import gguf  # type: ignore[import-not-found, unused-ignore]

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    writer = gguf.GGUFWriter(target, architecture(config))
    for key, value in metadata(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture(config)}.{key}", value)
    _add_tokenizer(writer, directory, config["vocab_size"])
    for name, weight in tensors(directory):
        new, values = converted(name, weight, config)
        if values.ndim == 1:  # norms and biases stay fp32
            writer.add_tensor(new, np.ascontiguousarray(values))
        else:
            writer.add_tensor(new, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("dtype", nargs="?", default="bf16", choices=["bf16", "f16", "f32"])
    asked = parser.parse_args()
    try:
        convert(asked.model, asked.file, asked.dtype)
    except (ConversionError, KeyError, OSError) as error:
        parser.exit(1, f"{error if not isinstance(error, KeyError) else f'config.json has no {error}'}\n")


if __name__ == "__main__":
    main()
