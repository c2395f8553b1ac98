"""Bytes of the tensors that an object reaches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def storages(root: Any) -> dict[int, int]:
    """Return the bytes of every tensor storage that can be reached from an object, by address."""
    found: dict[int, int] = {}
    visited: set[int] = set()
    pending = [root]
    while pending:
        item = pending.pop()
        if id(item) in visited or isinstance(item, (str, bytes, int, float, type, torch.dtype, torch.device)):
            continue
        visited.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending.extend(item)
        elif not callable(item) or isinstance(item, nn.Module):
            # A history knows the next layer's, which is counted there.
            pending.extend(value for name, value in getattr(item, "__dict__", {}).items() if name != "following")
    return found


def walked(root: Any) -> int:
    return sum(storages(root).values())
