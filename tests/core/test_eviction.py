"""Stage 1: the one rule for every top-k, the window's scores, and which positions survive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from close import assert_near
from naive import softmax_weights, top
from rocketkv.budget import BudgetSplit
from rocketkv.core import scratch
from rocketkv.core.eviction import prompt_scores, value_aware, window_scores
from rocketkv.core.params import AttentionParams
from rocketkv.core.topk import recent_positions, select_top
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from stage1 import prompt_positions
from tracking import Tracker

INF, NAN = torch.inf, torch.nan


def assert_rule(scores: Tensor, n: int) -> None:
    found = select_top(scores, n)
    assert found.dtype == torch.int64
    assert found.shape == (*scores.shape[:-1], n)
    for row, positions in zip(scores.reshape(-1, scores.shape[-1]), found.reshape(-1, n), strict=True):
        assert positions.tolist() == top(row.tolist(), n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 7, 63, 255, 256, 257, 258, 1001])
def test_select_top_is_a_sort_by_score_then_position(size: int, dtype: torch.dtype) -> None:
    few_values = torch.randint(-3, 4, (2, 3, size)).to(dtype)
    for n in {1, 2, size // 3, size // 2, size - 1, size} - {0}:
        if n <= size:
            assert_rule(few_values, n)
            assert_rule(torch.randn(5, size).to(dtype), n)


@pytest.mark.parametrize("size", [9, 300])
def test_select_top_ranks_nan_with_minus_infinity(size: int) -> None:
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, torch.finfo(torch.float32).max])
    scores = special[torch.randint(len(special), (4, 2, 2, size))]
    for n in (1, size // 4, size // 2, size - 1):
        assert_rule(scores, n)
    for value in (NAN, INF, -INF):
        assert select_top(torch.full((size,), value), 3).tolist() == [0, 1, 2]


def test_select_top_takes_any_layout_and_leaves_its_input_alone() -> None:
    scores = torch.randint(0, 5, (300, 4)).float().T
    scores[0, 5] = NAN
    before = scores.clone()
    assert_rule(scores, 37)
    torch.testing.assert_close(scores, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("n", [0, -1, 8])
def test_select_top_refuses_an_impossible_number(n: int) -> None:
    with pytest.raises(ValueError, match=f"n must be between 1 and the 7 scores, got {n}"):
        select_top(torch.zeros(2, 7), n)


def naive_scores(query: Tensor, key: Tensor, params: AttentionParams, valid: Tensor | None = None) -> Tensor:
    """Return [B, Hkv, S - W] float64: the weights of each window query, summed, one query at a time."""
    batch, heads, window, _ = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    total = torch.zeros(batch, kv_heads, size, dtype=torch.float64)
    scaling, softcap, sinks = params
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            real = torch.ones(size, dtype=torch.bool) if valid is None else valid[b, g % valid.shape[1]]
            for w in range(window):
                own = size - window + w
                seen = [i for i in range(own + 1) if real[i]]
                if real[own]:
                    sink = None if sinks is None else float(sinks[h])
                    total[b, g, seen] += softmax_weights(query[b, h, w], key[b, g][seen], scaling, softcap, sink)
    return total[..., : size - window]


SHAPES = [  # B, H, Hkv, D, S, W
    (1, 3, 3, 8, 41, 7),  # each query head its own KV head
    (2, 6, 2, 16, 53, 8),  # three query heads a group
    (2, 5, 1, 11, 29, 5),  # one KV head for all
    (1, 14, 2, 13, 97, 32),  # seven a group
    (1, 2, 1, 4, 9, 9),  # nothing before the window
    (3, 4, 2, 6, 12, 1),
]


@pytest.fixture(params=[1, 1000, 8 * 2**20], ids=["smallest-blocks", "some-blocks", "one-block"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "CPU_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_window_scores_equal_a_full_softmax(shape: tuple[int, ...], extras: str) -> None:
    batch, heads, kv_heads, head_dim, size, window = shape
    query, key = torch.randn(batch, heads, window, head_dim) * 3, torch.randn(batch, kv_heads, size, head_dim)
    softcap = 2.5 if extras in ("softcap", "both") else None
    params = AttentionParams(0.37, softcap, torch.randn(heads) * 4 if extras in ("sinks", "both") else None)
    found = window_scores(query, key, params)
    assert found.dtype == torch.float32
    assert found.shape == (batch, kv_heads, size - window)
    assert_near(found, naive_scores(query, key, params))


def padding(kind: str, batch: int, kv_heads: int, size: int) -> Tensor:
    valid = torch.ones(batch, 1, size, dtype=torch.bool)
    if kind == "left":
        valid[0, :, :17] = False
    elif kind == "holes":
        valid = torch.rand(batch, 1, size) > 0.3
    elif kind == "holes-per-head":
        valid = torch.rand(batch, kv_heads, size) > 0.3
    elif kind == "into-the-window":
        valid[0, :, : size - 3] = False
    elif kind == "right":
        valid[1, :, size - 4 :] = False
    elif kind == "whole-row":
        valid[1] = False
    return valid


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["none", "left", "holes", "holes-per-head", "into-the-window", "right", "whole-row"])
def test_window_scores_do_not_see_padding(kind: str, sinks: bool) -> None:
    query, key = torch.randn(2, 6, 8, 16), torch.randn(2, 2, 45, 16)
    valid = padding(kind, 2, 2, 45)
    params = AttentionParams(0.5, sinks=torch.randn(6) if sinks else None)
    found = window_scores(query, key, params, valid=valid)
    assert_near(found, naive_scores(query, key, params, valid))
    assert (found[~valid[..., :37].expand_as(found)] == 0).all()
    if kind == "whole-row":
        assert (found[1] == 0).all()


@pytest.mark.usefixtures("_blocks")
def test_garbage_in_padding_is_not_seen() -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 40, 8)
    valid = padding("left", 2, 2, 40)
    clean = window_scores(query, key, AttentionParams(0.5), valid=valid)
    for garbage in (NAN, INF, -INF, 1e30):
        spoilt = key.clone()
        spoilt[0, :, :17] = garbage
        assert torch.equal(window_scores(query, spoilt, AttentionParams(0.5), valid=valid), clean)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_a_broken_key_spoils_its_own_row_and_head_only(garbage: float) -> None:
    query, key = torch.randn(2, 6, 8, 16), torch.randn(2, 3, 50, 16)
    spoilt = key.clone()
    spoilt[1, 2, 11, 3] = garbage
    params = AttentionParams(0.5)
    found, clean = window_scores(query, spoilt, params), window_scores(query, key, params)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(found[others], clean[others])
    assert not torch.equal(found[1, 2], clean[1, 2])
    kept = prompt_positions(query, spoilt, 20, params, kernel_size=5)
    assert torch.equal(kept[others], prompt_positions(query, key, 20, params, kernel_size=5)[others])
    assert kept[1, 2].tolist() == sorted(set(kept[1, 2].tolist()))
    assert kept[1, 2, -8:].tolist() == list(range(42, 50))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_window_scores_are_float32_whatever_the_keys(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 6, 8, 16).to(dtype) * 2, torch.randn(2, 2, 61, 16).to(dtype)
    found = window_scores(query, key, AttentionParams(0.25))
    assert found.dtype == torch.float32
    # Far tighter than twice what low precision would cost: nothing is rounded to it.
    assert_near(found, naive_scores(query, key, AttentionParams(0.25)))


def naive_positions(scores: Tensor, real: Tensor, kept: int, window: int, kernel_size: int, offset: int) -> list[int]:
    """Choose for one row and KV head from its scores [S - W]: pooled over its tokens, padding out, the window in."""
    tokens = [i for i in range(len(scores)) if real[i]]
    ahead = max(0, kernel_size // 2 - offset)
    pooled = {
        i: max(float(scores[j]) for j in tokens[max(0, at + ahead + 1 - kernel_size) : at + ahead + 1])
        for at, i in enumerate(tokens)
    }
    order = sorted(tokens, key=lambda i: (-pooled[i], i))
    own = [i for i in range(len(scores), len(scores) + window) if real[i]]
    return sorted(order[: kept - window] + own)


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 63])
@pytest.mark.parametrize("kind", ["none", "left", "holes", "holes-per-head"])
def test_prompt_positions_are_the_pooled_best_and_the_window(kind: str, kernel_size: int, offset: int) -> None:
    window, size = 6, 90
    query, key = torch.randn(2, 6, window, 16) * 2, torch.randn(2, 2, size, 16)
    valid = padding(kind, 2, 2, size)
    valid[..., -window:] = True
    given = None if kind == "none" else valid
    params, pools = AttentionParams(0.25), {"kernel_size": kernel_size, "pool_offset": offset}
    scores = window_scores(query, key, params, valid=given)
    for kept in (window, window + 1, 31):
        found = prompt_positions(query, key, kept, params, valid=given, **pools)
        for b in range(2):
            for g in range(2):
                real = valid[b, g % valid.shape[1]]
                assert found[b, g].tolist() == naive_positions(scores[b, g], real, kept, window, kernel_size, offset)


def test_padding_makes_up_the_number_of_a_short_row() -> None:
    query, key = torch.randn(2, 2, 4, 8), torch.randn(2, 1, 40, 8)
    valid = torch.ones(2, 1, 40, dtype=torch.bool)
    valid[0, :, :30] = False
    found = prompt_positions(query, key, 15, AttentionParams(0.3), kernel_size=3, valid=valid)
    assert found.shape == (2, 1, 15)
    assert set(range(30, 40)) <= set(found[0, 0].tolist())
    assert found[0, 0].tolist() == sorted(set(found[0, 0].tolist()))


def test_a_prompt_must_keep_its_window() -> None:
    store, split = KVStore(), BudgetSplit(token_budget=7, kept_tokens=7)
    store.extend(torch.zeros(1, 1, 20, 4), torch.zeros(1, 1, 20, 4))
    store.prompt.remember(torch.zeros(1, 2, 8, 4), 8)
    with pytest.raises(ValueError, match="kept_tokens must be at least the window of 8 tokens, got 7"):
        close_prompt(store, split, AttentionParams(1.0), decode_reserve=8, kernel_size=3)


@pytest.mark.parametrize(("kept", "sinks"), [(1, 1), (5, 4), (9, 2), (13, 13)])
def test_recent_positions_are_the_first_and_the_last_tokens(kept: int, sinks: int) -> None:
    valid = torch.rand(3, 2, 40) > 0.4
    valid[0] = True
    found = recent_positions(valid, kept, sinks)
    for row, positions in zip(valid.view(6, 40), found.view(6, kept), strict=True):
        tokens = row.nonzero()[:, 0].tolist()
        assert len(tokens) >= kept
        assert positions.tolist() == tokens[:sinks] + tokens[len(tokens) - (kept - sinks) :]


def test_recent_positions_of_a_short_row_hold_all_its_tokens() -> None:
    valid = F.pad(torch.ones(1, 1, 5, dtype=torch.bool), (15, 0))
    found = recent_positions(valid, 9, 4)[0, 0].tolist()
    assert found == sorted(set(found))
    assert set(range(15, 20)) <= set(found)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "window", "value_dim"), [(41, 7, 8), (53, 8, 11), (9, 9, 4), (12, 1, 6)])
def test_value_aware_scores_are_weight_times_distance_from_the_output(
    size: int, window: int, value_dim: int, dtype: torch.dtype
) -> None:
    scores, value = torch.rand(2, 3, size - window), torch.randn(2, 3, size, value_dim).to(dtype)
    scores[1, 2] = 0  # a row of padding alone
    found = value_aware(scores, value)
    assert found.dtype == torch.float32
    assert found.shape == scores.shape
    for b in range(2):
        for head in range(3):
            weight, own = scores[b, head].double(), value[b, head, : size - window].double()
            out = (weight / weight.sum().clamp(min=1e-30)) @ own
            expected = [float(w * (v - out).norm()) for w, v in zip(weight, own, strict=True)]
            torch.testing.assert_close(found[b, head], torch.tensor(expected))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_values_at_padding_are_not_seen(garbage: float) -> None:
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 6)
    valid = padding("left", 2, 2, 40)
    params = AttentionParams(0.5)
    clean = prompt_scores(query, key, params, value=value, kernel_size=5, valid=valid)
    spoilt = value.clone()
    spoilt[0, :, :17] = garbage
    assert torch.equal(prompt_scores(query, key, params, value=spoilt, kernel_size=5, valid=valid), clean)
    alone = prompt_scores(query[:1], key[:1, :, 17:], params, value=value[:1, :, 17:], kernel_size=5)
    torch.testing.assert_close(clean[:1, :, 17:], alone)


def test_a_token_that_changes_nothing_is_evicted_before_one_that_does() -> None:
    """All tokens have the same key, so the same weight; one has another value than the rest."""
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 30, 8)
    value = torch.ones(1, 1, 30, 8)
    value[:, :, 19] = 3.0
    for counted, first in ((None, 0), (value, 19)):
        kept = prompt_positions(query, key, 5, AttentionParams(0.3), value=counted, kernel_size=1)
        assert kept.tolist() == [[[first, 26, 27, 28, 29]]]


def test_scratch_of_a_128k_prompt_stays_under_64_mb() -> None:
    query = torch.randn(1, 32, 32, 128, dtype=torch.bfloat16)
    key = torch.randn(1, 8, 4096, 128, dtype=torch.bfloat16).repeat(1, 1, 32, 1)
    for value in (None, key):
        with Tracker([query, key]) as tracker:
            found = prompt_positions(query, key, 2891, AttentionParams(128**-0.5), value=value, kernel_size=63)
        assert found.shape == (1, 8, 2891)
        assert tracker.peak < 64 * 10**6
