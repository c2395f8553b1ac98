"""`rocketkv eval run --dry-run`: the cells of a sweep, with estimates of time and memory.

Times follow from a probe of the model (`probe.py`) and from the numbers of tokens in a few of the samples; answers
count as long as they may become. Memory is that of weights and caches, by the model's configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from ...budget import METHODS
from ...hf.plan import plan as make_plan
from ...hf.prompts import encode, render
from ..conversation import AGNOSTIC
from ..measures.arms import find_arm
from ..measures.kl import METRIC as KL
from ..measures.kl import STEPS
from ..methods import FULL, Method
from ..prefill import shares_prefill
from ..records import CELLS, CellDict, cell_key, label, read_record
from ..tasks.base import Sample, find_tasks
from .cells import Session, chat_options, is_whole, preparation
from .plan import LATENCY
from .probe import STEPS as STEPS_OF_PROBE
from .probe import Speed, arm_key, probe
from .run import grouped
from .units import attempt

_SIZED, _UNSIZED = 1, 8  # samples whose tokens are counted, of tasks of a given length and of others
_REPEATS = 7  # of a latency cell
_MEBI, _GIBI = 2**20, 2**30


@dataclass(frozen=True)
class _Shape:
    """Tokens of a sample: of the first prompt, and of each turn the further prompt and the answer."""

    first: int
    turns: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class _Row:
    """The estimate of a cell; None where it is not known."""

    cell: CellDict
    done: bool = False
    prefills: int = 0
    seconds: float | None = None
    cache_bytes: float | None = None
    peak_bytes: float = 0.0
    reason: str = ""


def dry_run(session: Session, cells: Sequence[CellDict], load_seconds: float) -> str:
    """Return the cells of a sweep as a table with estimates of time and memory.

    Args:
        session: the model and the folders, which stay as they are.
        cells: of the sweep.
        load_seconds: that the model took to load.
    """
    done = _done(session.results)
    shapes: dict[int, list[_Shape]] = {}
    errors: dict[int, str] = {}
    groups = grouped(cells)
    for number, group in enumerate(groups):
        found, error = attempt(partial(_shapes, session, group[0]))
        if error is None:
            shapes[number] = found
        else:
            errors[number] = (str(error) or type(error).__name__).splitlines()[0]
    methods: dict[str, Method] = {}
    unknown: dict[str, str] = {}
    for cell in cells:
        method, error = attempt(partial(_method, cell))
        if error is None:
            methods[arm_key(cell)] = method
        else:
            unknown[arm_key(cell)] = str(error).splitlines()[0]
    longest = max((shape.first for found in shapes.values() for shape in found), default=0)
    speed = probe(session.model, methods, max(2, longest)) if longest and methods else None
    rows: list[_Row] = []
    for number, group in enumerate(groups):
        if number in errors or speed is None:
            reason = errors.get(number, "no method can run")
            rows += [_Row(cell=cell, done=cell_key(cell) in done, reason=reason) for cell in group]
        else:
            rows += _rows(session, group, shapes[number], methods, unknown | dict(speed.errors), speed, done)
    place = {arm: index for index, arm in enumerate(map(cell_key, cells))}
    rows.sort(key=lambda row: place[cell_key(row.cell)])
    return _table([replace(row, seconds=_with_load(session, row, load_seconds)) for row in rows], speed, load_seconds)


def _method(cell: CellDict) -> Method:
    """Return a cell's method, a baseline of `latency` with room for the probe; compiled steps are probed eagerly."""
    room = max(STEPS_OF_PROBE, cell["max_new_tokens"] or 0)
    return find_arm(cell["method"], cell["token_budget"], cell["settings"], new_tokens=room)


def _with_load(session: Session, row: _Row, load_seconds: float) -> float | None:
    """Return the seconds of a cell; on a CPU `latency` loads the model in a new process."""
    apart = row.cell["task"] == LATENCY and session.model.device.type == "cpu" and row.seconds is not None
    return (row.seconds or 0.0) + load_seconds if apart else row.seconds


def _shapes(session: Session, cell: CellDict) -> list[_Shape]:
    """Return the tokens of a few samples of a cell, which are made in memory."""
    if cell["task"] == LATENCY:
        if not isinstance(cell["batch_size"], int):
            raise ValueError("the time that it takes to find the largest batch is not estimated")
        new = cell["max_new_tokens"] or 0
        return [_Shape(max(1, (cell["length"] or 0) - new), ((0, new),))]
    if cell["task"] == KL:
        return [_Shape(max(1, (cell["length"] or 0) - STEPS), ((0, STEPS),))]
    if is_whole(cell):
        raise ValueError("stock tasks of lm-eval are not estimated")
    (task,) = find_tasks([cell["task"]])
    count = min(cell["samples"], _SIZED if task.sized else _UNSIZED)
    samples = task.samples(replace(preparation(session, cell), count=count))
    if not samples:
        raise ValueError(f"task {task.name!r} has no samples for length {cell['length']}")
    return [_shape(session, cell, sample) for sample in samples]


def _shape(session: Session, cell: CellDict, sample: Sample) -> _Shape:
    agnostic, options = cell["mode"] == AGNOSTIC, {"chat": cell["chat"], "options": chat_options(cell)}
    first, turns = 0, []
    for number, turn in enumerate(sample.turns):
        rendered = render(session.tokenizer, sample.context, turn.question, turn.answer_prefix, **options)  # type: ignore[arg-type]
        ids, head = encode(session.tokenizer, rendered, apart=agnostic)
        if number == 0:
            first = head if agnostic else len(ids)
        limit = min(turn.max_new_tokens, cell["max_new_tokens"] or turn.max_new_tokens) + cell["thinking_tokens"]
        turns.append((len(ids) - first if agnostic or number else 0, limit))
    return _Shape(first, tuple(turns))


def _rows(
    session: Session,
    group: Sequence[CellDict],
    shapes: Sequence[_Shape],
    methods: Mapping[str, Method],
    errors: Mapping[str, str],
    speed: Speed,
    done: set[str],
) -> list[_Row]:
    """Estimate the cells of a group, which share each prompt's prefill."""
    rows, read = [], False
    full = next((arm_key(cell) for cell in group if cell["method"] == FULL), "")
    for cell in group:
        arm = arm_key(cell)
        if cell_key(cell) in done:
            rows.append(_Row(cell=cell, done=True))
            continue
        if arm in errors:
            rows.append(_Row(cell=cell, reason=errors[arm]))
            continue
        alone = cell["task"] == LATENCY
        times = (_REPEATS if alone else cell["samples"]) * cell["answers"]
        if isinstance(cell["batch_size"], int):
            times *= cell["batch_size"]  # at most: a step of several sequences reads the weights once
        shares = shares_prefill(methods[arm])
        seconds = fmean(_answer_seconds(speed, arm, shape) for shape in shapes)
        prefill = fmean(speed.prefill(shape.first) for shape in shapes)
        reads = times * (not shares or alone or not read)
        total = times * seconds + (reads * prefill if shares else 0.0)
        if cell["task"] == KL and not read:  # the full cache's predictions, to which all are compared
            total += times * (_answer_seconds(speed, full, shapes[0]) if full in speed.steps else seconds)
        read = read or shares
        rows.append(_Row(cell=cell, prefills=reads, seconds=total, **_memory(session, cell, shapes)))
    return rows


def _answer_seconds(speed: Speed, arm: str, shape: _Shape) -> float:
    """Return the seconds of an arm's answers to a sample whose first prompt has been read."""
    seconds, position = speed.start(arm, shape.first), shape.first
    for new, answer in shape.turns:
        if new:  # read by the arm itself, over its cache
            seconds += max(speed.prefill(new), speed.step(arm, position))
        seconds += max(0, answer - 1) * speed.step(arm, position + answer / 2)
    return seconds


def _memory(session: Session, cell: CellDict, shapes: Sequence[_Shape]) -> dict[str, Any]:
    """Return the bytes of a cell's cache, and those at the peak: weights, the read prompt and the cache."""
    if cell["method"] not in (*METHODS, FULL):
        return {}
    prompt = max(shape.first for shape in shapes)
    planned = make_plan(
        session.model.config,
        context=prompt,
        token_budget=cell["token_budget"] or prompt,
        method=cell["method"],
        dtype=cell["dtype"],
    )
    cache = planned.cache.total_bytes
    return {"cache_bytes": cache, "peak_bytes": planned.weight_bytes + planned.cache.total("full_bytes") + cache}


def _done(results: Path) -> set[str]:
    """Return the cells that have a record; a damaged one is made again, as a failed one is."""
    done = set()
    for path in (results / CELLS).glob("*.json"):
        with contextlib.suppress(ValueError):
            record = read_record(path)
            if record["status"] != "failed":
                done.add(record["key"])
    return done


def _table(rows: Sequence[_Row], speed: Speed | None, load_seconds: float) -> str:
    lines = [f"{'task':24} {'length':>7} {'method':24} {'samples':>7} {'prefills':>8} {'cache MiB':>10} {'minutes':>8}"]
    for row in rows:
        cell = row.cell
        text = f"{cell['task']:24} {cell['length'] or '-':>7} {label(cell):24} {cell['samples']:>7}"
        cache = "?" if row.cache_bytes is None else f"{row.cache_bytes / _MEBI:.1f}"
        if row.done:
            lines.append(f"{text} {'':>8} {'':>10} {'done':>8}")
        elif row.seconds is None:
            lines.append(f"{text} {'?':>8} {'?':>10} {'?':>8}")
        else:
            lines.append(f"{text} {row.prefills:>8} {cache:>10} {row.seconds / 60:>8.2f}")
    known = [row for row in rows if row.seconds is not None]
    total = load_seconds + sum(row.seconds or 0.0 for row in known)
    peak = max((row.peak_bytes for row in known), default=0.0)
    reads, answers = sum(row.prefills for row in known), sum(row.cell["samples"] for row in known)
    lines.append(
        f"estimated: {total / 60:.1f} minutes, {reads} prefills for {answers} samples of {len(known)} cells, "
        f"{peak / _GIBI:.1f} GiB at peak; answers may end earlier"
    )
    if speed is not None and speed.steps:
        steps = sorted(pair[1] for pair in speed.steps.values())
        lines.append(
            f"probe: a prefill of {speed.lengths[1]} tokens took {speed.prefills[1]:.2f} s, decode steps "
            f"{1e3 * steps[0]:.0f} to {1e3 * steps[-1]:.0f} ms"
        )
    for reason in dict.fromkeys(row.reason for row in rows if row.reason and not row.done):
        count = sum(row.reason == reason for row in rows)
        lines.append(f"? {count} cell{'s' if count > 1 else ''}: {reason}")
    return "\n".join(lines) + "\n"
