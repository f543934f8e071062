"""vLLM, offline, as a peer (see bench.peers for what it is asked). Run by the interpreter of an environment that has vLLM:

python vllm_peer.py ANSWERS_FD MODEL [DTYPE [SLOTS [MAX_MODEL_LEN]]] [--prefix-cache on] [--threads N] [--kv-tokens N]

Set OMP_NUM_THREADS and VLLM_CPU_OMP_THREADS_BIND, and LD_PRELOAD for tcmalloc and libiomp5, before it starts (bench.peers.known
does): vLLM reads them, not --threads.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def fastest_dtype() -> str:
    """On this CPU: without instructions for it, bfloat16 is slower than float32."""
    return "bfloat16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "float32"


def kv_gib(model: str, tokens: int, dtype: str) -> int:
    """Whole GiB that hold the KV of so many tokens."""
    config: dict[str, Any] = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values: int = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim
    return -(-tokens * values * (4 if dtype == "float32" else 2) // 2**30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=int)
    parser.add_argument("model")
    parser.add_argument("dtype", nargs="?", default="auto")
    parser.add_argument("slots", nargs="?", type=int, default=64)
    parser.add_argument("max_model_len", nargs="?", type=int, default=2048)
    parser.add_argument("--prefix-cache", choices=["on", "off"], default="off")
    parser.add_argument("--threads", type=int, help="not used: the environment says")
    parser.add_argument("--kv-tokens", type=int, help="default: 2 GiB")
    asked = parser.parse_args()

    dtype = asked.dtype if asked.dtype != "auto" else fastest_dtype()
    space = kv_gib(asked.model, asked.kv_tokens, dtype) if asked.kv_tokens else 2
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(space))  # GiB; it takes a share of the machine otherwise

    import vllm

    llm = vllm.LLM(
        model=asked.model,
        dtype=dtype,
        max_num_seqs=asked.slots,
        max_model_len=asked.max_model_len,
        enable_prefix_caching=asked.prefix_cache == "on",
        disable_log_stats=True,
    )
    with open(asked.answers, "w", encoding="utf-8") as answers:
        print("ready", json.dumps({"name": f"vLLM {vllm.__version__}", "computes": dtype}), file=answers, flush=True)
        for line in sys.stdin:
            asks = json.loads(line)
            params = [
                vllm.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in asks["output_tokens"]
            ]
            prompts = [{"prompt_token_ids": ids} for ids in asks["prompts"]]
            done = llm.generate(prompts, params, use_tqdm=False)
            print(json.dumps({"outputs": [list(each.outputs[0].token_ids) for each in done]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
