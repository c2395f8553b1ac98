"""Spans that tests protect, and what a store has kept."""

from __future__ import annotations

from rocketkv.state.store import KVStore

RANGES = ((3, 9), (30, 37))
SPAN = {*range(3, 9), *range(30, 37)}


def kept_by(store: KVStore, row: int, head: int) -> list[int]:
    _, _, positions, seq_lens = store.decoding.buffers[:4]
    found: list[int] = positions[row, head, : int(seq_lens[row, head])].tolist()
    return found
