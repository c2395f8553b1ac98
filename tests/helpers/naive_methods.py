"""The parts of every method as plain loops, which share no code with the library."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PROMPT, STEPS, BUDGET, WINDOW, KERNEL = 190, 12, 32, 8, 7

H, HKV, D = 6, 2, 16

SCALING = D**-0.5


@dataclass
class Head:
    """One KV head and its G query heads: every query [tokens, G, D], key and value [tokens, D], in float64."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    reserve: int

    def logits(self, at: int, tokens: list[int]) -> Tensor:
        """Return the logits [G, len(tokens)] of the queries of token `at`."""
        return self.queries[at] @ self.keys[tokens].T * SCALING

    def attend(self, at: int, tokens: list[int]) -> Tensor:
        return self.logits(at, tokens).softmax(-1) @ self.values[tokens]


def best(scores: list[float], n: int) -> list[int]:
    """Return the places of the n largest, the lowest place first among equals."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n])


def snap(head: Head, kept: int, end: int = PROMPT, *, value_aware: bool = False, ahead: int = KERNEL // 2) -> list[int]:
    """Stage 1: the window before `end`, and the tokens before it that it attends to most, after max-pooling.

    Value-aware, a token counts by how far its value is from the mean that they attend to. A pool ends `ahead` tokens
    after its own.
    """
    before = end - WINDOW
    scores = torch.zeros(before, dtype=torch.float64)
    for at in range(before, end):
        scores += head.logits(at, list(range(at + 1))).softmax(-1)[:, :before].sum(0)
    if value_aware:
        out = scores @ head.values[:before] / scores.sum()
        scores *= (head.values[:before] - out).norm(dim=-1)
    pooled = [float(scores[max(0, i + ahead + 1 - KERNEL) : i + ahead + 1].max()) for i in range(before)]
    return best(pooled, kept - WINDOW) + list(range(before, end))


def sparse(head: Head, at: int, stored: list[int], page: int, channels: int, k: int) -> list[int]:
    """Stage 2: the k stored tokens whose pages promise most."""
    queries = head.queries[at]
    chosen = best(queries.abs().sum(0).tolist(), channels)
    rising = (queries.sum(0) > 0).tolist()
    estimate = torch.zeros(len(queries), len(stored), dtype=torch.float64)
    for start in range(0, len(stored), page):
        keys = head.keys[stored[start : start + page]].tolist()
        bounds = {c: (max if rising[c] else min)(key[c] for key in keys) for c in chosen}
        for g, query in enumerate(queries.tolist()):
            share = sum(abs(query[c]) for c in chosen) / sum(abs(q) for q in query)
            promise = sum(query[c] * bounds[c] for c in chosen) * SCALING / math.sqrt(share)
            estimate[g, start : start + page] = promise
    weights = estimate.softmax(-1).mean(0)
    return [stored[i] for i in best(weights.tolist(), k)]
