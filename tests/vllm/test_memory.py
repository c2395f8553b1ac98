"""What the slab saves: requests that decode at the same time in equal memory, by the engine's own accounting."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
import vllm_case
from vllm_case import BLOCK

REQUESTS, LENGTH, NEW_TOKENS = 32, 3000, 90
SETTINGS = {"token_budget": 256, "decode_capacity": 64}
POOL = 98  # blocks: the longest prompt has 97, and vLLM keeps one
ARGUMENTS = {"max_model_len": LENGTH + 100, "max_num_seqs": REQUESTS, "max_num_batched_tokens": 4096}


def most_decoding(engine: vllm_case.Engine, *, compressed: bool) -> int:
    """Serve all requests, and return how many decoded in one step at most.

    Compressed requests hold no block of their prompt after their first decode step.
    """
    for i in range(REQUESTS):
        engine.add(f"r{i}", tiny.prompt(LENGTH, seed=i)[0].tolist(), NEW_TOKENS)
    tokens: dict[str, list[int]] = {}
    most = 0
    while engine.engine.has_unfinished_requests():
        engine.step(tokens)
        running = engine.scheduler.running
        most = max(most, sum(r.num_output_tokens > 0 and r.num_computed_tokens >= LENGTH for r in running))
        if compressed:
            held = engine.prompt_blocks()
            assert not any(held[r.request_id] for r in running if r.num_output_tokens > 1)
    assert all(len(found) == NEW_TOKENS for found in tokens.values())
    return most


@pytest.mark.parametrize(("method", "least"), [("rocketkv", 1.8), ("rocketkv+", 1.6)])
def test_more_requests_decode_at_the_same_time(method: str, least: float, models: Path) -> None:
    folder = vllm_case.saved("llama", models)
    with vllm_case.serve(folder, {**SETTINGS, "method": method}, num_gpu_blocks_override=POOL, **ARGUMENTS) as engine:
        layers = engine.layers.values()
        slab = sum(layer.impl.slab.nbytes for layer in layers)
        pool = sum(layer.kv_cache.nbytes for layer in layers)
        compressed = most_decoding(engine, compressed=True)
    blocks = POOL + slab * POOL // pool
    with vllm_case.serve(folder, None, num_gpu_blocks_override=blocks, **ARGUMENTS) as engine:
        dense = most_decoding(engine, compressed=False)
    assert compressed >= least * dense, (
        f"{compressed} at the same time, dense {dense} in {blocks} blocks of {BLOCK} tokens"
    )
