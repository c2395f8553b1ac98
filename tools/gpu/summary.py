"""Fill the table of docs/kernels.md and docs/gpu.json from the records of the stages."""

import json
from collections.abc import Mapping
from typing import Any

from rocketkv.eval.records import write_atomically

from .plan import METHODS, ROOT

PAGE, FIGURES = ROOT / "docs" / "kernels.md", ROOT / "docs" / "gpu.json"
BEGIN, END = "<!-- gpu -->\n", "<!-- end -->"
UNKNOWN = "not measured"
KEPT = ("status", "code", "seconds", "absent", "without", "error", "tail", "result")


def _case(records: Mapping[str, Any], stage: str, case: str) -> dict[str, Any] | None:
    """Return a benchmark's result for a case, or None where it was not measured."""
    result = records.get(stage, {}).get("result") or {}
    found: dict[str, Any] | None = next((one for one in result.get("cases", ()) if one["case"] == case), None)
    return found


def _times(records: Mapping[str, Any], stage: str, case: str, method: str) -> str:
    found = _case(records, stage, case)
    ratio = None if found is None else found["speedup"].get(method)
    if found is None or ratio is None:
        return UNKNOWN
    return f"{ratio['median']:.1f} ({ratio['min']:.1f}-{ratio['max']:.1f}), {found['best_dense']}"


def _microseconds(records: Mapping[str, Any], method: str) -> str:
    result = records.get("bench-kernels", {}).get("result") or {}
    cases = [one for one in result.get("cases", ()) if one["batch"] == 1 and one["token_budget"] <= 1024]
    found = {one["case"]: one["microseconds"][method]["median"] for one in cases}
    slowest = max(found, key=found.__getitem__, default=None)
    return UNKNOWN if slowest is None else f"{found[slowest]:.1f} us at most ({slowest})"


def _share(records: Mapping[str, Any], method: str) -> str:
    found = _case(records, "bench-kernels", "32x8192/1024")
    return UNKNOWN if found is None else f"{found['share_of_copy'][method]['median']:.0%}"


def _first_token(records: Mapping[str, Any], case: str, method: str) -> str:
    found = _case(records, "bench-model", case)
    times = {} if found is None else found["first_token"]
    if method not in times:
        return UNKNOWN
    beside = f", stock {times['stock']['median']:.0f} ms" if "stock" in times else ""
    return f"{times[method]['median']:.0f} ms{beside}"


def table(records: Mapping[str, Any]) -> str:
    """Return the table of goals and figures, with the device under it."""
    kernels, model = "bench-kernels", "bench-model"
    rows: list[tuple[str, str, dict[str, str]]] = []
    for stage, label, case, goal in (
        (kernels, "attention, batch 1, 32K tokens, budget 1024, over the best dense", "1x32768/1024", "4 times"),
        (kernels, "attention, batch 1, 128K, 1024", "1x131072/1024", "14 times"),
        (kernels, "attention, batch 8, 32K, 1024", "8x32768/1024", "10 times"),
        (model, "tokens/s of an 8B model, batch 1, 128K", "1x131072/1024", "1.8 times"),
        (model, "tokens/s of an 8B model, batch 8, 32K", "8x32768/1024", "2.4 times"),
    ):
        rows.append((label, goal, {method: _times(records, stage, case, method) for method in METHODS}))
    layer = ("a layer and step, batch 1, budgets up to 1024", "12 us", {m: _microseconds(records, m) for m in METHODS})
    rows.insert(3, layer)
    rows.insert(4, ("share of the copy bandwidth, batch 32", "60 %", {m: _share(records, m) for m in METHODS}))
    for name, case in (("32K", "1x32768/1024"), ("128K", "1x131072/1024")):
        rows.append((f"first token of an 8B model, {name}", "", {m: _first_token(records, case, m) for m in METHODS}))
    lines = ["| | goal, `rocketkv` | `rocketkv` | `rocketkv+` |", "|--|--|--|--|"]
    lines += [f"| {label} | {goal} | {' | '.join(got.values())} |" for label, goal, got in rows]
    result = records.get(kernels, {}).get("result") or records.get(model, {}).get("result")
    if result is None:
        lines += ["", "Nothing has been measured on a GPU so far."]
    else:
        device, versions = result["device"], result["versions"]
        named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        lines += ["", f"{device['name']}, driver {device.get('driver')}; {named}."]
    failed = {name: record["status"] for name, record in records.items() if record["status"] != "passed"}
    if failed:
        said = ", ".join(f"{name} ({status})" for name, status in failed.items())
        lines += ["", f"Stages of `make gpu` that did not pass: {said}."]
    return "\n".join(lines)


def with_table(text: str, records: Mapping[str, Any]) -> str:
    """Return the page with the table between its markers.

    Raises:
        ValueError: the page has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"docs/kernels.md has no markers {BEGIN.strip()!r} and {END!r} on lines of their own")
    return f"{before}{begin}{table(records)}\n{end}{after}"


def figures(records: Mapping[str, Any]) -> str:
    """Return the records as JSON, without paths of the machine."""
    kept = {name: {key: record[key] for key in KEPT if key in record} for name, record in records.items()}
    return json.dumps(kept, indent=1).replace(str(ROOT), ".") + "\n"


def write_documents(records: Mapping[str, Any]) -> None:
    """Write the page and the figures."""
    write_atomically(PAGE, with_table(PAGE.read_text(encoding="utf-8"), records))
    write_atomically(FIGURES, figures(records))
