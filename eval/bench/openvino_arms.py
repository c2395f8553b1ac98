"""Arms of OpenVINO GenAI for `rocketkv bench decode`, where it is installed: the engine a CPU user may pick instead.

It reads SmolLM2's GGUF file as it is, 4-bit weights included. Every round reads the prompt anew, because a pipeline
keeps no sequence; the time of a step is its own report of the time per output token.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

# Tokens that its cache eviction keeps: first, most recent, and in all (block size 32).
EVICTION = (32, 192, 512)


def installed() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("openvino_genai") is not None


class OpenVinoArm:
    """One pipeline on a CPU, with its default precisions.

    Args:
        file: a GGUF file.
        threads: CPU threads.
        evicts: whether its cache is evicted to `EVICTION`.
    """

    def __init__(self, file: Path, threads: int, *, evicts: bool) -> None:
        genai: Any = importlib.import_module("openvino_genai")
        openvino: Any = importlib.import_module("openvino")
        options: dict[str, Any] = {}
        if evicts:
            scheduler = genai.SchedulerConfig()
            scheduler.use_cache_eviction = True
            scheduler.cache_eviction_config = genai.CacheEvictionConfig(*EVICTION, genai.AggregationMode.NORM_SUM)
            options["scheduler_config"] = scheduler
        self._genai, self._tensor = genai, openvino.Tensor
        self._pipeline = genai.LLMPipeline(str(file), "CPU", INFERENCE_NUM_THREADS=threads, **options)
        core = openvino.Core()
        names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        activations, cache = (str(core.get_property("CPU", name).to_string()) for name in names)
        self.precision = f"weights of the file (4-bit), activations {activations}, cache {cache}"
        self.first_token_seconds: list[float] = []
        self.written: list[int] = []

    def step_seconds(self, ids: list[int], new_tokens: int) -> float:
        """Read a prompt, write `new_tokens` tokens greedily, and return the mean seconds of a token after the first."""
        config = self._genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        tokens = self._tensor(np.array([ids], dtype=np.int64))
        mask = self._tensor(np.ones((1, len(ids)), dtype=np.int64))
        result = self._pipeline.generate(self._genai.TokenizedInputs(tokens, mask), config)
        self.written = list(result.tokens[0])
        self.first_token_seconds.append(result.perf_metrics.get_ttft().mean / 1e3)
        return float(result.perf_metrics.get_tpot().mean) / 1e3
