"""Ask a model the questions of one sample, by one method, and take down its answers and what they cost.

Three ways to ask, of two modes:

- question-aware: the whole prompt is read, then compressed, as papers do. A further question follows the right answer
  to the one before (SCBench's multi-turn mode with golden context); what the model itself wrote is taken back.
- question-agnostic: the context is read and compressed before any question is seen. Every question is asked of the
  context alone (SCBench's same-context mode): it runs on a copy of the cache.

Generation is greedy, one sequence at a time, in a loop of its own: what is timed is the model and nothing else.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..hf.cache import begin_prompt, cache_stats
from ..hf.models import CACHE_ARGUMENT
from ..hf.prompts import continued, encode, follow_up, longest, render
from .measures.latency import percentile, synchronize, time_stage_1
from .measures.memory import cache_cost, peak_bytes, reset_peak
from .methods import Method
from .records import CostDict, digest
from .tasks.base import Sample, Turn

AWARE, AGNOSTIC = "aware", "agnostic"
TRACE_POINTS = 64  # at most, of the cache's size over time


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What came of one sample.

    Attributes:
        predictions: the text of each turn, special tokens left out.
        prompt_sha256: of the tokens that were given to the model, all turns.
        cost: of all turns together; time to the first token is the first turn's, with the context.
        trace: [generated tokens, bytes of the cache] over the last turn.
    """

    predictions: tuple[str, ...]
    prompt_sha256: str
    cost: CostDict
    trace: list[list[int]]


class Conversation:
    """One sequence: its tokens so far, its cache, and the clock.

    Args:
        model: a model to which `method` is attached.
        method: makes the cache.
        first: tokens of the first prompt.
    """

    def __init__(self, model: PreTrainedModel, method: Method, first: int) -> None:
        self._model = model
        self.cache: Cache = method.new_cache(model, first)
        self._stage_1 = time_stage_1(self.cache)
        self.ids: list[int] = []
        self._seen = 0  # tokens that the model has read, its own included
        self.step_seconds: list[float] = []
        self.trace: list[list[int]] = []  # [generated tokens, bytes of the cache]
        self.peak_decode: int | None = None

    def read(self, ids: list[int]) -> tuple[Tensor, float]:
        """Read a prompt, or more of one; return the logits [vocabulary] after it, and the seconds it took.

        Raises:
            ValueError: it does not fit the model.
        """
        self.ids += ids
        most = longest(self._model.config)
        if len(self.ids) > most:
            raise ValueError(
                f"a prompt must have at most the {most} tokens that the model takes, got {len(self.ids)}; ask for a "
                "shorter length"
            )
        begin_prompt(self.cache, len(self.ids))
        return self._forward(ids)

    def write(self, logits: Tensor, count: int, ends: set[int]) -> list[int]:
        """Generate greedily after what was read, at most `count` tokens and up to an end token, which is left out.

        Args:
            logits: [vocabulary], of the first token.
            count: tokens at most.
            ends: tokens that end it.
        """
        written: list[int] = []
        every = max(1, count // TRACE_POINTS)
        watched = _watch_peak(self._model.device)
        while len(written) < count:
            token = int(logits.argmax())
            if token in ends:
                break
            written.append(token)
            if len(written) % every == 0:
                self.trace.append([len(written), cache_stats(self.cache).total_bytes])
            if len(written) < count:
                logits, seconds = self._forward([token])
                self.step_seconds.append(seconds)
        if watched:
            self.peak_decode = peak_bytes(self._model.device)
        return written

    def _forward(self, ids: list[int]) -> tuple[Tensor, float]:
        device = self._model.device
        given = torch.tensor([ids], device=device)
        # Positions of the text: a cache that a press has shortened counts from its own length.
        positions = torch.arange(self._seen, self._seen + len(ids), device=device)[None]
        self._seen += len(ids)
        synchronize(device)
        start = time.perf_counter()
        output = self._model(given, position_ids=positions, **{CACHE_ARGUMENT: self.cache}, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1]
        synchronize(device)
        return logits, time.perf_counter() - start

    def fork(self) -> Conversation:
        """Return a copy that goes its own way from here; its cache is copied, its times are apart."""
        other = copy.copy(self)
        with torch.inference_mode(False):  # a copy made in inference mode could not be written to outside of it
            other.cache, other.ids = copy.deepcopy(self.cache), list(self.ids)
        other.step_seconds, other.trace = [], []
        return other

    def compression_seconds(self) -> float | None:
        """Return the seconds of stage 1 so far; None for methods without it."""
        return None if self._stage_1 is None else self._stage_1()


def _watch_peak(device: torch.device) -> bool:
    """Begin a new peak of memory on a device whose allocator knows it; a process's own is for `latency` to measure."""
    return device.type == "cuda" and reset_peak(device) is not None


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    sample: Sample,
    *,
    mode: str = AWARE,
    chat: bool = False,
    max_new_tokens: int | None = None,
) -> Answers:
    """Ask the questions of a sample.

    Args:
        model: a model to which no method is attached; none is afterwards.
        tokenizer: its tokenizer.
        method: how to compress.
        sample: context and questions.
        mode: `aware` or `agnostic`, see the module.
        chat: whether to use the model's chat template.
        max_new_tokens: at most so many for every question, instead of its own number.

    Raises:
        ValueError: the mode is unknown, or a prompt does not fit the model.
    """
    if mode not in (AWARE, AGNOSTIC):
        raise ValueError(f"mode must be {AWARE!r} or {AGNOSTIC!r}, got {mode!r}")
    ends = end_tokens(model, tokenizer)
    agnostic, turns = mode == AGNOSTIC, sample.turns
    prompts = [render(tokenizer, sample.context, turn.question, turn.answer_prefix, chat=chat) for turn in turns]
    ids, head = encode(tokenizer, prompts[0], apart=agnostic)
    watched = _watch_peak(model.device)
    predictions, given, steps = [], [], []
    first_seconds, new_tokens, peak_prefill = 0.0, 0, None
    with method.attached(model):
        talk = asked = Conversation(model, method, head if agnostic else len(ids))
        if agnostic:
            _, first_seconds = talk.read(ids[:head])
            peak_prefill = peak_bytes(model.device) if watched else None  # before a question has a copy of the cache
        for number, turn in enumerate(turns):
            aside = number + 1 < len(turns)  # what the model writes is not to stay
            if agnostic:
                asked = talk.fork() if aside else talk
                logits, seconds = asked.read(encode(tokenizer, prompts[number], apart=True)[0][head:])
            else:
                new = _further(tokenizer, turns[number - 1], turn, chat=chat) if number else ids
                logits, seconds = talk.read(new)
                asked = talk.fork() if aside else talk
            if not number:
                first_seconds += seconds
                if not agnostic:
                    peak_prefill = peak_bytes(model.device) if watched else None
            given.append(list(asked.ids))
            limit = turn.max_new_tokens if max_new_tokens is None else min(max_new_tokens, turn.max_new_tokens)
            written = asked.write(logits, limit, ends)
            steps += asked.step_seconds
            new_tokens += len(written)
            predictions.append(str(tokenizer.decode(written, skip_special_tokens=True)))
    cost: CostDict = {
        **cache_cost(cache_stats(asked.cache)),
        "prompt_tokens": len(given[0]),
        "new_tokens": new_tokens,
        "first_token_seconds": first_seconds,
        "compression_seconds": talk.compression_seconds(),
        "peak_prefill_bytes": peak_prefill,
        "peak_decode_bytes": asked.peak_decode,
    }
    if steps:
        cost["step_seconds"], cost["step_seconds_p95"] = median(steps), percentile(steps, 0.95)
    return Answers(predictions=tuple(predictions), prompt_sha256=digest(given), cost=cost, trace=asked.trace)


def _further(tokenizer: PreTrainedTokenizerBase, before: Turn, turn: Turn, *, chat: bool) -> list[int]:
    """Return the tokens between a question and the answer to the next one: the right answer, and that question."""
    # An answer of several parts is given back whole.
    right = str(before.extra.get("given_back", before.answers[0] if before.answers else ""))
    between = follow_up(tokenizer, turn.question, turn.answer_prefix, chat=chat)
    return continued(tokenizer, f" {right}" if before.answer_prefix else right) + continued(tokenizer, between)
