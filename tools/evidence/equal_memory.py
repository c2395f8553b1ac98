"""Divergence at equal bytes stored: every method at the largest budget that stores at most a share of the cache."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from rocketkv.budget import METHODS as LIBRARY
from rocketkv.config import RocketKVConfig
from rocketkv.core.index import index_of

from .measure import METHODS, PRESS, SHORT, Setting, divergence_study
from .studies import Study

SHARES = (2, 4, 8)  # of a full cache: one half, one quarter, one eighth
_ITEMSIZE = 2  # bytes of a key's channel, as on a GPU


def stored_bytes(method: str, token_budget: int, head_dim: int) -> int:
    """Return the bytes of keys, values and index that a KV head stores after a prompt of 4096 tokens.

    Spare capacity for generated tokens is not counted.
    """
    split = RocketKVConfig(method=method, token_budget=token_budget).split_for(SHORT, head_dim)
    tokens, index = min(split.kept_tokens or SHORT, SHORT), index_of(split)
    return 2 * tokens * head_dim * _ITEMSIZE + (index.row_bytes(tokens, head_dim, _ITEMSIZE) if index else 0)


def budgets_of(method: str, head_dim: int) -> dict[int, int]:
    """Return a method's largest budget, a multiple of four, by share: 2 for half of a full cache.

    A share within which no budget of the method fits is left out.
    """
    if method == PRESS:
        return {share: SHORT // share for share in SHARES}
    config = RocketKVConfig(method=method)
    least = LIBRARY[method].least_budget(config.window_size, config.decode_reserve)
    found = {}
    for share in SHARES:
        limit = 2 * SHORT * head_dim * _ITEMSIZE // share
        within = [t for t in range(-(-least // 4) * 4, SHORT, 4) if stored_bytes(method, t, head_dim) <= limit]
        if within:
            found[share] = max(within)
    return found


def equal_memory_studies(folder: Path, setting: Setting, head_dim: int, kvpress_python: str | None) -> dict[str, Study]:
    """Return a study for each method, and for a press where there is a Python with kvpress."""
    methods: dict[str, str | None] = dict.fromkeys(METHODS)
    if kvpress_python is not None:
        methods[PRESS] = kvpress_python
    studies = {}
    for method, python in methods.items():
        budgets = tuple(budgets_of(method, head_dim).values())
        if not budgets:
            continue
        name = "equal-memory-" + method.removeprefix("kvpress:").replace("+", "-plus")
        studies[method] = divergence_study(folder / name, setting, (method,), budgets, python)
    return studies


def equal_memory(results: dict[str, dict[str, Any]], head_dim: int) -> dict[str, Any]:
    """Return budget and mean KL of each method and share, from the results of the methods' studies."""
    found: dict[str, Any] = {}
    for method, result in results.items():
        by_budget: dict[int, list[float]] = {}
        for cell in result["cells"]:
            by_budget.setdefault(cell["budget"], []).append(fmean(cell["kl"]))
        found[method] = {
            str(share): {"budget": budget, "kl": fmean(by_budget[budget])}
            for share, budget in budgets_of(method, head_dim).items()
        }
    return found
