"""Many questions on one context: rollback to a snapshot of the compressed cache against a new cache a question.

The context is read once, and `RocketKVCache.rollback` returns to it after each question; the alternative reads context
and question on a new cache each time. Both must give the same tokens. Everything is timed: forwards, new tokens,
snapshot, rollbacks.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv.config import RocketKVConfig
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.measures.kl import texts
from rocketkv.eval.progress import Progress
from rocketkv.eval.tasks.base import Preparation
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.patch import patch

from .settings import StudySettings, option

_PLACES = ("harbour", "mill", "orchard", "market", "chapel", "bridge", "school", "quarry", "inn", "forge")


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    context: int = option(4096, "tokens of the context")
    questions: int = option(20, "number of questions")
    new_tokens: int = option(8, "of each answer")
    budget: int = option(512, "tokens a decode step")


def questions_of(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Return the ids of different questions, of different lengths."""
    texts = (
        f"\nQuestion {number + 1}: what is said of the {_PLACES[number % len(_PLACES)]}"
        f"{', and of those who work there' if number % 3 else ''}? Answer:"
        for number in range(count)
    )
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def read(model: PreTrainedModel, config: RocketKVConfig, context: list[int]) -> RocketKVCache:
    """Return a cache that has read the context."""
    cache = RocketKVCache(model.config, config, prompt_length=len(context))
    DecodeLoop(model=model, cache=cache).prefill([context])
    return cache


def answer(model: PreTrainedModel, cache: RocketKVCache, question: list[int], new_tokens: int) -> list[int]:
    """Return the greedy tokens after a question."""
    loop = DecodeLoop(model=model, cache=cache, seen=cache.get_seq_length())
    loop.prefill([question])
    return list(loop.greedy(new_tokens))


@torch.inference_mode()
def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Answer every question in both ways.

    Raises:
        ValueError: the ways differ in a token.
    """
    preparation = Preparation(tokenizer=tokenizer, length=settings.context, count=1, seed=settings.seed)
    context = texts(preparation, None)[0].ids
    questions = questions_of(tokenizer, settings.questions)
    config = RocketKVConfig(method="rocketkv", token_budget=settings.budget)
    marks = [(time.perf_counter(), time.process_time())]
    with patch(model, config), Progress("one context", total=2 * len(questions)) as progress:
        cache = read(model, config, context)
        snapshot = cache.snapshot()
        answers = []
        for question in questions:
            answers.append(answer(model, cache, question, settings.new_tokens))
            cache.rollback(snapshot)
            progress.step()
        marks.append((time.perf_counter(), time.process_time()))
        progress.say("new caches")
        for question, expected in zip(questions, answers, strict=True):
            new = answer(model, read(model, config, context), question, settings.new_tokens)
            if new != expected:
                raise ValueError(f"after a rollback the cache answers {expected}, and a new one {new}")
            progress.step()
        marks.append((time.perf_counter(), time.process_time()))
    (once, once_cpu), (anew, anew_cpu) = (
        (end - start, end_cpu - start_cpu) for (start, start_cpu), (end, end_cpu) in itertools.pairwise(marks)
    )
    return {
        "load": os.getloadavg()[0],
        "question_tokens": [len(question) for question in questions],
        "answers": answers,
        "seconds": {"one context": once, "new caches": anew},
        "processor_seconds": {"one context": once_cpu, "new caches": anew_cpu},
        "ratio": once / anew,
        "processor_ratio": once_cpu / anew_cpu,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    settings, seconds, cpu = result["settings"], result["seconds"], result["processor_seconds"]
    summary = (
        f"{settings['questions']} questions on {settings['context']} tokens, {settings['new_tokens']} new tokens each, "
        f"budget {settings['budget']}; all tokens equal."
    )
    lines = [
        summary,
        "",
        "| | seconds | processor seconds |",
        "|--|--|--|",
        *(f"| {name} | {seconds[name]:.1f} | {cpu[name]:.1f} |" for name in seconds),
        f"| ratio | {result['ratio']:.3f} | {result['processor_ratio']:.3f} |",
    ]
    return "\n".join(lines) + "\n"
