"""Protected tokens, which stage 1 must keep, and the fair share of each message in the kept tokens.

Marks are ranges of positions on the host; the end of a prompt turns them into masks.

Letters: B batch, Hkv KV heads, S slots of a prompt.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RowMarks:
    """The marks of one row of a batch, as positions in the sequence, padding included.

    Attributes:
        protected: (start, stop) of the tokens that are never evicted and always attended to.
        messages: start of each message that gets a fair share, ascending; empty without fair shares.
    """

    protected: Ranges = ()
    messages: tuple[int, ...] = ()


def shifted(ranges: Ranges, offset: int) -> Ranges:
    """Return ranges that begin `offset` tokens later."""
    return tuple((start + offset, stop + offset) for start, stop in ranges)


def protected_slots(marks: Sequence[RowMarks], positions: Tensor) -> Tensor:
    """Return [B, 1 or Hkv, S] bool: the slots whose tokens are protected.

    Args:
        marks: of each of the B rows.
        positions: [B, 1 or Hkv, S] integers, each slot's position in the sequence, -1 for padding.
    """
    found = torch.zeros_like(positions, dtype=torch.bool)
    for row, mark in enumerate(marks):
        for start, stop in mark.protected:
            found[row] |= (positions[row] >= start) & (positions[row] < stop)
    return found & (positions >= 0)


def message_numbers(marks: Sequence[RowMarks], positions: Tensor) -> Tensor:
    """Return [B, 1 or Hkv, S] int64: the number of the message of each slot's token, 0 before the first.

    Args:
        marks: of each of the B rows.
        positions: as in `protected_slots`.
    """
    found = torch.zeros_like(positions, dtype=torch.long)
    for row, mark in enumerate(marks):
        for start in mark.messages:
            found[row] += positions[row] >= start
    return found


def with_fair_shares(scores: Tensor, message: Tensor, kept: int) -> Tensor:
    """Raise the best tokens of each message to +inf, as many as its share of the kept tokens.

    Tokens that already have +inf are kept anyway; messages share the rest. A message's share of the rest is its share
    of the row's tokens of finite score, rounded down. The scores alone decide the remainder.

    Args:
        scores: [B, Hkv, S] float32, minus infinity at slots without a token.
        message: [B, 1 or Hkv, S] integers, the message of each token.
        kept: number of tokens that these scores will choose.
    """
    order = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(
        dim=-1, descending=True, stable=True
    )
    ranks = scores.gather(-1, order)
    free = (ranks > -torch.inf) & (ranks < torch.inf)
    shared = kept - (ranks == torch.inf).sum(-1, keepdim=True)
    total = free.sum(-1, keepdim=True)
    ranked = message.expand_as(scores).gather(-1, order)
    won = torch.zeros_like(free)
    for number in range(int(message.max()) + 1):
        own = (ranked == number) & free
        share = own.sum(-1, keepdim=True) * shared // total.clamp(min=1)
        won |= own & (own.cumsum(-1) <= share)
    return scores.masked_fill(torch.zeros_like(won).scatter_(-1, order, won), torch.inf)


def warn_unprotected(marks: Sequence[RowMarks]) -> None:
    """Warn of rows whose first prompt has no system message to protect."""
    bare = ", ".join(str(row) for row, mark in enumerate(marks) if not mark.protected)
    if bare:
        warnings.warn(
            f"protect='system' found no system message at the beginning of row {bare}: nothing of it is protected. Was "
            "the prompt made by the tokenizer's chat template?",
            stacklevel=2,
        )


def protected_first(slots: Tensor, protected: Tensor) -> Tensor:
    """Return chosen slots [B, Hkv, n] in their order, with the `protected` ones [B, 1 or Hkv, S] first."""
    own = protected.expand(*slots.shape[:2], -1).gather(2, slots.long())
    return slots.gather(2, (~own).byte().argsort(dim=-1, stable=True))
