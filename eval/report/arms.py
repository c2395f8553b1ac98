"""The arms (a method at a budget) and the task columns that a report compares, and their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...budget import METHODS
from ...config import RocketKVConfig
from ..records import CellDict, Record, canonical, label

FULL = "full"
DENSE, COMPILED = "dense", "compiled:"  # names of measures/arms.py, whose imports are heavy
ADAPTER = "†"
MODES = {"aware": "query-aware", "agnostic": "query-agnostic"}

ColumnKey = tuple[str, tuple[tuple[str, Any], ...], str, bool]  # task, version and prompt settings, metric, direction
_CONFIG_FIELDS = {field.name for field in dataclasses.fields(RocketKVConfig)}
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Arm:
    """A method at a budget.

    Attributes:
        method: the method's name.
        token_budget: in tokens; None for `full`.
        settings: as text, those that differ from other arms of this method and budget.
    """

    method: str
    token_budget: int | None
    settings: str = ""

    @property
    def name(self) -> str:
        """The arm's name in tables; a dagger marks an adapter."""
        name = label({"method": self.method, "token_budget": self.token_budget})
        name = f"{name} ({self.settings})" if self.settings else name
        return f"{name} {ADAPTER}" if self.adapter else name

    @property
    def adapter(self) -> bool:
        """Whether another program runs the method, not this library or the stock model."""
        return self.method not in METHODS and not self.latency_alone

    @property
    def latency_alone(self) -> bool:
        """Whether the method runs in the task `latency` alone."""
        return self.method == DENSE or self.method.startswith(COMPILED)

    @property
    def order(self) -> tuple[int, bool, str, int, str]:
        """Sort key: the library's methods first, in their order, then others; budgets ascending."""
        place = list(METHODS).index(self.method) if self.method in METHODS else len(METHODS)
        place = 0 if self.method == DENSE else place  # after the full cache
        return place, self.method != FULL, self.method, self.token_budget or 0, self.settings


def length_text(length: int | None) -> str:
    """Return the name of a length."""
    return "the data's own lengths" if length is None else f"{length} tokens"


def grouped(records: Iterable[Record], key: Callable[[Record], _Key]) -> dict[_Key, list[Record]]:
    """Group records by a key; groups and members keep the order of the records."""
    groups: dict[_Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def arms_of(records: Sequence[Record]) -> list[Arm]:
    """Return the arm of each record.

    Settings become part of a name only if one task has several arms of the same method and budget: some settings, such
    as the decode reserve, differ between tasks.
    """
    differing: dict[tuple[str, int | None], set[str]] = {}
    for (_, _, method, budget), members in grouped(records, _same_name_key).items():
        every = [_settings(record["cell"]) for record in members]
        names = {name for settings in every for name in settings}
        several = {name for name in names if len({canonical(settings.get(name)) for settings in every}) > 1}
        differing.setdefault((method, budget), set()).update(several)
    arms = []
    for record in records:
        cell = record["cell"]
        settings = _settings(cell)
        shown = sorted(differing[cell["method"], cell["token_budget"]])
        text = ", ".join(f"{name}={settings.get(name, 'default')}" for name in shown)
        arms.append(Arm(cell["method"], cell["token_budget"], text))
    return arms


def with_metrics(records: Sequence[Record]) -> list[Record]:
    """Copy metric and direction from complete records of a task to those that ran out of memory, which lack them."""
    known = {_task(record): record for record in reversed(records) if record["status"] == "complete"}

    def named(record: Record) -> Record:
        other = known.get(_task(record), record)
        result: Record = record | {"metric": other["metric"], "higher_is_better": other["higher_is_better"]}
        return result

    return [record if record["status"] == "complete" else named(record) for record in records]


def _task(record: Record) -> tuple[str, int]:
    return record["cell"]["task"], record["cell"]["task_version"]


def column_key(record: Record) -> ColumnKey:
    """Return the task, version, prompt settings and metric, which comparable records share."""
    cell = record["cell"]
    kind = (
        ("version", cell["task_version"]),
        ("chat", cell["chat"]),
        ("answer", cell["max_new_tokens"]),
        ("seed", cell["seed"]),
        ("answers", cell.get("answers", 1)),
        ("batch", cell.get("batch_size", 1)),
    )
    return cell["task"], kind, record["metric"], record["higher_is_better"]


def _same_name_key(record: Record) -> tuple[ColumnKey, int | None, str, int | None]:
    cell = record["cell"]
    return column_key(record), cell["length"], cell["method"], cell["token_budget"]


def column_names(keys: Sequence[ColumnKey]) -> list[str]:
    """Return the names of the tasks; tasks of one name get their differences in parentheses."""
    names = []
    for task, kind, metric, _ in keys:
        same = [key for key in keys if key[0] == task]
        differences = [f"{name} {value}" for name, value in kind if len({dict(other[1])[name] for other in same}) > 1]
        if len({other[2] for other in same}) > 1:
            differences.append(metric)
        names.append(f"{task} ({', '.join(differences)})" if differences else task)
    return names


def _settings(cell: CellDict) -> dict[str, Any]:
    """Return a cell's settings, for `full` without those of compression."""
    full = cell["method"] == FULL
    return {name: value for name, value in cell["settings"].items() if not (full and name in _CONFIG_FIELDS)}
