"""The ablation's records, brought together: a JSON document, and a Markdown table for each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rocketkv.eval.intervals import ratio_interval
from rocketkv.eval.measures.kl import Window
from rocketkv.eval.records import digest

from .arms import BY_NAME
from .run import RecordDict

BASELINE = "rocketkv"


def ratio(values: Sequence[float], reference: Sequence[float]) -> tuple[float, list[float] | None]:
    """Return the ratio of two means over the same texts, and its 95 % interval, or None for a single text.

    Raises:
        ValueError: the two differ in length or are empty.
    """
    interval = ratio_interval(values, reference)
    return fmean(values) / fmean(reference), None if interval is None else list(interval)


def text_errors(record: RecordDict) -> list[float]:
    """Return an arm's attention error on each text: mean over layers and KV heads."""
    return [fmean(error for layer in text for error in layer) for text in record["errors"]]


def summary(record: RecordDict, baseline: RecordDict | None) -> dict[str, Any]:
    """Return an arm's figures and their ratios to the baseline's."""
    errors = text_errors(record)
    found: dict[str, Any] = {
        "mean_kl": None if record["kl"] is None else fmean(record["kl"]),
        "mean_error": fmean(errors),
        "bytes_ratio": record["step_bytes"] / record["target_bytes"],
    }
    if baseline is not None:
        if record["kl"] is not None and baseline["kl"] is not None:
            found["kl_ratio"], found["kl_interval"] = ratio(record["kl"], baseline["kl"])
        found["error_ratio"], found["error_interval"] = ratio(errors, text_errors(baseline))
    return found


def document(windows: Sequence[Window], records: Sequence[RecordDict]) -> dict[str, Any]:
    """Return texts and arms as plain numbers."""
    baselines = {record["budget"]: record for record in records if record["arm"] == BASELINE}
    return {
        "texts": [{"id": window.id, "sha256": digest(window.ids), "notes": window.notes} for window in windows],
        "arms": [{**record, **summary(record, baselines.get(record["budget"]))} for record in records],
    }


def tables(result: Mapping[str, Any]) -> str:
    """Return a Markdown table for each budget of a document."""
    settings, names = result["settings"], [text["id"] for text in result["texts"]]
    heads = "" if settings["joined"] == 1 else f", {settings['joined']} KV heads joined to one"
    heads += ", KV heads of a layer as one" if settings["multi_query"] else ""
    about = f"{len(names)} texts ({', '.join(names)}) of {settings['prompt']} tokens, {settings['steps']} steps"
    lines = [f"{settings['model']}{heads}; {about}"]
    with_kl = settings["joined"] == 1
    for budget in dict.fromkeys(arm["budget"] for arm in result["arms"]):
        kl_head = "KL | of `rocketkv`'s | " if with_kl else ""
        lines += ["", f"### t = {budget}", "", f"| arm | | N | k | bytes | {kl_head}error | of `rocketkv`'s |"]
        lines.append("|--|--|--|--|--|--|--|--|--|" if with_kl else "|--|--|--|--|--|--|--|")
        for arm in result["arms"]:
            if arm["budget"] == budget:
                lines.append(_row(arm, with_kl))
    return "\n".join(lines) + "\n"


def _row(arm: Mapping[str, Any], with_kl: bool) -> str:
    known = BY_NAME.get(arm["arm"])
    free = known is not None and known.fitted is None and arm["arm"] != BASELINE
    k = arm["split"]["top_k"]
    cells = [
        f"`{arm['arm']}`",
        "" if known is None else known.what,
        str(arm["stored"]),
        "all" if k is None else str(k),
        f"({arm['bytes_ratio']:.2f})" if free else f"{arm['bytes_ratio']:.3f}",
    ]
    if with_kl:
        cells += [f"{arm['mean_kl']:.4f}", _ratio(arm.get("kl_ratio"), arm.get("kl_interval"))]
    cells += [f"{arm['mean_error']:.4f}", _ratio(arm.get("error_ratio"), arm.get("error_interval"))]
    return f"| {' | '.join(cells)} |"


def _ratio(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"
