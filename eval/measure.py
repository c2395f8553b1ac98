"""Generate with a model and take down what it cost: time to the first token, time of each step, bytes of the cache."""

import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from ..config import RocketKVConfig
from ..hf.cache import RocketKVCache, cache_stats
from ..hf.models import CACHE_ARGUMENT
from ..hf.patch import patch
from ..state.stats import CacheStats


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One greedy generation.

    Attributes:
        text: the new tokens, decoded.
        first_token_seconds: from the call to the first new token: the prefill, stage 1 in it.
        step_seconds: seconds of each decoded token after the first.
        stats: the cache at the end.
    """

    text: str
    first_token_seconds: float
    step_seconds: tuple[float, ...]
    stats: CacheStats

    @property
    def tokens_per_second(self) -> float:
        """One over the median step."""
        return 1.0 / median(self.step_seconds)


class _Clock(BaseStreamer):
    """A streamer that only notes when each token came; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def measured_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    config: RocketKVConfig | None,
    *,
    new_tokens: int = 16,
) -> Generation:
    """Generate greedily after one prompt, with the stock model (config None) or compressed, and measure it.

    Args:
        model: a model that is not patched; it is not patched afterwards either.
        tokenizer: its tokenizer.
        prompt: plain text.
        config: how to compress, or None for the stock model and its own cache.
        new_tokens: tokens to generate, at least 2; an end-of-text token does not end it.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2, one for the prefill and one step to time; got {new_tokens}")
    inputs: BatchEncoding = tokenizer(prompt, return_tensors="pt").to(model.device)
    clock = _Clock()
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    cache = DynamicCache(config=model.config) if config is None else RocketKVCache(model.config, config)
    handle = None if config is None else patch(model, config)
    with torch.inference_mode():
        try:
            start = time.perf_counter()
            output = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, streamer=clock, **settings)  # type: ignore[operator]
        finally:
            if handle is not None:
                handle.__exit__(None, None, None)
    times = clock.times[1:]  # the first is the prompt's
    steps = tuple(after - before for before, after in pairwise(times))
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Generation(
        text=str(text), first_token_seconds=times[0] - start, step_seconds=steps, stats=cache_stats(cache)
    )
