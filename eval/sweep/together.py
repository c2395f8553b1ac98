"""Run a cell on the model: by this process alone, or by all processes among which the model is divided."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..measures.kl import Window
from ..measures.memory import OutOfMemory, is_out_of_memory
from ..methods import Method
from ..prefill import Prefills
from ..records import CellDict, Record
from .cells import Session, method_of, run_whole
from .ranks import Ranks
from .work import Question, answer_item


class _Order(NamedTuple):
    """An order to all ranks: a cell's answer to a sample, or the whole cell (`item` is None)."""

    cell: CellDict
    item: Question | Window | None
    prefills: str | None  # name of the prefills to start from; None: none


class _Failure(NamedTuple):
    """The error of a rank."""

    text: str
    out_of_memory: bool


def answer_together(
    session: Session, cell: CellDict, item: Question | Window, method: Method, prefills: Prefills | None
) -> Any:
    """Return `answer_item`; of a divided model, run by all ranks, and with the bytes of all of them.

    Raises:
        RuntimeError: a rank failed, or the ranks generated different tokens.
    """
    if session.ranks is None:
        return answer_item(session, cell, item, method, prefills)
    order = _Order(cell, item, None if prefills is None else prefills.name)
    return added(_run(session.ranks, order, lambda: answer_item(session, cell, item, method, prefills)))


def run_together(session: Session, cell: CellDict) -> Record:
    """Return `run_whole`; of a divided model, run by all ranks.

    Raises:
        RuntimeError: a rank failed.
    """
    if session.ranks is None:
        return run_whole(session, cell)
    records = _run(session.ranks, _Order(cell, None, None), lambda: run_whole(session, cell))
    made: Record = records[0] | {"cost": _added_cost([each["cost"] for each in records])}
    return made


def _run(ranks: Ranks, order: _Order, work: Callable[[], Any]) -> list[Any]:
    """Run an order on all ranks, and return their results."""
    ranks.tell(order)
    try:
        own = work()
    except Exception as error:
        ranks.gathered(_failure(error))
        raise
    results = ranks.gathered(own)
    for rank, result in enumerate(results):
        if isinstance(result, _Failure):
            text = f"rank {rank} failed: {result.text}"
            raise OutOfMemory(text) if result.out_of_memory else RuntimeError(text)
    return results


def follow(session: Session, ranks: Ranks) -> None:
    """Run what rank 0 tells, until nothing is left."""
    prefills: tuple[str, Prefills] | None = None
    while (order := ranks.told()) is not None:
        if order.prefills is None:
            prefills = None
        elif prefills is None or prefills[0] != order.prefills:
            prefills = None  # its memory is needed
            prefills = order.prefills, Prefills(session.model)
        try:
            if order.item is None:
                result: Any = run_whole(session, order.cell)
            else:
                shared = None if prefills is None else prefills[1]
                result = answer_item(session, order.cell, order.item, method_of(session, order.cell), shared)
        except Exception as error:  # noqa: BLE001  # rank 0 raises it
            result = _failure(error)
        ranks.gathered(result)


def _failure(error: Exception) -> _Failure:
    return _Failure("".join(traceback.format_exception(error)), is_out_of_memory(error))


def added(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the result of the first rank with the bytes that all ranks hold and read.

    Raises:
        RuntimeError: the ranks generated different tokens.
    """
    first, *others = results
    for rank, other in enumerate(others, 1):
        if other.get("predictions") != first.get("predictions"):
            raise RuntimeError(f"rank {rank} generated other tokens than rank 0; its random numbers or weights differ")
    result = first | {"cost": _added_cost([each["cost"] for each in results])}
    if "traces" in first:
        all_traces = zip(*(each["traces"] for each in results), strict=True)
        result["traces"] = [_added_trace(traces) for traces in all_traces]
    return result


def _added_cost(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first rank's cost with the bytes of all; of a peak, the largest, which decides what fits."""
    cost = dict(costs[0])
    for name, value in cost.items():
        if name.endswith("_bytes") and value is not None:
            cost[name] = (max if name.startswith("peak_") else sum)(each[name] for each in costs)
    return cost


def _added_trace(traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    points = zip(*(trace["kv_bytes"] for trace in traces), strict=True)
    return traces[0] | {"kv_bytes": [[same[0][0], sum(nbytes for _, nbytes in same)] for same in points]}
