"""The picture above the fold: divergence and needles against the bytes that each method stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measure import ARMS, BUDGETS, FULL, METHODS, SHORT
from .tables import title

COLORS = {"rocketkv+": "#c2410c", "rocketkv": "#1d4ed8", "snapkv": "#6b7280", "streaming": "#a3a3a3"}


def draw(evidence: dict[str, Any], path: Path) -> None:
    """Draw KL and needles against the bytes stored after 4096 tokens, as an SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "rocketkv", "font.family": "sans-serif", "font.size": 10})
    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    stored = {arm: cost["stored"] for arm, cost in evidence["bytes"][str(SHORT)]["arms"].items()}
    mean = evidence["divergence"]["mean"]
    for method in METHODS:
        arms = [f"{method}:{budget}" for budget in BUDGETS]
        xs, ys = [stored[arm] for arm in arms], [mean[arm] for arm in arms]
        left.plot(xs, ys, "o-", color=COLORS[method], label=method)
        for arm, x, y in zip(arms, xs, ys, strict=True):
            left.annotate(arm.rpartition(":")[2], (x, y), (4, 4), textcoords="offset points", fontsize=8)
    left.set(xscale="log", yscale="log", ylabel="KL to the full cache, nats (less is better)")
    left.legend(frameon=False)
    needles = evidence["needle"]["lengths"][str(SHORT)]
    for arm in ARMS["needle"][1:]:
        method, _, budget = arm.rpartition(":")
        score, (low, high) = needles["score"][arm], needles["interval"][arm]
        right.errorbar(stored[arm], score, [[score - low], [high - score]], fmt="o", color=COLORS[method], capsize=3)
        right.annotate(f"{method} {budget}", (stored[arm], score), (6, -12), textcoords="offset points", fontsize=8)
    right.axhline(needles["score"][FULL], color="#111827", linewidth=1, linestyle="--")
    place = (1, needles["score"][FULL])
    right.annotate("full cache", place, (-2, 4), textcoords="offset points", fontsize=8, ha="right")
    right.set(xscale="log", xlim=(0.05, 1.05), ylim=(-3, 110))
    right.set_ylabel(f"numbers found, of {needles['prompts']} (more is better)")
    for axes in (left, right):
        axes.set_xlabel(f"bytes stored after {SHORT:,} tokens, of a full cache")
        axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["1/20", "1/10", "1/5", "1/2", "1"])
        axes.minorticks_off()
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(evidence), fontsize=10)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
