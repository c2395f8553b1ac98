"""Two more views of records for a report: needles by depth and length, and where everything comes from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from ..records import Record
from .arms import Arm, arms_of, column_key, column_names, grouped, with_metrics

_MOST_DEPTHS = 11  # more are put together in tenths


@dataclass(frozen=True, kw_only=True)
class DepthMap:
    """The scores of a task by the depth of its needle and the length of its prompt.

    Attributes:
        model: its name.
        task: its name, with what tells it from others of that name.
        mode: `aware` or `agnostic`.
        arms: in order.
        depths: names of the rows, from the start of the context to its end.
        lengths: names of the columns, in tokens.
        cells: mean score and number of samples, or that memory did not suffice, by arm, depth and length.
    """

    model: str
    task: str
    mode: Literal["aware", "agnostic"]
    arms: tuple[Arm, ...]
    depths: tuple[str, ...]
    lengths: tuple[str, ...]
    cells: Mapping[tuple[Arm, str, str], tuple[float, int] | Literal["OOM"]]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where records come from.

    Attributes:
        facts: name and values, each with the number of records it is true of.
        warnings: what makes figures hard to compare.
    """

    facts: tuple[tuple[str, tuple[str, ...]], ...]
    warnings: tuple[str, ...]


def depth_maps(records: Sequence[Record]) -> list[DepthMap]:
    """Return a map for each task whose samples note a `depth`, a share from 0 to 1."""
    parts = grouped(with_metrics(records), lambda r: (r["cell"]["model"], r["cell"]["dtype"], r["cell"]["mode"]))
    maps = []
    for _, part in sorted(parts.items()):
        tasks = grouped(part, column_key)
        keys = sorted(tasks, key=repr)
        for name, key in zip(column_names(keys), keys, strict=True):
            if any(_depths(record) for record in tasks[key]):
                maps.append(_depth_map(name, tasks[key]))
    return maps


def _depths(record: Record) -> list[tuple[float, float]]:
    """Return depth and score of each sample that notes a depth."""
    noted = [(sample["notes"].get("depth"), sample["score"]) for sample in record["samples"]]
    return [(float(d), score) for d, score in noted if isinstance(d, int | float) and 0 <= d <= 1]


def _depth_map(task: str, records: Sequence[Record]) -> DepthMap:
    named = list(zip(arms_of(records), records, strict=True))
    lengths = sorted({record["cell"]["length"] or 0 for record in records})
    exact = {round(depth, 2) for record in records for depth, _ in _depths(record)}
    tenths = len(exact) > _MOST_DEPTHS
    found: dict[tuple[Arm, str, str], list[float]] = {}
    cells: dict[tuple[Arm, str, str], tuple[float, int] | Literal["OOM"]] = {}
    order: dict[str, float] = {}
    for arm, record in named:
        for depth, score in _depths(record):
            start = min(int(depth * 10), 9)
            name = f"{10 * start}-{10 * start + 10} %" if tenths else f"{100 * round(depth, 2):.0f} %"
            order[name] = start / 10 if tenths else round(depth, 2)
            found.setdefault((arm, name, _length_name(record)), []).append(score)
    depths = tuple(sorted(order, key=lambda name: order[name]))
    for arm, record in named:
        if record["status"] == "out_of_memory":
            cells |= {(arm, depth, _length_name(record)): "OOM" for depth in depths}
    cells |= {place: (fmean(scores), len(scores)) for place, scores in found.items()}
    cell = records[0]["cell"]
    return DepthMap(
        model=cell["model"],
        task=task,
        mode=cell["mode"],
        arms=tuple(sorted({arm for arm, _ in named}, key=lambda arm: arm.order)),
        depths=depths,
        lengths=tuple(str(length) if length else "own" for length in lengths),
        cells=cells,
    )


def _length_name(record: Record) -> str:
    return str(record["cell"]["length"] or "own")


def provenance(records: Sequence[Record]) -> Provenance:
    """Return where records come from, and warn of what keeps them from being compared."""
    origins = [record["provenance"] for record in records]
    hardware = [_text(origin["hardware"]) for origin in origins]
    packages = sorted({name for origin in origins for name in origin["versions"]})
    commits = [origin["git_hash"] or "unknown" for origin in origins]
    facts = [
        ("Records", (str(len(records)),)),
        ("Out of memory", (str(sum(record["status"] == "out_of_memory" for record in records)),)),
        ("Made", tuple(dict.fromkeys((min(o["created"] for o in origins), max(o["created"] for o in origins))))),
        ("rocketkv", _counted(origin["rocketkv"] for origin in origins)),
        ("Git commit", _counted(commits)),
        *((name, _counted(origin["versions"].get(name, "unknown") for origin in origins)) for name in packages),
        ("Hardware", _counted(hardware)),
        ("Seed", _counted(str(record["cell"]["seed"]) for record in records)),
        ("Chat template", _counted("with" if record["cell"]["chat"] else "without" for record in records)),
    ]
    warnings = []
    if len(set(hardware)) > 1:
        warnings.append("Records come from different machines: their times and peak memory are not comparable.")
    code = {(origin["rocketkv"], origin["git_hash"], _text(origin["versions"])) for origin in origins}
    if len(code) > 1:
        warnings.append("Records come from different versions of the code or of what it runs on.")
    for task, members in sorted(grouped(records, lambda r: r["cell"]["task"]).items()):
        made = [record for record in members if record["status"] == "complete"]  # others do not know their data
        facts.append((f"Data of {task}", _counted(map(_data, made)) or ("unknown",)))
        if len({record["cell"]["task_version"] for record in members}) > 1:
            warnings.append(f"Records of {task} are of different versions of the task; those are not compared.")
        if any(len({_data(r) for r in same}) > 1 for same in grouped(made, _data_key).values()):
            warnings.append(f"Records of {task} at one length were made from different data.")
    return Provenance(facts=tuple(facts), warnings=tuple(warnings))


def _data(record: Record) -> str:
    made = {
        f"{name} {sample['notes'][name]}"
        for sample in record["samples"]
        for name in ("template", "haystack", "text")
        if name in sample["notes"]
    }
    return ", ".join([record["data"]["sha256"][:12], record["data"]["source"], *sorted(made)])


def _data_key(record: Record) -> tuple[str, int | None, int, bool, int]:
    cell = record["cell"]
    return cell["model"], cell["length"], cell["seed"], cell["chat"], cell["samples"]


def _text(facts: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value, sort_keys=True)}"
        for name, value in sorted(facts.items())
        if value is not None
    )


def _counted(names: Iterable[str]) -> tuple[str, ...]:
    """Return different values, the most frequent first, with their number where there are several."""
    counts = Counter(names).most_common()
    return tuple(f"{name} ({count} records)" if len(counts) > 1 else name for name, count in counts)
