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
    # A position is in a range if an odd number of the ranges' ends is at or before it.
    ends = [[end for span in _disjoint(mark.protected) for end in span] for mark in marks]
    return _ends_up_to(ends, positions) % 2 == 1


def protected_count(marks: Sequence[RowMarks], seen: int) -> int:
    """Return how many of a row's first `seen` tokens are protected, in the row with the most."""
    return max(
        sum(max(0, min(stop, seen) - min(start, seen)) for start, stop in _disjoint(mark.protected)) for mark in marks
    )


def _disjoint(ranges: Ranges) -> list[tuple[int, int]]:
    """Return the same tokens in ascending ranges that do not touch."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return found


def _ends_up_to(ends: Sequence[Sequence[int]], positions: Tensor) -> Tensor:
    """Return how many of a row's ascending `ends` are at or before each position, as `positions`; int64."""
    width = max(map(len, ends))
    # Ends that a shorter row lacks are behind every position.
    rows = [[*row, *[torch.iinfo(torch.int32).max] * (width - len(row))] for row in ends]
    table = torch.tensor(rows, dtype=torch.int32).to(positions.device, non_blocking=True)
    found = torch.searchsorted(table, positions.int().flatten(1), right=True)
    return found.view_as(positions)


def message_numbers(marks: Sequence[RowMarks], positions: Tensor) -> Tensor:
    """Return [B, 1 or Hkv, S] int64: the number of the message of each slot's token, 0 before the first.

    Args:
        marks: of each of the B rows.
        positions: as in `protected_slots`.
    """
    return _ends_up_to([mark.messages for mark in marks], positions)


def with_fair_shares(scores: Tensor, message: Tensor, count: int, kept: int) -> Tensor:
    """Raise the best tokens of each message to +inf, as many as its share of the kept tokens.

    Tokens that already have +inf are kept anyway; messages share the rest. A message's share of the rest is its share
    of the row's tokens of finite score, rounded down. The scores alone decide the remainder.

    Args:
        scores: [B, Hkv, S] float32, minus infinity at slots without a token.
        message: [B, 1 or Hkv, S] integers, the message of each token, less than `count`.
        count: number of messages.
        kept: number of tokens that these scores will choose.
    """
    clean = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    free = clean.isfinite()
    # Tokens that share nothing are a message of their own, the last.
    number = torch.where(free, message, count)
    tokens = number.new_zeros(*scores.shape[:2], count + 1).scatter_add_(-1, number, torch.ones_like(number))
    shared = kept - (clean == torch.inf).sum(-1, keepdim=True)
    share = tokens * shared // (scores.shape[2] - tokens[..., -1:]).clamp(min=1)
    share[..., -1] = 0
    # By message, and within a message by score.
    order = clean.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, number.gather(-1, order).argsort(dim=-1, stable=True))
    ordered = number.gather(-1, order)
    last = (tokens.cumsum(-1) - tokens + share).gather(-1, ordered)
    won = torch.arange(scores.shape[2], device=scores.device) < last
    return scores.masked_fill(torch.zeros_like(free).scatter_(-1, order, won), torch.inf)


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
