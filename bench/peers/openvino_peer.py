"""OpenVINO GenAI's ContinuousBatchingPipeline as a peer (see bench.peers for what it is asked). MODEL is an exported IR. Run by an
interpreter that has openvino-genai:

python openvino_peer.py ANSWERS_FD MODEL [DTYPE [SLOTS [MAX_MODEL_LEN]]] [--prefix-cache on] [--threads N] [--kv-tokens N]
"""

import argparse
import json
import os
import sys
from typing import Any

BLOCK = 32
"""Tokens of a KV block of the CPU plugin."""
STEP_TOKENS = 2048
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def main() -> None:
    import numpy as np
    import openvino  # type: ignore[import-not-found, unused-ignore]
    import openvino_genai  # type: ignore[import-not-found, unused-ignore]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=int)
    parser.add_argument("model")
    parser.add_argument("dtype", nargs="?", default="auto", help="default: what the plugin takes by itself")
    parser.add_argument("slots", nargs="?", type=int, default=64)
    parser.add_argument("max_model_len", nargs="?", type=int, default=2048)
    parser.add_argument("--prefix-cache", choices=["on", "off"], default="off")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--kv-tokens", type=int)
    asked = parser.parse_args()

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = asked.slots, STEP_TOKENS
    scheduler.enable_prefix_caching = asked.prefix_cache == "on"
    scheduler.num_kv_blocks = (asked.kv_tokens or asked.slots * asked.max_model_len) // BLOCK + asked.slots + 1
    scheduler.dynamic_split_fuse = True
    # KV as f16 takes a little less time here than as u8, the plugin's own choice, or f32, and hardly rounds.
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": asked.threads, "KV_CACHE_PRECISION": "f16"}
    if asked.dtype != "auto":
        properties["INFERENCE_PRECISION_HINT"] = PRECISIONS[asked.dtype]
    pipeline = openvino_genai.ContinuousBatchingPipeline(asked.model, scheduler, "CPU", properties)

    def config(tokens: int) -> Any:
        made = openvino_genai.GenerationConfig()
        made.max_new_tokens, made.ignore_eos, made.do_sample, made.apply_chat_template = tokens, True, False, False
        return made

    plugin = openvino.Core()
    plugin.set_property("CPU", properties)
    computes, keeps = (plugin.get_property("CPU", name) for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"))
    about = {
        "name": f"OpenVINO GenAI {openvino_genai.__version__.split('-')[0]}",
        "computes": f"{computes.get_type_name()}, KV {keeps.get_type_name()}",
    }
    with open(asked.answers, "w", encoding="utf-8") as answers:
        print("ready", json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            asks = json.loads(line)
            prompts = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in asks["prompts"]]
            done = pipeline.generate(prompts, [config(tokens) for tokens in asks["output_tokens"]])
            print(json.dumps({"outputs": [list(each.m_generation_ids[0]) for each in done]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
