"""The engine's tokens are those of the library's Hugging Face path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import tiny
import vllm_case

LENGTHS = (37, 64, 95, 200, 330, 777, 1500, 3000)
NEW_TOKENS = 56  # more than decode_capacity, so that generated tokens are re-evicted


def prompts(vocabulary: int) -> list[list[int]]:
    return [[token % vocabulary for token in tiny.prompt(n, seed=n)[0].tolist()] for n in LENGTHS]


@pytest.mark.parametrize(
    ("name", "method", "chunk", "caching"),
    [
        ("llama", "rocketkv", 64, True),
        ("llama", "rocketkv+", 128, False),
        ("qwen3", "rocketkv", 8192, False),
        ("qwen3", "rocketkv+", 64, True),
        ("gemma3", "rocketkv", 128, True),  # every other layer has a sliding window, and is vLLM's own
    ],
)
def test_equals_transformers(name: str, method: str, chunk: int, caching: bool, models: Path) -> None:
    folder, settings = vllm_case.saved(name, models), {**vllm_case.SETTINGS, "method": method}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=tiny.torch.float32)
    given = prompts(tiny.VOCABULARY)
    expected = [vllm_case.reference(model, prompt, NEW_TOKENS, settings) for prompt in given]
    dense = [tiny.greedy(model, tiny.torch.tensor([prompt]), NEW_TOKENS)[0][0].tolist() for prompt in given]
    assert sum(a != b for a, b in zip(expected, dense, strict=True)) >= 6
    arguments: dict[str, Any] = {"max_num_batched_tokens": chunk, "enable_prefix_caching": caching}
    with vllm_case.serve(folder, settings, **arguments) as engine:
        before = engine.free_blocks
        assert [engine.generate([prompt], NEW_TOKENS)[0] for prompt in given[:-1]] == expected[:-1]
        assert engine.generate(given, NEW_TOKENS) == expected
        if caching:
            if name != "gemma3":
                assert engine.cached_tokens(given[-1]) >= 2900
            assert engine.generate(given, NEW_TOKENS) == expected
        assert engine.free_blocks == before
        assert not engine.manager.rows
