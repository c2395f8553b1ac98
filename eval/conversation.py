"""Answer the questions of one sample by one method, and measure what the answers cost.

Two modes:

- query-aware: the whole prompt is read, then compressed, as papers do. A further question follows the right answer to
  the one before (SCBench's multi-turn mode with golden context); the model's own answer is dropped.
- query-agnostic: the context is read and compressed before any question is seen. Every question follows the context
  alone, on a copy of the cache (SCBench's same-context mode).

Generation is greedy, one sequence at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hf.cache import cache_stats
from ..hf.prompts import continued, encode, follow_up, longest, render
from .generate import DecodeLoop
from .measures.latency import step_cost, time_stage_1
from .measures.memory import cache_cost, peak_bytes, reset_peak
from .methods import Method
from .records import CostDict, digest
from .tasks.base import Sample, Turn

AWARE, AGNOSTIC = "aware", "agnostic"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers to one sample.

    Attributes:
        predictions: the text of each turn, without special tokens.
        prompt_sha256: of the tokens of all prompts.
        cost: of all turns together; time to the first token is the first turn's, context included.
    """

    predictions: tuple[str, ...]
    prompt_sha256: str
    cost: CostDict


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
    max_new_tokens: int | None = None,
) -> Answers:
    """Answer the questions of a sample.

    Args:
        model: a model to which no method is attached; none is afterwards.
        tokenizer: its tokenizer.
        method: how to compress.
        sample: context and questions.
        mode: `aware` or `agnostic`, see the module.
        chat: whether to use the model's chat template.
        max_new_tokens: most tokens of each answer; None leaves it to the turns.

    Raises:
        ValueError: the mode is unknown, or a prompt does not fit the model.
    """
    if mode not in (AWARE, AGNOSTIC):
        raise ValueError(f"mode must be {AWARE!r} or {AGNOSTIC!r}, got {mode!r}")
    ends = end_tokens(model, tokenizer)
    agnostic, turns = mode == AGNOSTIC, sample.turns
    rendered = [render(tokenizer, sample.context, turn.question, turn.answer_prefix, chat=chat) for turn in turns]
    ids, head = encode(tokenizer, rendered[0], apart=agnostic)
    # The peak of a process counts everything in it: on a CPU the task `latency` measures it.
    on_cuda = model.device.type == "cuda" and reset_peak(model.device) is not None

    def peak() -> int | None:
        return peak_bytes(model.device) if on_cuda else None

    history: list[int] = []  # tokens that the next question follows
    predictions, prompts, steps = [], [], list[float]()
    first_seconds, new_tokens = 0.0, 0
    peak_prefill = peak_decode = None
    with method.attached(model):
        shared = loop = DecodeLoop(model=model, cache=method.new_cache(model, head if agnostic else len(ids)))
        stage_1 = time_stage_1(shared.cache)
        if agnostic:
            history = ids[:head]
            _read(shared, history, history)
            first_seconds, peak_prefill = shared.seconds[-1], peak()  # before a question has a copy of the cache
        for number, turn in enumerate(turns):
            last = number + 1 == len(turns)
            if agnostic:
                new = encode(tokenizer, rendered[number], apart=True)[0][head:]
            else:
                new = _next_turn(tokenizer, turns[number - 1], turn, chat=chat) if number else ids
            prompts.append(history + new)
            loop = shared if last or not agnostic else shared.fork()
            _read(loop, new, prompts[-1])
            if not number:
                first_seconds += loop.seconds[-1]
                peak_prefill = peak_prefill if agnostic else peak()
            if not agnostic:
                history = prompts[-1]
                loop = shared if last else shared.fork()
            limit = turn.max_new_tokens if max_new_tokens is None else min(max_new_tokens, turn.max_new_tokens)
            before = len(loop.seconds)
            if on_cuda:
                reset_peak(model.device)
            written = list(loop.greedy(limit, ends))
            peak_decode = peak()
            steps += loop.seconds[before:]
            new_tokens += len(written)
            predictions.append(str(tokenizer.decode(written, skip_special_tokens=True)))
        compression_seconds = None if stage_1 is None else stage_1()
    cost: CostDict = {
        **cache_cost(cache_stats(loop.cache)),
        "prompt_tokens": len(prompts[0]),
        "new_tokens": new_tokens,
        "first_token_seconds": first_seconds,
        "compression_seconds": compression_seconds,
        "peak_prefill_bytes": peak_prefill,
        "peak_decode_bytes": peak_decode,
    }
    if steps:
        cost |= step_cost(steps)
    return Answers(predictions=tuple(predictions), prompt_sha256=digest(prompts), cost=cost)


def _read(loop: DecodeLoop, ids: list[int], sequence: list[int]) -> None:
    """Prefill `ids`, the last tokens of a sequence that must fit the model."""
    most = longest(loop.model.config)
    if len(sequence) > most:
        raise ValueError(
            f"a prompt must have at most the {most} tokens that the model takes, got {len(sequence)}; ask for a "
            "shorter length"
        )
    loop.prefill([ids])


def _next_turn(tokenizer: PreTrainedTokenizerBase, before: Turn, turn: Turn, *, chat: bool) -> list[int]:
    """Return the tokens of the right answer to a question and of the question after it."""
    # `given_back` is the whole of an answer that has several parts.
    right = str(before.extra.get("given_back", before.answers[0] if before.answers else ""))
    between = follow_up(tokenizer, turn.question, turn.answer_prefix, chat=chat)
    return continued(tokenizer, f" {right}" if before.answer_prefix else right) + continued(tokenizer, between)
