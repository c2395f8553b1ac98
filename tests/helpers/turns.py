"""Random tokens of a batch, and the calls that take them through a store: prompts, and decoded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rocketkv.budget import METHODS, BudgetSplit
from rocketkv.core.params import AttentionParams
from rocketkv.dispatch import decode_step
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from rocketkv.verify import verify_step

H, HKV, D, DV = 6, 2, 8, 5
WINDOW, KERNEL, RESERVE, BUDGET, PROMPT = 4, 5, 20, 16, 60
SCALING = 0.4
PARAMS = AttentionParams(SCALING)

# One split of each method, at about four times as many tokens as the budget. Pages: rocketkv 2, quest 5.
SPLITS: dict[str, BudgetSplit] = {name: method.split(PROMPT, BUDGET, D, RESERVE) for name, method in METHODS.items()}


@dataclass
class Tokens:
    """Queries [B, H, n, D], keys [B, Hkv, n, D] and values [B, Hkv, n, Dv] of n tokens."""

    query: Tensor
    key: Tensor
    value: Tensor

    def __getitem__(self, tokens: slice) -> Tokens:
        return Tokens(self.query[:, :, tokens], self.key[:, :, tokens], self.value[:, :, tokens])

    def __len__(self) -> int:
        return self.query.shape[2]

    def row(self, row: int, real: Tensor | None = None) -> Tokens:
        """Return one row, without its padding where `real` [n] marks it."""
        parts = (tensor[row : row + 1] for tensor in (self.query, self.key, self.value))
        return Tokens(*(part if real is None else part[:, :, real] for part in parts))

    def rows(self, rows: Tensor) -> Tokens:
        return Tokens(self.query[rows], self.key[rows], self.value[rows])


def tokens(batch: int, count: int, head_dim: int = D, value_dim: int = DV) -> Tokens:
    return Tokens(
        torch.randn(batch, H, count, head_dim) * 1.5,
        torch.randn(batch, HKV, count, head_dim),
        torch.randn(batch, HKV, count, value_dim),
    )


def joined(first: Tokens, second: Tokens) -> Tokens:
    """Return the tokens of both, in order."""
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return Tokens(*(torch.cat(pair, dim=2) for pair in pairs))


def left_padding(lengths: Sequence[int], size: int) -> Tensor:
    """Return [B, size] bool: the last tokens of each row are real."""
    return torch.arange(size) >= size - torch.tensor(lengths)[:, None]


def extend(store: KVStore, given: Tokens, valid: Tensor | None = None) -> None:
    store.extend(given.key, given.value, valid)
    store.prompt.remember(given.query, WINDOW)


def close(store: KVStore, split: BudgetSplit, reserve: int = RESERVE) -> None:
    close_prompt(store, split, PARAMS, decode_reserve=reserve, kernel_size=KERNEL)


def prompted(given: Tokens, split: BudgetSplit, valid: Tensor | None = None, reserve: int = RESERVE) -> KVStore:
    """Return a store after a first prompt."""
    store = KVStore()
    extend(store, given, valid)
    close(store, split, reserve)
    return store


def decode(store: KVStore, given: Tokens, params: AttentionParams = PARAMS) -> Tensor:
    """Decode tokens one by one, and return their outputs [B, H, n, Dv]."""
    steps = [
        decode_step(given.query[:, :, i], given.key[:, :, i], given.value[:, :, i], store, params)
        for i in range(len(given))
    ]
    return torch.stack(steps, dim=2)


def verify(store: KVStore, given: Tokens, params: AttentionParams = PARAMS) -> Tensor:
    """Take tokens through one verify step, and return their outputs [B, H, n, Dv]."""
    return verify_step(given.query, given.key, given.value, store, params).transpose(1, 2)


def last_queries(store: KVStore) -> Tensor:
    """Return the queries [B, H, <= W, D] that a store's ring holds, in order."""
    ring, tensor = store.decoding.ring, store.decoding.buffers.query_ring
    assert ring is not None
    assert tensor is not None
    return ring.last(tensor, store.seen)
