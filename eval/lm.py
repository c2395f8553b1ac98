"""The model as lm-eval sees it: `RocketKVLM`, registered as `rocketkv`.

With tasks of lm-eval's own, generation goes through the compressed model's `generate`, in batches, with lm-eval's stop
strings. Log-likelihoods are computed by teacher-forced decoding: the context is the prompt, and each token of the
continuation is read by a decode step, for a single forward over both would never touch a compressed cache.

Samples of ours (`bind`) are asked by `conversation.ask`, one at a time, and measured.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from ..config import RocketKVConfig
from ..hf.cache import cache_stats
from ..hf.loading import SMOLLM2, load_smollm2
from ..hf.models import CACHE_ARGUMENT
from .measures.kl import decode_logprobs
from .measures.memory import cache_cost
from .methods import FULL, Compressed, Full, Method, find_method

GROWTH_STEP = 64  # tokens between two notes of a cache's size
SAMPLE = "rocketkv_sample"  # field of a document of ours: its sample's id


@register_model("rocketkv")
class RocketKVLM(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """A Hugging Face model that runs one of the methods.

    Args:
        pretrained: a hub name, a local folder or a model; `smollm2` for SmolLM2-135M-Instruct.
        method: see `methods.find_method`.
        token_budget: likewise; not for `full`.
        **kwargs: fields of `RocketKVConfig`, and what `HFLM` takes.

    Raises:
        ValueError: there is no such method, or a field has an impossible value.
    """

    def __init__(
        self, pretrained: Any, method: str | Method = "rocketkv", token_budget: int | str | None = None, **kwargs: Any
    ) -> None:
        names = {field.name for field in fields(RocketKVConfig)} & set(kwargs)
        settings = {name: kwargs.pop(name) for name in names}
        if isinstance(method, str):
            budget = None if token_budget is None else int(token_budget)
            if method != FULL and budget is None:
                budget = RocketKVConfig.token_budget
            method = find_method(method, budget, settings)
        if pretrained == SMOLLM2:
            pretrained, kwargs["tokenizer"] = load_smollm2(getattr(torch, str(kwargs.pop("dtype", "float32"))))
        super().__init__(pretrained, **kwargs)
        self.method: Method = method
        self.costs: dict[str, dict[str, Any]] = {}
        self._contexts: list[str] = []
        self._answer: Callable[[str], Sequence[str]] | None = None

    def bind(self, method: Method, answer: Callable[[str], Sequence[str]] | None) -> None:
        """Go over to another method, and to what answers samples of ours.

        Args:
            method: for everything from now on.
            answer: from a sample's id to the predictions of its turns; None where there are no samples of ours.
        """
        self.method, self._answer, self.costs = method, answer, {}

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results: method, budget, and what generations cost."""
        info: dict[str, Any] = super().get_model_info()
        return info | {
            "method": self.method.name,
            "token_budget": self.method.token_budget,
            "costs": list(self.costs.values()),
        }

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate: samples of ours as `conversation.ask` does, all others as lm-eval does."""
        if not requests or SAMPLE not in _document(requests[0]):
            generated: list[str] = super().generate_until(requests, disable_tqdm)
            return generated
        if self._answer is None:
            raise ValueError("samples of ours need `bind` before they can be asked")
        ids = [_document(request)[SAMPLE] for request in requests]
        return [
            json.dumps(list(self._answer(name)))
            for name in tqdm(ids, desc=self.method.name, disable=disable_tqdm or None)
        ]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Generate after a batch of prompts by the method, and note the cache's size."""
        with self.method.attached(self.model):
            # A row alone has its cache made here, so that it can be counted; a batch has one that generate makes.
            rows = context.shape[0] * kwargs.get("num_return_sequences", 1) * kwargs.get("num_beams", 1)
            alone = rows == 1
            if not alone and not isinstance(self.method, (Full, Compressed)):
                raise ValueError(
                    f"method {self.method.name!r} makes a cache for one sequence, got {rows}; set batch_size to 1"
                )
            growth = _Growth(self.method.new_cache(self.model, context.shape[1])) if alone else None
            if growth is not None:
                kwargs |= {CACHE_ARGUMENT: growth.cache, "streamer": growth}
            output: torch.Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        cost = {"prompt_tokens": context.shape[1], "new_tokens": output.shape[1] - context.shape[1]}
        for prompt in self._contexts:
            self.costs[prompt] = cost if growth is None else cost | growth.cost()
        return output

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode as `HFLM` does, and remember whose costs come next."""
        self._contexts = list(strings)
        encoded: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
        return encoded

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations by teacher-forced decoding over the method's cache."""
        _say_teacher_forced()
        scored = []
        for names, context, continuation in tqdm(requests, desc=self.method.name, disable=disable_tqdm or None):
            room = max(1, self.max_length + 1 - len(continuation))
            logprobs = decode_logprobs(self.model, self.method, context[-room:], continuation)
            targets = torch.tensor(continuation)
            total = float(logprobs.gather(1, targets[:, None]).sum())
            greedy = bool((logprobs.argmax(1) == targets).all())
            scored.append((total, greedy))
            if names is not None:  # windows of a rolling log-likelihood are cached together, by their text
                self.cache_hook.add_partial("loglikelihood", names, scored[-1])
        return scored


class _Growth(BaseStreamer):
    """A streamer that notes the cache's size as it grows."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._tokens = -1  # the prompt comes first
        self._trace: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        """Count a token, or the prompt."""
        self._tokens += 1
        if self._tokens % GROWTH_STEP == 0:
            self._trace.append([self._tokens, cache_stats(self.cache).total_bytes])

    def end(self) -> None:
        """Note the end."""
        self._trace.append([self._tokens, cache_stats(self.cache).total_bytes])

    def cost(self) -> dict[str, Any]:
        """Return the cache's bytes, at the end and over time."""
        return {**cache_cost(cache_stats(self.cache)), "trace": self._trace}


def _say_teacher_forced() -> None:
    warnings.warn(
        "log-likelihoods are computed by teacher-forced decoding, a step a token: slower than lm-eval's one forward, "
        "which would not touch the compressed cache",
        stacklevel=3,
    )


def _document(request: Instance) -> Mapping[str, Any]:
    return request.doc if isinstance(request.doc, Mapping) else {}
