"""Records and tables of a report."""

from __future__ import annotations

from typing import Any

from made_records import made_record
from rocketkv.eval.records import CostDict, Record


def made_arms() -> list[Record]:
    """Return three tasks: `a` and `b` have scores, `kl` a distance; quest is out of memory on `b`, snapkv has none."""
    cost: CostDict = {"kv_bytes": 1000.0, "full_kv_bytes": 1000.0, "step_seconds": 0.010, "step_bytes": 800.0}
    less: CostDict = {"kv_bytes": 250.0, "full_kv_bytes": 1000.0, "step_seconds": 0.005, "step_bytes": 80.0}
    rocket: dict[str, Any] = {"method": "rocketkv", "token_budget": 512, "cost": less}
    snap: dict[str, Any] = {"method": "snapkv", "token_budget": 512, "cost": less}
    quest: dict[str, Any] = {"method": "quest", "token_budget": 512, "cost": less}
    far: dict[str, Any] = {"task": "kl", "metric": "KL, nats", "higher_is_better": False}
    return [
        made_record([100, 0, 100, 100], task="a", cost=cost, interval=[30.1, 95.4]),  # 75
        made_record([100, 0, 0, 100], task="a", **rocket),  # 50: -25
        made_record([0, 100, 0], task="a", ids=["0001", "0002", "0003"], **snap),  # 33.3; on those, full has 66.7
        made_record([100, 0, 100, 100], task="a", **quest),
        made_record([50, 100], task="b", cost=cost),  # 75
        made_record([40, 80], task="b", **rocket),  # 60: -15
        made_record([0, 0], task="b", status="out_of_memory", **quest),
        made_record([0, 0, 0], cost=cost, values={"perplexity": 8.0}, **far),
        made_record([0.25, 0.5, 0.75], values={"perplexity": 9.0}, **far, **rocket),
    ]


def cells(markdown: str, title: str) -> dict[str, list[str]]:
    """Return the rows of the Markdown table below a title, by their first cell."""
    body = markdown.split(f"### {title}")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("--")}
