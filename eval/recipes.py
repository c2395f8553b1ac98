"""Recipes of `rocketkv eval run`: sweeps by name. A YAML file and flags override their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PAPER = ("full", "rocketkv", "snapkv", "quest", "sparq", "exact-topk")
_OURS = ("full", "rocketkv+", "rocketkv", "snapkv")
_PAPER_BUDGETS = (256, 512, 1024, 2048)
# The paper's split counts the tokens that will be generated: tasks by the largest number of them.
_LONGBENCH = {
    32: ("hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count", "passage_retrieval_en"),
    64: ("multifieldqa_en", "trec", "lcc", "repobench-p"),
    128: ("narrativeqa", "qasper", "samsum"),
    512: ("gov_report", "qmsum", "multi_news"),
}
_RULER = {
    30: ("vt",),
    32: ("qa_1", "qa_2"),
    50: ("fwe",),
    120: ("cwe",),
    128: (
        *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A sweep by name.

    Attributes:
        name: of the flag.
        purpose: what it measures.
        parts: fields of `Plan`, of one sweep after the other into one folder of results.
    """

    name: str
    purpose: str
    parts: tuple[Mapping[str, Any], ...]


_QUICK = {"methods": _OURS, "budgets": (64, 256), "lengths": (2048,), "max_new_tokens": 16}
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="quick",
            purpose="needles and KL at 2K, query-aware and query-agnostic: minutes on a CPU with SmolLM2",
            parts=(
                {**_QUICK, "tasks": ("needle_grid", "niah_single_1"), "samples": 4},
                {**_QUICK, "tasks": ("kl",), "samples": 2},
                {**_QUICK, "tasks": ("needle_grid",), "samples": 4, "agnostic": True},
            ),
        ),
        Recipe(
            name="paper",
            purpose="the grid of the RocketKV paper: LongBench, RULER at 16K to 96K, SCBench in both modes",
            parts=(
                *(
                    {
                        "tasks": tasks, "lengths": (127500,), "samples": 500, "methods": _PAPER,
                        "budgets": _PAPER_BUDGETS, "settings": {"decode_reserve": reserve},
                    }
                    for reserve, tasks in _LONGBENCH.items()
                ),
                *(
                    {
                        "tasks": tasks, "lengths": (16000, 32000, 64000, 96000), "samples": 50, "methods": _PAPER,
                        "budgets": _PAPER_BUDGETS, "chat": True, "settings": {"decode_reserve": reserve},
                    }
                    for reserve, tasks in _RULER.items()
                ),
                *(
                    {
                        "tasks": ("scbench",), "lengths": (131072,), "samples": 100, "agnostic": agnostic,
                        "methods": ("full", "rocketkv-mt", "rocketkv", "snapkv"), "budgets": (1024, 2048, 4096),
                        "settings": {"window_size": 128},
                    }
                    for agnostic in (False, True)
                ),
            ),
        ),
        Recipe(
            name="ruler",
            purpose="the 13 tasks of RULER at 4K to 32K",
            parts=(
                {
                    "tasks": ("ruler",), "lengths": (4096, 8192, 16384, 32768), "samples": 50, "methods": _OURS,
                    "budgets": (256, 1024),
                },
            ),
        ),
        Recipe(
            name="reasoning",
            purpose="AIME 2024 and 2025 (avg@8) and MATH-500 with thinking, sampled by the model's card",
            parts=tuple(
                {
                    "tasks": tasks,
                    "answers": answers,
                    "samples": 500,
                    "methods": _OURS,
                    "budgets": (512, 2048),
                    "thinking_tokens": 32768,
                    "generation": "card",
                }
                for tasks, answers in ((("aime24", "aime25"), 8), (("math500",), 1))
            ),
        ),
        Recipe(
            name="long-output",
            purpose="long procedures, whose answers fill much of 4K and 8K tokens",
            parts=(
                {
                    "tasks": ("longproc",), "lengths": (4096, 8192), "samples": 20, "methods": (*_OURS, "streaming"),
                    "budgets": (256, 1024),
                },
            ),
        ),
    )
}  # fmt: skip
