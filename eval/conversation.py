"""Answer the questions of one sample by one method, and measure what the answers cost.

Two modes:

- query-aware: the whole prompt is read, then compressed, as papers do. A further question follows the right answer to
  the one before (SCBench's multi-turn mode with golden context); the model's own answer is dropped.
- query-agnostic: the context is read and compressed before any question is seen. Every question follows the context
  alone, as the cache returns to its state after it (SCBench's same-context mode).

Generation is greedy or sampled, one sequence at a time. Methods may share the prefill of the first prompt; so the cost
has no time to the first token and no peak of memory, which the task `latency` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hf.cache import cache_stats
from ..hf.prompts import PLAIN, ChatOptions, continued, encode, follow_up, longest, render
from ..hf.thinking import thinking_tags
from .answers import Thought, read_answer
from .measures.latency import step_cost
from .measures.memory import cache_cost
from .methods import Method
from .prefill import Prefills, after_prompt
from .records import CostDict, digest
from .sampling import Sampler
from .served import Served, ServedLoop
from .tasks.base import Sample, Turn
from .traces import Trace, watched

AWARE, AGNOSTIC = "aware", "agnostic"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to one sample.

    Attributes:
        predictions: the answer of each turn, without special tokens and without the thinking before it.
        thoughts: that thinking; None where there was none.
        traces: length of each answer, and bytes of the cache meanwhile.
        prompt_sha256: of the tokens of all prompts.
        cost: bytes of the cache at the end, and times of the decode steps of all turns together.
        pace: tokens before a step and seconds of the step, medians over consecutive steps of the longest answer; empty
            where it is short.
    """

    predictions: tuple[str, ...]
    thoughts: tuple[Thought | None, ...]
    traces: tuple[Trace, ...]
    prompt_sha256: str
    cost: CostDict
    pace: tuple[tuple[int, float], ...] = ()


_PACE_STEPS, _PACE_POINTS = 16, 16  # steps of a median, at least; medians of an answer, at most


def pace_of(first: int, seconds: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Return the pace of an answer, see `Answers`.

    Args:
        first: tokens before the first step.
        seconds: of each step.
    """
    size = max(_PACE_STEPS, math.ceil(len(seconds) / _PACE_POINTS))
    starts = range(0, len(seconds) - _PACE_STEPS + 1, size)
    if len(starts) < 4:
        return ()
    return tuple((first + start, median(seconds[start : start + size])) for start in starts)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, (list, tuple)) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def answer_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    sample: Sample,
    *,
    mode: str = AWARE,
    chat: bool = False,
    chat_options: ChatOptions = PLAIN,
    thinking_tokens: int = 0,
    max_new_tokens: int | None = None,
    sampling: Mapping[str, Any] = MappingProxyType({}),
    seed: Any = 0,
    prefills: Prefills | None = None,
) -> Answers:
    """Answer the questions of a sample.

    Args:
        model: a model to which no method is attached; none is afterwards.
        tokenizer: its tokenizer.
        method: how to compress.
        sample: context and questions.
        mode: `aware` or `agnostic`, see the module.
        chat: whether to use the model's chat template.
        chat_options: for the chat template.
        thinking_tokens: most tokens of the thinking before each answer, in addition to the answer's.
        max_new_tokens: most tokens of each answer; None leaves it to the turns.
        sampling: see `sampling.card_settings`; empty: greedy.
        seed: of sampled tokens, a value of JSON's types.
        prefills: reads the first prompt once for several methods; None: this method reads it itself.

    Raises:
        ValueError: the mode is unknown, or a prompt does not fit the model.
    """
    if mode not in (AWARE, AGNOSTIC):
        raise ValueError(f"mode must be {AWARE!r} or {AGNOSTIC!r}, got {mode!r}")
    ends = end_tokens(model, tokenizer)
    agnostic, turns = mode == AGNOSTIC, sample.turns
    options: dict[str, Any] = {"chat": chat, "options": chat_options}
    rendered = [render(tokenizer, sample.context, turn.question, turn.answer_prefix, **options) for turn in turns]
    ids, head = encode(tokenizer, rendered[0], apart=agnostic)
    first = ids[:head] if agnostic else ids
    _check_length(model, first)
    tags = thinking_tags(tokenizer)
    written, traces, prompts, steps = [], [], [], list[float]()
    longest_answer: tuple[int, list[float]] = 0, []
    new_tokens = 0
    opened: AbstractContextManager[Any] = (
        nullcontext(method.loop(first)) if isinstance(method, Served) else after_prompt(model, method, first, prefills)
    )
    with opened as loop:
        sequence = first  # tokens that the next question follows
        after = loop.snapshot() if agnostic and len(turns) > 1 else None
        for number, turn in enumerate(turns):
            last = number + 1 == len(turns)
            if after is not None and number:
                loop.rollback(after)
                after = None if last else after
            if agnostic:
                new = encode(tokenizer, rendered[number], apart=True)[0][head:]
            else:
                new = _next_turn(tokenizer, turns[number - 1], turn, options) if number else []
            prompts.append(sequence + new)
            if new:
                _check_length(model, prompts[-1])
                loop.prefill([new])
            if not agnostic:
                sequence = prompts[-1]
                after = None if last else loop.snapshot()
            limit = turn.max_new_tokens if max_new_tokens is None else min(max_new_tokens, turn.max_new_tokens)
            before = len(loop.seconds)
            choose = Sampler(sampling, prompts[-1], [seed, sample.id, number]) if sampling else None
            points: list[tuple[int, int]] = []
            served = isinstance(loop, ServedLoop)  # its cache is elsewhere
            most = limit + thinking_tokens
            tokens = loop.greedy(most, ends, choose) if served else watched(loop, most, points, ends, choose)
            inside = tags is not None and chat and tags.left_open(rendered[number].tail)
            limits = {"limit": limit, "thinking_limit": thinking_tokens}
            written.append(read_answer(tokens, tokenizer, tags, inside=inside, **limits))
            if not served:
                points.append((written[-1].tokens, cache_stats(loop.cache).total_bytes))
            traces.append(Trace(tokens=written[-1].tokens, cut=written[-1].cut, kv_bytes=tuple(points)))
            steps += loop.seconds[before:]
            longest_answer = max(
                longest_answer, (len(prompts[-1]), loop.seconds[before:]), key=lambda pair: len(pair[1])
            )
            new_tokens += written[-1].tokens
    cost: CostDict = {
        **(loop.cost() if isinstance(loop, ServedLoop) else cache_cost(cache_stats(loop.cache))),
        "prompt_tokens": len(prompts[0]),
        "new_tokens": new_tokens,
    }
    if steps:
        cost |= step_cost(steps)
    return Answers(
        predictions=tuple(each.answer for each in written),
        thoughts=tuple(each.thought for each in written),
        traces=tuple(traces),
        prompt_sha256=digest(prompts),
        cost=cost,
        pace=pace_of(*longest_answer),
    )


def _check_length(model: PreTrainedModel, sequence: list[int]) -> None:
    """Refuse a sequence that does not fit the model."""
    most = longest(model.config)
    if len(sequence) > most:
        raise ValueError(
            f"a prompt must have at most the {most} tokens that the model takes, got {len(sequence)}; ask for a "
            "shorter length"
        )


def _next_turn(tokenizer: PreTrainedTokenizerBase, before: Turn, turn: Turn, options: Mapping[str, Any]) -> list[int]:
    """Return the tokens of the right answer to a question and of the question after it."""
    # `given_back` is the whole of an answer that has several parts.
    right = str(before.extra.get("given_back", before.answers[0] if before.answers else ""))
    between = follow_up(tokenizer, turn.question, turn.answer_prefix, **options)
    return continued(tokenizer, f" {right}" if before.answer_prefix else right) + continued(tokenizer, between)
