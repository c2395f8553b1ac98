"""A conversation with a model, in each of the ways that a cache can be taken from turn to turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import TRANSFORMERS, greedy, hand_written

CHUNK = 20

WAYS = ["loop", "loop in chunks"]
if TRANSFORMERS >= (5, 4):  # older ones take new tokens alone for the whole sequence
    WAYS += ["new tokens"]
if TRANSFORMERS >= (5, 23):  # older ones (5.20 is one) read the whole sequence again in chunks, onto the old cache
    WAYS += ["chunks"]


def turn(model: Any, ids: Tensor, mask: Tensor, cache: Any, way: str, count: int = 12) -> tuple[Tensor, Tensor, Any]:
    """Generate after another prompt on a cache; return what `greedy` does.

    Args:
        model: the model.
        ids: [B, n], the whole sequence: what the cache has seen, the last generated token, and the new prompt.
        mask: [B, n], 0 at padding.
        cache: of the turns before; None where `way` needs none.
        way: one of WAYS, or `all tokens`.
        count: tokens to generate.
    """
    whole = {"input_ids": ids, "attention_mask": mask}
    kept = {} if cache is None else {CACHE_ARGUMENT: cache}
    if way == "all tokens":
        return greedy(model, whole, count, **kept)
    if way == "chunks":
        return greedy(model, whole, count, **kept, prefill_chunk_size=CHUNK)
    uncached = ids[:, 0 if cache is None else cache.get_seq_length() :]
    if way == "new tokens":
        return greedy(model, {"input_ids": uncached, "attention_mask": mask}, count, **kept)
    return hand_written(model, uncached, count, cache=cache, mask=mask, chunk=CHUNK if way == "loop in chunks" else 0)


def chat(
    model: Any, first: dict[str, Tensor], later: Sequence[Tensor], way: str, *, cache: Any = None, count: int = 12
) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Hold a conversation in one way from its first turn on; return each turn's tokens and logits, and the cache.

    Args:
        model: the model.
        first: `input_ids` and `attention_mask` of the first prompt.
        later: [B, n] token ids of each later prompt.
        way: see `turn`.
        cache: an empty one, or None for the one that the model makes.
        count: tokens to generate in each turn.
    """
    ids, mask = first["input_ids"], first["attention_mask"]
    answers = []
    for new in (None, *later):
        if new is not None:
            given = torch.cat((answers[-1][0], new), dim=1)
            ids, mask = torch.cat((ids, given), dim=1), torch.cat((mask, torch.ones_like(given)), dim=1)
        tokens, logits, cache = turn(model, ids, mask, cache, way, count)
        answers.append((tokens, logits))
    return answers, cache
