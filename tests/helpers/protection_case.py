"""Spans that tests protect, and what a store has kept."""

from __future__ import annotations

from rocketkv.state.store import KVStore

RANGES = ((3, 9), (30, 37))
SPAN = {*range(3, 9), *range(30, 37)}


def kept_by(store: KVStore, row: int, head: int) -> list[int]:
    assert store.positions is not None
    assert store.lengths is not None
    found: list[int] = store.positions[row, head, : int(store.lengths[row, head])].tolist()
    return found
