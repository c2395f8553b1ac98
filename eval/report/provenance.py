"""Code, machines and data that records come from, and warnings where these differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..records import Record
from .arms import grouped

_MOST_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of records.

    Attributes:
        facts: name and values; several values come with their numbers of records.
        warnings: differences that make figures hard to compare.
    """

    facts: tuple[tuple[str, tuple[str, ...]], ...]
    warnings: tuple[str, ...]


def provenance(records: Sequence[Record], quarantined: Sequence[str] = ()) -> Provenance:
    """Return the origin of records; `quarantined` names damaged files that a run has put aside."""
    origins = [record["provenance"] for record in records]
    hardware = list(map(machine, records))
    packages = sorted({name for origin in origins for name in origin["versions"]})
    created = [origin["created"] for origin in origins]
    facts = [
        ("Records", (str(len(records)),)),
        ("Out of memory", (str(sum(record["status"] == "out_of_memory" for record in records)),)),
        ("Failed", (str(sum(record["status"] == "failed" for record in records)),)),
        ("Created", tuple(dict.fromkeys((min(created), max(created))))),
        ("rocketkv", _counted(origin["rocketkv"] for origin in origins)),
        ("Git commit", _counted(origin["git_hash"] or "unknown" for origin in origins)),
        *((name, _counted(origin["versions"].get(name, "unknown") for origin in origins)) for name in packages),
        ("Hardware", _counted(hardware)),
        ("Seed", _counted(str(record["cell"]["seed"]) for record in records)),
        ("Chat template", _counted("with" if record["cell"]["chat"] else "without" for record in records)),
    ]
    warnings = []
    if quarantined:
        names = ", ".join(quarantined[:_MOST_NAMES]) + ", …" * (len(quarantined) > _MOST_NAMES)
        warnings.append(f"Damaged files were put aside, and what they held was made again: {names}.")
    if len(set(hardware)) > 1:
        warnings.append("Records come from different machines: their times and memory stand in a table each.")
    if len({(origin["rocketkv"], origin["git_hash"], _text(origin["versions"])) for origin in origins}) > 1:
        warnings.append("Records come from different versions of the code or of the packages it runs on.")
    if len({(record["cell"]["model"], record["cell"]["weights"]) for record in records}) > len(
        {record["cell"]["model"] for record in records}
    ):
        warnings.append("Records under one name of a model come from different weights.")
    for task, members in sorted(grouped(records, lambda record: record["cell"]["task"]).items()):
        complete = [record for record in members if record["status"] == "complete"]  # others lack their data's hash
        facts.append((f"Data of {task}", _counted(map(_data, complete)) or ("unknown",)))
        if len({record["cell"]["task_version"] for record in members}) > 1:
            warnings.append(f"Records of {task} are of different versions of the task; those are not compared.")
        if any(len(set(map(_data, same))) > 1 for same in grouped(complete, _data_key).values()):
            warnings.append(f"Records of {task} at one length were made from different data.")
    return Provenance(facts=tuple(facts), warnings=tuple(warnings))


def machine(record: Record) -> str:
    """Return the hardware that a record was made on."""
    return _text(record["provenance"]["hardware"])


def _data(record: Record) -> str:
    notes = {
        f"{name} {sample['notes'][name]}"
        for sample in record["samples"]
        for name in ("template", "haystack", "text")
        if name in sample["notes"]
    }
    return ", ".join([record["data"]["sha256"][:12], record["data"]["source"], *sorted(notes)])


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
    """Return the distinct values, most frequent first, with their counts if there are several."""
    counts = Counter(names).most_common()
    return tuple(f"{name} ({count} records)" if len(counts) > 1 else name for name, count in counts)
