"""Parts that `generate` calls while it answers: after the prompt, and after each token."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from ..hf.cache import RocketKVCache, cache_stats
from ..hf.layer import rocketkv_layers
from ..state.missed import last_missed
from .jobs import Job, Piece
from .text import AnswerText

_USAGE_SECONDS = 0.5  # between two reports of the usage while an answer is generated


@contextmanager
def interrupted(modules: Iterable[nn.Module], check: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Call a function before each forward of some modules; yield a function that ends this.

    An exception of the function ends a prefill within the time of one layer; the cache must then be rolled back.
    """
    handles = [module.register_forward_pre_hook(lambda *_: check()) for module in modules]

    def release() -> None:
        while handles:
            handles.pop().remove()

    try:
        yield release
    finally:
        release()


class AfterPrompt(LogitsProcessor):
    """Calls a function once, when the prompt has been read and no token chosen; it leaves the logits as they are."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores."""
        call, self._call = self._call, None
        if call is not None:
            call()
        return scores


class Writer(StoppingCriteria):
    """Takes each generated token: delivers its text, and tells `generate` when the answer has ended.

    Args:
        job: the request.
        cache: its cache.
        tokenizer: the model's.
        ends: tokens that end an answer.
        began: when the request began (`time.monotonic`).

    Attributes:
        tokens: the generated tokens.
        reason: why the answer has ended.
    """

    def __init__(self, job: Job, cache: RocketKVCache, tokenizer: Any, ends: Collection[int], began: float) -> None:
        self.tokens: list[int] = []
        self.reason: Literal["stop", "length"] | None = None
        self._job = job
        self._cache = cache
        self._ends = frozenset(ends)
        self._text = AnswerText(tokenizer, job.stops)
        self._began = began
        self._reported = -math.inf
        self._missed = 0.0
        self._estimates = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Take the last token of [1, n] ids; return [1] bool, whether the answer has ended.

        Raises:
            CancelledError: nobody waits for the answer.
        """
        self._job.check()
        if self.reason is None:
            self._take(int(input_ids[0, -1]))
        return torch.tensor([self.reason is not None], device=input_ids.device)

    def _take(self, token: int) -> None:
        usage = self._job.usage
        self.tokens.append(token)
        usage.completion_tokens = len(self.tokens)
        usage.seconds = time.monotonic() - self._began
        if usage.first_token_seconds is None:
            usage.first_token_seconds = usage.seconds
        self._estimate()
        if token in self._ends:
            self.reason = "stop"
            return
        text = self._text.add(token)
        if self._text.stopped:
            self.reason = "stop"
        elif self._job.overdue:
            self.reason = "length"
        if text:
            self._job.deliver(Piece(text, self._report()))

    def finish(self) -> None:
        """Deliver the rest of the text, and count the bytes of the cache."""
        rest = self._text.finish()
        if rest:
            self._job.deliver(Piece(rest))
        if self.reason is None:
            self.reason = "stop" if self._text.stopped else "length"
        self._job.usage.seconds = time.monotonic() - self._began
        self._job.usage.count(cache_stats(self._cache))

    def _estimate(self) -> None:
        """Add the step's missed mass to the mean."""
        estimates = [last_missed(layer.store) for layer in rocketkv_layers(self._cache)]
        known = [missed.mean() for missed in estimates if missed is not None]
        if known:
            self._missed += float(torch.stack(known).mean())
            self._estimates += 1
            self._job.usage.missed_mass = self._missed / self._estimates

    def _report(self) -> dict[str, Any] | None:
        now = time.monotonic()
        if not self._job.continuous or now - self._reported < _USAGE_SECONDS:
            return None
        self._reported = now
        self._job.usage.count(cache_stats(self._cache))
        return self._job.usage.document(self._job.config)
