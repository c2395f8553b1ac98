"""The picture above the fold: divergence and bytes stored against the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measure import BUDGETS, METHODS, PRESS, SHORT
from .tables import title

COLORS = {"rocketkv+": "#c2410c", "rocketkv": "#1d4ed8", "snapkv": "#6b7280", PRESS: "#15803d"}


def draw(evidence: dict[str, Any], path: Path) -> None:
    """Draw KL and bytes stored after 4096 tokens against the budget, as an SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "rocketkv", "font.family": "sans-serif", "font.size": 10})
    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    mean, costs = evidence["divergence"]["mean"], evidence["bytes"][str(SHORT)]["arms"]
    for method in (*METHODS, PRESS):
        arms = [f"{method}:{budget}" for budget in BUDGETS]
        for axes, values in ((left, mean), (right, {arm: cost["stored"] for arm, cost in costs.items()})):
            if set(arms) <= set(values):  # a press is measured only where kvpress is installed, and its bytes are not
                axes.plot(BUDGETS, [values[arm] for arm in arms], "o-", color=COLORS[method], label=method)
    left.set(yscale="log", title=f"KL to the full cache, nats, after {SHORT:,} tokens: less is better")
    left.legend(frameon=False)
    right.axhline(1, color="#111827", linewidth=1, linestyle="--")
    right.annotate("full cache", (BUDGETS[0], 1), (0, 4), textcoords="offset points", fontsize=9)
    right.set(ylim=(0, 1.1), title="bytes stored, of a full cache: less is better")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="budget: tokens whose bytes a decode step reads")
        axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        axes.title.set_fontsize(10)
        axes.minorticks_off()
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(evidence), fontsize=10)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
