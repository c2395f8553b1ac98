"""Time a vLLM engine with and without the plugin, in one process on a CPU, and print the ratios to dense.

python tools/vllm_throughput.py MODEL --settings '{"token_budget": 256}'

Processor time, so that a busy machine changes little; decode steps run with all requests in the batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from typing import Any

import torch


def measured(model: str, settings: dict[str, Any] | None, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Return the processor seconds of reading all prompts, and of the decode steps after it."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()  # of the other engine
    llm = LLM(
        model,
        dtype="float32",
        block_size=32,
        max_model_len=len(prompts[0]) + new_tokens + 1,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=sum(map(len, prompts)),
        enforce_eager=True,
        enable_prefix_caching=False,
        additional_config={} if settings is None else {"rocketkv": settings},
    )
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    steps = []
    while engine.has_unfinished_requests():
        start = time.process_time()
        engine.step()
        steps.append(time.process_time() - start)
    engine.engine_core.shutdown()
    del llm, engine
    gc.collect()
    cleanup_dist_env_and_memory()
    # The first decode step runs stage 1, which belongs to the prompt.
    return [sum(steps[:2]), sum(steps[2:])]


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="local folder or hub name")
    parser.add_argument("--settings", type=json.loads, default={"token_budget": 256}, help="as JSON")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, 5000, (args.prompt,), generator=generator).tolist() for _ in range(args.requests)]
    dense, compressed = (measured(args.model, given, prompts, args.new_tokens) for given in (None, args.settings))
    names = ("prompts", "decode steps", "together")
    for name, own, base in zip(names, [*compressed, sum(compressed)], [*dense, sum(dense)], strict=True):
        sys.stdout.write(f"{name}: {own:.2f} s, dense {base:.2f} s, ratio {own / base:.2f}\n")


if __name__ == "__main__":
    main()
