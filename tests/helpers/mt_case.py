"""Conversations with RocketKV-MT: settings, prompts of three turns, and the calls that take a model through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chat import chat
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import SKETCH_SPLIT, SMALL, TRANSFORMERS, begin_turn, left_padded, prompt

# What older releases give a cache is tested over all of them in hf/test_models.py and hf/test_turns.py.
OLDER = TRANSFORMERS < (5, 0)
FAMILIES = ["llama", "gemma3"] if OLDER else ["llama", "gemma2", "gemma3", "gpt-oss"]
PADDED_FAMILIES = ["llama"] if OLDER else ["llama", "gemma3", "gpt-oss", "qwen3"]

MT: dict[str, Any] = {**SMALL, "method": "rocketkv-mt"}
# The other index on the way, for what is done to a history owes nothing to the one that a turn decodes by.
PLUS: dict[str, Any] = {**MT, "method": "rocketkv-mt+", "split": SKETCH_SPLIT}
AWAY: dict[str, Any] = {**PLUS, "history_device": "cpu"}
FIRST, SECOND, THIRD = prompt(90), prompt(50, seed=7), prompt(35, seed=8)
LATER = (SECOND, THIRD)
# With these tokens no key lies so near the boundary of two codes that the rounding of a padded batch changes its code.
ROWS = [FIRST, prompt(41), prompt(15, seed=10)]
LATER_ROWS = (prompt(50, rows=3, seed=7), prompt(35, rows=3, seed=8))
SEEN = 90 + 12 + 50 + 12 + 35 + 11


def close(found: Tensor, expected: Tensor) -> None:
    """Assert that logits agree to 1e-5 of the largest."""
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def same(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    """Assert that every turn has the same tokens and, to rounding, the same logits."""
    for (tokens, logits), (other_tokens, other_logits) in zip(found, expected, strict=True):
        close(logits, other_logits)
        assert tokens.equal(other_tokens)


def forward(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits [B, n, V] of token ids [B, n], after those that the cache has seen."""
    given: dict[str, Tensor] = {}
    begin_turn(cache, ids)
    if mask is not None:
        seen = cache.get_seq_length()
        mask = torch.cat((mask, mask.new_ones(len(mask), seen + ids.shape[1])), dim=1)[:, : seen + ids.shape[1]]
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]}
    with torch.no_grad():
        logits: Tensor = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, **given).logits
    return logits


def decode(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.cat([forward(model, cache, token, mask) for token in ids.split(1, dim=1)], dim=1)


def turn_of(model: Any, cache: Any, ids: Tensor, count: int = 8, mask: Tensor | None = None) -> Tensor:
    """Return the logits of another prompt, and of greedy tokens after it."""
    logits = [forward(model, cache, ids, mask)]
    for _ in range(count):
        logits.append(forward(model, cache, logits[-1][:, -1:].argmax(-1), mask))
    return torch.cat(logits, dim=1)


def read(model: Any, context: dict[str, Tensor], told: bool = True, **fields: Any) -> RocketKVCache:
    """Return a cache that has seen a first prompt."""
    length = context["input_ids"].shape[1]
    cache = RocketKVCache(model.config, prompt_length=length if told else None, **fields)
    forward(model, cache, context["input_ids"], context["attention_mask"])
    return cache


def talked(model: Any, told: bool = True, **fields: Any) -> RocketKVCache:
    """Return a cache after three turns, of 90, 50 and 35 tokens, with 12 decoded after each."""
    cache = read(model, of(FIRST), told, **fields)
    for number, new in enumerate((None, *LATER)):
        if new is not None:
            forward(model, cache, new)
        decode(model, cache, prompt(12, seed=30 + number))
    return cache


def conversation(model: Any, padded: bool, way: str, **fields: Any) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Hold three turns in one way with a model patched with `fields`; return what `chat` does."""
    first, later = (left_padded(ROWS), LATER_ROWS) if padded else (of(FIRST), LATER)
    told = way == "loop in chunks" and padded  # its first chunk has rows of nothing but padding
    own = RocketKVCache(model.config, prompt_length=90, **fields) if told else None
    return chat(model, first, later, way, cache=own)
