"""Spans that tests protect, and what a store has kept."""

from __future__ import annotations

from rocketkv.state.store import KVStore

RANGES = ((3, 9), (30, 37))
SPAN = {*range(3, 9), *range(30, 37)}


def kept_by(store: KVStore, row: int, head: int) -> list[int]:
    assert store.phase.positions is not None
    assert store.decoding.buffers.seq_lens is not None
    found: list[int] = store.phase.positions[row, head, : int(store.decoding.buffers.seq_lens[row, head])].tolist()
    return found
