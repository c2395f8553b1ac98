"""Protected spans and fair shares in a store: what is marked stays and comes first, and takes nothing from the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from naive import top
from protection_case import RANGES, SPAN, kept_by
from rocketkv import RocketKVConfig
from rocketkv.budget import BudgetSplit, with_protected
from rocketkv.core.pages import page_count
from rocketkv.core.topk import select
from rocketkv.state.compress import close_prompt
from rocketkv.state.protection import RowMarks, message_numbers, protected_first, protected_slots, with_fair_shares
from rocketkv.state.store import KVStore
from turns import HKV, PARAMS, Tokens, extend, left_padding, tokens


@pytest.mark.parametrize(("count", "page_size", "read"), [(13, 1, 13), (13, 2, 14), (13, 5, 15), (15, 5, 15)])
def test_a_split_reads_the_protected_beside_all_it_would_read(count: int, page_size: int, read: int) -> None:
    split = BudgetSplit(token_budget=24, kept_tokens=40, page_size=page_size, channels=8, top_k=12)
    found = with_protected(split, count)
    assert (found.kept_tokens, found.token_budget, found.top_k) == (40 + count, 24 + read, 12 + read)
    assert (found.page_size, found.channels, found.protected) == (page_size, 8, count)
    assert with_protected(split, 0) is split
    dense = with_protected(BudgetSplit(token_budget=24, kept_tokens=24), count)
    assert (dense.kept_tokens, dense.token_budget, dense.top_k) == (24 + count, 24 + count, None)
    with pytest.raises(ValueError, match="protected must be a number of tokens, 0 or more; got -1"):
        BudgetSplit(token_budget=24, protected=-1)


def test_marks_are_found_by_position() -> None:
    marks = (RowMarks(((2, 4), (6, 20)), (3, 5)), RowMarks(), RowMarks(((0, 1),), (0, 1, 7)))
    positions = torch.tensor([[-1, 1, 2, 3, 4, 7], [0, 1, 2, 3, 4, 5], [-1, -1, -1, 0, 1, 9]])[:, None]
    found = protected_slots(marks, positions)
    assert found.shape == (3, 1, 6)
    assert found[:, 0].int().tolist() == [[0, 0, 1, 1, 0, 1], [0] * 6, [0, 0, 0, 1, 0, 0]]
    numbers = message_numbers(marks, positions)[:, 0].tolist()
    assert numbers[0] == [0, 0, 0, 1, 1, 2]
    assert numbers[1] == [0] * 6
    assert numbers[2][3:] == [1, 2, 3]


def test_protected_slots_come_first_in_their_order() -> None:
    slots = torch.stack([torch.randperm(50)[:20].sort().values for _ in range(6)]).view(3, 2, 20)
    for kind in ("row", "head"):
        protected = torch.rand(3, 1 if kind == "row" else 2, 50) < 0.3
        found = protected_first(slots, protected)
        for b in range(3):
            for g in range(2):
                own = protected[b, 0 if kind == "row" else g].tolist()
                chosen = slots[b, g].tolist()
                expected = [slot for slot in chosen if own[slot]] + [slot for slot in chosen if not own[slot]]
                assert found[b, g].tolist() == expected


def naive_shares(scores: list[float], message: list[int], kept: int) -> set[int]:
    """Return which tokens win: those of infinite score, then each message's best, then the best of all."""
    forced = {i for i, score in enumerate(scores) if score == math.inf}
    free = [i for i, score in enumerate(scores) if -math.inf < score < math.inf]
    shared, won = kept - len(forced), set(forced)
    for number in set(message):
        own = [i for i in free if message[i] == number]
        share = len(own) * shared // max(1, len(free))
        won |= set(sorted(own, key=lambda i: (-scores[i], i))[:share])
    rest = sorted((i for i in free if i not in won), key=lambda i: (-scores[i], i))
    return won | set(rest[: kept - len(won)])


@pytest.mark.parametrize("values", [4, 10_000])
@pytest.mark.parametrize("kept", [9, 20, 41])
def test_fair_shares_are_their_definition(kept: int, values: int) -> None:
    scores = torch.randint(values, (3, 2, 60)).float()
    scores[..., -5:] = torch.inf  # the window
    scores[1, :, :23] = -torch.inf  # padding
    scores[2, :, 10:14] = torch.inf  # protected
    scores[0, 1, 7] = torch.nan
    message = torch.stack([torch.randint(5, (60,)).sort().values for _ in range(3)])[:, None]
    found = with_fair_shares(scores, message, 5, kept).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for b in range(3):
        for g in range(2):
            mine = top(found[b, g], kept)
            clean = scores[b, g].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).tolist()
            assert set(mine) >= {i for i, score in enumerate(clean) if score == torch.inf}, "what must stay"
            real = {i for i in mine if clean[i] > -torch.inf}
            assert real == naive_shares(clean, message[b, 0].tolist(), kept)


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("unit_size", [1, 2, 5])
def test_select_takes_the_protected_before_all_others(unit_size: int, ragged: bool) -> None:
    stored, protected, k = 61, 7, 25
    units = page_count(stored, unit_size)
    logits = torch.randn(2, 6, units) * 3
    logits[:, :, 0] = -50
    lengths = torch.tensor([[61, 40], [59, 26]], dtype=torch.int32) if ragged else None
    shape: dict[str, Any] = {"stored": stored, "lengths": lengths, "kv_heads": 2, "unit_size": unit_size}
    found, weight = select(logits, k, protected=protected, **shape)
    plain, plain_weight = select(logits, k, **shape)
    assert weight.equal(plain_weight)
    assert not found.equal(plain)
    first = set(range(protected))
    for b in range(2):
        for g in range(2):
            length = stored if lengths is None else int(lengths[b, g])
            own = logits[b, 3 * g : 3 * g + 3].double().repeat_interleave(unit_size, dim=-1)[:, :length]
            mean = own.softmax(-1).mean(0)
            mean[: page_count(protected, unit_size) * unit_size] = 2
            assert found[b, g].tolist() == top(mean, k)
            assert first <= set(found[b, g].tolist())


def closed(given: Tokens, valid: Tensor | None, ranges: tuple[tuple[int, int], ...], messages: Any = ()) -> KVStore:
    store = KVStore()
    extend(store, given, valid)
    if ranges or messages:
        skipped = [0] * len(given.key) if valid is None else valid.int().argmax(-1).tolist()
        shifted = [tuple((start + by, stop + by) for start, stop in ranges) for by in skipped]
        store.marks = tuple(RowMarks(each, messages) for each in shifted)
    close_prompt(store, SPLIT_OF_8, PARAMS, decode_reserve=5, kernel_size=5)
    return store


SPLIT_OF_8 = BudgetSplit(token_budget=16, kept_tokens=20, page_size=2, channels=3, top_k=8)


@pytest.mark.parametrize("lengths", [[60, 60], [60, 47, 22, 9]], ids=["uniform", "ragged"])
def test_everything_kept_without_protection_is_kept_with_it(lengths: list[int]) -> None:
    given = tokens(len(lengths), 60)
    valid = None if min(lengths) == 60 else left_padding(lengths, 60)
    plain, found = closed(given, valid, ()), closed(given, valid, RANGES)
    assert found.split == with_protected(SPLIT_OF_8, 13)
    for b, length in enumerate(lengths):
        span = {60 - length + i for i in SPAN if i < length}
        for g in range(HKV):
            kept = kept_by(found, b, g)
            assert set(kept) >= set(kept_by(plain, b, g)) | span
            assert len(kept) == len(set(kept)) == min(length, 33)
            assert set(kept[: len(span)]) == span, "before all others"
            assert kept[: len(span)] == sorted(span)
            assert kept[len(span) :] == sorted(set(kept) - span)


def test_a_crop_goes_back_to_the_last_token_that_was_moved_and_no_further() -> None:
    for last, least in ((55, 56), (59, 59)):  # the window's 4 tokens are there in any case
        store = closed(tokens(1, 60), None, ((50, last),))
        before = [set(kept_by(store, 0, g)) for g in range(HKV)]
        with pytest.raises(ValueError, match=f"Crop to {least} or more"):
            store.crop(least - 1)
        store.crop(least)
        assert [set(kept_by(store, 0, g)) for g in range(HKV)] == [{*kept} - {*range(least, 60)} for kept in before]


@pytest.mark.parametrize("protect", [False, True])
def test_each_message_keeps_its_share_and_the_window_stays(protect: bool) -> None:
    begins = (20, 30, 55)
    store = closed(tokens(2, 60), None, ((2, 6),) if protect else (), begins)
    forced = {*range(56, 60), *(range(2, 6) if protect else ())}
    kept = 24 if protect else 20
    for b in range(2):
        for g in range(HKV):
            mine = set(kept_by(store, b, g))
            assert mine >= forced
            assert len(mine) == kept
            for start, stop in zip((0, *begins), (*begins, 60), strict=True):
                own = set(range(start, stop)) - forced
                share = len(own) * (kept - len(forced)) // (60 - len(forced))
                assert len(mine & own) >= share


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"protect": "user"}, ValueError, "protect must be 'system', ranges .start, stop. or None; got 'user'"),
        ({"protect": ((False, True),)}, TypeError, "protect must be an int, got False of type bool"),
        ({"protect": (1, 2)}, TypeError, "protect must be a list or tuple, got 1 of type int"),
        ({"protect": ((1, 2, 3),)}, TypeError, "protect must hold pairs of integers"),
        ({"protect": ((5, 5),)}, ValueError, "0 <= start < stop; got .5, 5."),
        ({"protect": ((-1, 5),)}, ValueError, "0 <= start < stop; got .-1, 5."),
        ({"protect": ((1.5, 5),)}, TypeError, "protect must be an int, got 1.5 of type float"),
        ({"protect": "system", "method": "full"}, ValueError, "rank tokens by attention; 'full' does not"),
        ({"fair_shares": True, "method": "streaming"}, ValueError, "rank tokens by attention; 'streaming' does not"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        RocketKVConfig(**fields)
