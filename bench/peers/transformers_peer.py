"""transformers' continuous batching as a peer (see bench.peers for what it is asked). Run by an interpreter that has transformers:

python transformers_peer.py ANSWERS_FD MODEL [DTYPE [SLOTS [MAX_MODEL_LEN]]] [--prefix-cache on] [--threads N] [--kv-tokens N]
"""

import argparse
import json
import os
import sys
from pathlib import Path

PAGE = 32
STEP_TOKENS = 512
MOST_SLOTS = 16
"""Its SDPA attention multiplies each query of an iteration with the keys of all its sequences, and masks those of others: with more
sequences at a time it takes longer, and with 8 too."""


def main() -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=int)
    parser.add_argument("model")
    parser.add_argument("dtype", nargs="?", default="auto")
    parser.add_argument("slots", nargs="?", type=int, default=64)
    parser.add_argument("max_model_len", nargs="?", type=int, default=2048)
    parser.add_argument("--prefix-cache", choices=["on", "off"], default="off")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kv-tokens", type=int)
    asked = parser.parse_args()

    torch.set_num_threads(asked.threads)
    # Without instructions for it, bfloat16 is several times slower than float32.
    fast_bf16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    dtype = asked.dtype if asked.dtype != "auto" else "bfloat16" if fast_bf16 else "float32"
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    tokens, slots = asked.kv_tokens or asked.slots * asked.max_model_len, min(asked.slots, MOST_SLOTS)
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=tokens // PAGE + slots + 1,
        max_batch_tokens=STEP_TOKENS,
        max_requests_per_batch=slots,
        allow_block_sharing=asked.prefix_cache == "on",
    )
    defaults = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=asked.max_model_len)
    manager = model.init_continuous_batching(generation_config=defaults, continuous_batching_config=config)
    manager.start()
    with open(asked.answers, "w", encoding="utf-8") as answers:
        about = {"name": f"transformers {transformers.__version__} continuous batching", "computes": f"{dtype}, {slots} slots"}
        print("ready", json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            asks = json.loads(line)
            requests = zip(asks["prompts"], asks["output_tokens"], strict=True)
            numbers = {manager.add_request(ids, max_new_tokens=n, eos_token_id=-1): i for i, (ids, n) in enumerate(requests)}
            outputs: list[list[int]] = [[] for _ in numbers]
            while numbers:
                output = manager.get_result(timeout=1)
                if output is None:
                    if not manager.is_running():
                        sys.exit("continuous batching stopped")
                elif output.error:
                    sys.exit(f"continuous batching: {output.error}")
                elif output.is_finished():
                    outputs[numbers.pop(output.request_id)] = list(output.generated_tokens)
            print(json.dumps({"outputs": outputs}), file=answers, flush=True)
    manager.stop(block=True, timeout=30)


if __name__ == "__main__":
    main()
