"""The arms and the tasks that a report compares, and what they are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...budget import METHODS
from ...config import RocketKVConfig
from ..records import CellDict, Record, canonical, label

FULL = "full"

ColumnKey = tuple[str, tuple[tuple[str, Any], ...], str, bool]  # task, what tells its versions apart, metric, direction
_CONFIG_FIELDS = {field.name for field in dataclasses.fields(RocketKVConfig)}
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Arm:
    """A method at a budget.

    Attributes:
        method: its name.
        token_budget: in tokens; None for `full`.
        settings: those that tell it from other arms of this method and budget, as text.
    """

    method: str
    token_budget: int | None
    settings: str = ""

    @property
    def name(self) -> str:
        """How it is called in tables."""
        name = label({"method": self.method, "token_budget": self.token_budget})
        return f"{name} ({self.settings})" if self.settings else name

    @property
    def adapter(self) -> bool:
        """Whether another program does the work, and not this library's parts."""
        return self.method not in METHODS

    @property
    def order(self) -> tuple[int, str, int, str]:
        """Library's methods first, in their order, then adapters; budgets rising."""
        place = list(METHODS).index(self.method) if self.method in METHODS else len(METHODS)
        return place, self.method, self.token_budget or 0, self.settings


def grouped(records: Iterable[Record], key: Callable[[Record], _Key]) -> dict[_Key, list[Record]]:
    """Return records by a key, in the order of their coming."""
    groups: dict[_Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def arms_of(records: Sequence[Record]) -> list[Arm]:
    """Return each record's arm.

    Settings are part of an arm's name only where one task has several of its method and budget: some differ from task
    to task, as the reserve for generated tokens does.
    """
    differing: dict[tuple[str, int | None], set[str]] = {}
    for (_, _, method, budget), members in grouped(records, _twin_key).items():
        found = [_settings(record["cell"]) for record in members]
        names = {name for settings in found for name in settings}
        apart = {name for name in names if len({canonical(settings.get(name)) for settings in found}) > 1}
        differing.setdefault((method, budget), set()).update(apart)
    arms = []
    for record in records:
        cell = record["cell"]
        shown = sorted(differing[cell["method"], cell["token_budget"]])
        settings = _settings(cell)
        text = ", ".join(f"{name}={settings.get(name, 'default')}" for name in shown)
        arms.append(Arm(cell["method"], cell["token_budget"], text))
    return arms


def with_metrics(records: Sequence[Record]) -> list[Record]:
    """Return records, those out of memory with the metric of their task, which they do not know themselves."""
    known = {_task(record): record for record in reversed(records) if record["status"] == "complete"}
    found: list[Record] = []
    for record in records:
        other = known.get(_task(record), record)
        metric, direction = other["metric"], other["higher_is_better"]
        found.append(
            record if record["status"] == "complete" else record | {"metric": metric, "higher_is_better": direction}
        )
    return found


def _task(record: Record) -> tuple[str, int]:
    return record["cell"]["task"], record["cell"]["task_version"]


def column_key(record: Record) -> ColumnKey:
    """Return what records must share to be compared: task, version, prompt and metric."""
    cell = record["cell"]
    kind = (
        ("version", cell["task_version"]),
        ("chat", cell["chat"]),
        ("answer", cell["max_new_tokens"]),
        ("seed", cell["seed"]),
    )
    return cell["task"], kind, record["metric"], record["higher_is_better"]


def _twin_key(record: Record) -> tuple[ColumnKey, int | None, str, int | None]:
    cell = record["cell"]
    return column_key(record), cell["length"], cell["method"], cell["token_budget"]


def column_names(keys: Sequence[ColumnKey]) -> list[str]:
    """Return the tasks' names, with what tells those of one name apart."""
    names = []
    for task, kind, metric, _ in keys:
        alike = [key for key in keys if key[0] == task]
        apart = [f"{name} {value}" for name, value in kind if len({dict(other[1])[name] for other in alike}) > 1]
        if len({other[2] for other in alike}) > 1:
            apart.append(metric)
        names.append(f"{task} ({', '.join(apart)})" if apart else task)
    return names


def _settings(cell: CellDict) -> dict[str, Any]:
    """Return a cell's settings; those of compression mean nothing to a full cache."""
    full = cell["method"] == FULL
    return {name: value for name, value in cell["settings"].items() if not (full and name in _CONFIG_FIELDS)}
