"""Stage 2 by its parts: scores bound the logits, the selection follows the rule, the attention is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from close import assert_as_precise, assert_near
from naive import attention, top
from rocketkv.core.attention import attend, softmax_attention
from rocketkv.core.pages import build_pages, page_count, score_pages
from rocketkv.core.params import AttentionParams
from rocketkv.core.topk import ranked, select, select_top

SHAPES = [  # B, H, Hkv, D, N
    (1, 3, 3, 8, 37),
    (2, 6, 2, 16, 50),
    (2, 5, 1, 7, 64),
    (1, 14, 2, 12, 301),
]
PAGE_SIZES = [1, 2, 3, 5]


def scored(
    query: Tensor,
    keys: Tensor,
    page_size: int,
    channels: int,
    lengths: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the scores of keys of which all, or `lengths` of each row, are tokens."""
    stored = keys.shape[2] if lengths is None else int(lengths.max())
    bounds, params = build_pages(keys, stored, page_size), AttentionParams(0.3, softcap)
    sizes = {"page_size": page_size, "channels": channels}
    return score_pages(query, bounds, keys, params, stored=stored, lengths=lengths, **sizes)


def naive_score(query: Tensor, keys: Tensor, page_size: int, channels: int, scaling: float) -> Tensor:
    """Score one row and KV head: queries [G, D] over keys [N, D] to [G, U], page by page, channel by channel."""
    query, keys = query.double(), keys.double()
    magnitude = [float(query[:, c].abs().sum()) for c in range(query.shape[1])]
    chosen = top(magnitude, channels)
    out = torch.zeros(len(query), page_count(len(keys), page_size), dtype=torch.float64)
    for page in range(out.shape[1]):
        own = keys[page * page_size : (page + 1) * page_size]
        for g, q in enumerate(query):
            part, whole = float(q[chosen].abs().sum()), float(q.abs().sum())
            total = 0.0
            for c in chosen:
                bound = own[:, c].max() if float(query[:, c].sum()) > 0 else own[:, c].min()
                total += float(q[c] * bound)
            out[g, page] = total * scaling / (part / whole) ** 0.5 if part else 0.0
    return out


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_score_is_its_definition(shape: tuple[int, ...], page_size: int, channels: int) -> None:
    batch, heads, kv_heads, head_dim, size = shape
    query, keys = torch.randn(batch, heads, head_dim), torch.randn(batch, kv_heads, size, head_dim)
    found = scored(query, keys, page_size, channels)
    assert found.dtype == torch.float32
    group = heads // kv_heads
    for b in range(batch):
        for g in range(kv_heads):
            own = slice(g * group, (g + 1) * group)
            assert_near(found[b, own], naive_score(query[b, own], keys[b, g], page_size, channels, 0.3))


@pytest.mark.parametrize("shape", SHAPES)
def test_single_tokens_on_all_channels_score_their_true_logits(shape: tuple[int, ...]) -> None:
    batch, heads, kv_heads, head_dim, size = shape
    query, keys = torch.randn(batch, heads, head_dim), torch.randn(batch, kv_heads, size, head_dim)
    over_heads = keys.repeat_interleave(heads // kv_heads, dim=1)
    true = torch.einsum("bhd,bhnd->bhn", query.double(), over_heads.double()) * 0.3
    assert_near(scored(query, keys, 1, head_dim), true)
    assert_near(scored(query, keys, 1, head_dim, softcap=0.7), torch.tanh(true / 0.7) * 0.7)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_all_channels_without_groups_bound_every_true_logit(page_size: int) -> None:
    query, keys = torch.randn(3, 4, 9), torch.randn(3, 4, 101, 9)
    bound = scored(query, keys, page_size, 9).repeat_interleave(page_size, dim=-1)[..., :101]
    true = torch.einsum("bhd,bhnd->bhn", query, keys) * 0.3
    assert (true <= bound + 1e-5).all()
    # No looser than it must be: with one token a page they meet.
    assert page_size > 1 or (bound - true).abs().max() < 1e-5


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_zero_query_scores_zero(page_size: int) -> None:
    query, keys = torch.randn(2, 4, 6), torch.randn(2, 2, 31, 6)
    clean = scored(query, keys, page_size, 3)
    query[1, 2:] = 0
    found = scored(query, keys, page_size, 3)
    assert (found[1, 2:] == 0).all()
    assert torch.equal(found[0], clean[0])
    # A query that is zero only where the others of its group are largest, however large it is elsewhere.
    query = torch.tensor([[[500.0, 0.0, 0.1], [0.0, 200.0, 0.0]]])
    assert (scored(query, keys[:1, :1, :, :3].contiguous(), page_size, 1)[0, 1] == 0).all()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_rows_of_different_lengths_score_as_each_alone(page_size: int) -> None:
    lengths = torch.tensor([[300, 1], [257, 299], [2, 64]], dtype=torch.int32)
    query, keys = torch.randn(3, 6, 8), torch.randn(3, 2, 311, 8)
    # Entries of pages that are not full are whatever a longer row wrote there.
    keys[2, 0, 10:] = 1e30
    found = scored(query, keys, page_size, 5, lengths)
    for b in range(3):
        for g in range(2):
            own, length = slice(3 * g, 3 * g + 3), int(lengths[b, g])
            alone = scored(query[b : b + 1, own], keys[b : b + 1, g : g + 1, :length].contiguous(), page_size, 5)
            assert_near(found[b, own, : page_count(length, page_size)], alone[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [1, 3])
def test_scores_are_float32_whatever_the_keys(page_size: int, dtype: torch.dtype) -> None:
    query, keys = torch.randn(2, 6, 16).to(dtype), torch.randn(2, 2, 40, 16).to(dtype)
    found = scored(query, keys, page_size, 7)
    assert found.dtype == torch.float32
    assert_near(found, scored(query.float(), keys.float(), page_size, 7), 1e-6)


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("unit_size", [1, 2, 3, 7])
@pytest.mark.parametrize("values", [1, 3, 1000])
def test_ranked_is_the_rule_over_repeated_weights(values: int, unit_size: int, ragged: bool) -> None:
    # Few values make ties everywhere, between the partial unit and full ones too.
    for shape in [(1,), (2, 3, 2), (2, 2, 41), (2, 301)]:
        weight = torch.randint(values, shape).float()
        weight[torch.rand(shape) < 0.1] = torch.nan
        weight[torch.rand(shape) < 0.1] = torch.inf
        stored = shape[-1] * unit_size - int(torch.randint(unit_size, ()))
        lengths = torch.randint(1, stored + 1, shape[:-1], dtype=torch.int32) if ragged else None
        least = stored if lengths is None else int(lengths.min())
        count = torch.full(shape[:-1], stored) if lengths is None else lengths
        weight.masked_fill_(torch.arange(shape[-1]) * unit_size >= count[..., None], -torch.inf)
        for k in {1, 2, unit_size, unit_size + 1, least // 2, least - 1, least, stored} - {0, -1}:
            if k > stored:
                continue
            found = ranked(weight, k, stored, unit_size, lengths)
            for i, positions in enumerate(found.view(-1, k)):
                own = int(count.view(-1)[i])
                row = weight.view(-1, shape[-1])[i].repeat_interleave(unit_size)[:own]
                taken, rest = positions[positions < own].sort().values, positions[positions >= own]
                assert torch.equal(taken, select_top(row, min(k, own)))
                assert len(set(rest.tolist())) == len(rest) == max(0, k - own)


def naive_select(
    logits: Tensor, k: int, tokens: int, unit_size: int, sinks: Tensor | None, by_largest: bool
) -> tuple[list[int], Tensor]:
    """Select for one row and KV head: logits [G, U] to the tokens and their mass [G], token by token."""
    per_token = logits.double().repeat_interleave(unit_size, dim=-1)[:, :tokens]
    column = per_token.new_full((len(logits), 0), 0) if sinks is None else sinks.double()[:, None]
    weights = torch.cat((per_token, column), dim=-1).softmax(-1)[:, :tokens]
    chosen = top(weights.amax(0) if by_largest else weights.mean(0), k)
    return chosen, weights[:, chosen].sum(-1)


def mass_of(positions: Tensor, weight: Tensor, unit_size: int) -> Tensor:
    """Return the weight [B, H] of the chosen tokens, given that of one token of each unit, [B, H, U]."""
    group = weight.shape[1] // positions.shape[1]
    return weight.gather(-1, (positions.long() // unit_size).repeat_interleave(group, dim=1)).sum(-1)


@pytest.mark.parametrize("by_largest", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("unit_size", PAGE_SIZES)
def test_select_takes_the_largest_weights_of_a_group_and_reports_them(
    unit_size: int, ragged: bool, with_sinks: bool, by_largest: bool
) -> None:
    batch, heads, kv_heads, stored, k = 2, 6, 2, 83, 20
    logits = torch.randn(batch, heads, page_count(stored, unit_size)) * 3
    lengths = torch.tensor([[83, 41], [20, 60]], dtype=torch.int32) if ragged else None
    sinks = torch.randn(heads) + 2 if with_sinks else None
    if lengths is not None:
        # Units behind a row's end hold anything.
        for b in range(batch):
            for g in range(kv_heads):
                logits[b, 3 * g : 3 * g + 3, page_count(int(lengths[b, g]), unit_size) :] = torch.nan
    shape = {"stored": stored, "lengths": lengths, "kv_heads": kv_heads, "unit_size": unit_size}
    positions, weight = select(logits, k, sinks=sinks, by_largest=by_largest, **shape)
    assert positions.shape == (batch, kv_heads, k)
    assert positions.dtype == torch.int32
    assert weight.shape == logits.shape
    # Rows with fewer tokens than k have positions beyond them: whole units, whose weight is zero or nobody's.
    mass = mass_of(positions.clamp(max=stored - 1), weight, unit_size)
    for b in range(batch):
        for g in range(kv_heads):
            own = slice(3 * g, 3 * g + 3)
            tokens = stored if lengths is None else int(lengths[b, g])
            number = page_count(tokens, unit_size)
            sink = None if sinks is None else sinks[own]
            chosen, expected = naive_select(logits[b, own, :number], k, tokens, unit_size, sink, by_largest)
            assert positions[b, g].tolist() == chosen
            assert_near(mass[b, own], expected)


def test_selecting_everything_has_all_the_mass() -> None:
    positions, weight = select(torch.randn(1, 4, 9), 26, stored=26, lengths=None, kv_heads=2, unit_size=3)
    assert positions.tolist() == [[list(range(26))] * 2]
    assert_near(mass_of(positions, weight, 3), torch.ones(1, 4))


def test_broken_logits_spoil_their_own_row_and_head_only() -> None:
    logits = torch.randn(2, 4, 30)
    clean, clean_weight = select(logits, 7, stored=60, lengths=None, kv_heads=2, unit_size=2)
    for garbage in (torch.nan, torch.inf):
        spoilt = logits.clone()
        spoilt[1, 3, 8] = garbage
        found, weight = select(spoilt, 7, stored=60, lengths=None, kv_heads=2, unit_size=2)
        assert torch.equal(found[0], clean[0])
        assert torch.equal(found[1, 0], clean[1, 0])
        assert torch.equal(weight.view(4, 2, 30)[:3], clean_weight.view(4, 2, 30)[:3])
        assert found[1, 1].tolist() == sorted(set(found[1, 1].tolist()))
        assert found.max() < 60


EXTRAS = ["plain", "softcap", "sinks", "both"]


def settings_for(extras: str, heads: int) -> dict[str, Any]:
    softcap = 1.5 if extras in ("softcap", "both") else None
    return {"softcap": softcap, "sinks": torch.randn(heads) * 2 if extras in ("sinks", "both") else None}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_is_a_softmax_over_the_chosen(
    shape: tuple[int, ...], dtype: torch.dtype | None, extras: str, masked: bool
) -> None:
    batch, heads, kv_heads, head_dim, size = shape
    query, keys = torch.randn(batch, heads, head_dim), torch.randn(batch, kv_heads, size, head_dim)
    values = torch.randn(batch, kv_heads, size, head_dim + 3)
    settings = settings_for(extras, heads)
    chosen = [[torch.randperm(size)[:11].sort().values for _ in range(kv_heads)] for _ in range(batch)]
    positions = None if dtype is None else torch.stack([torch.stack(row) for row in chosen]).to(dtype)
    number = size if positions is None else 11
    mask = torch.rand(batch, kv_heads, number) > 0.4 if masked else None
    if mask is not None:
        mask[0, 0] = False
    seen = [
        [
            [
                i if positions is None else int(positions[b, g, i])
                for i in range(number)
                if mask is None or mask[b, g, i]
            ]
            for g in range(kv_heads)
        ]
        for b in range(batch)
    ]
    found = attend(query, keys, values, AttentionParams(0.4, **settings), positions, mask=mask)
    assert found.shape == (batch, heads, head_dim + 3)
    assert_near(found, attention(query, keys, values, 0.4, seen, **settings))
    if mask is not None:
        assert (found[0, : heads // kv_heads] == 0).all()


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_in_low_precision_errs_no_more_than_twice_plain_pytorch(dtype: torch.dtype, extras: str) -> None:
    query, keys = torch.randn(2, 6, 32).to(dtype), torch.randn(2, 2, 200, 32).to(dtype)
    values = torch.randn(2, 2, 200, 32).to(dtype)
    settings = settings_for(extras, 6)
    positions = torch.randperm(200)[:64].sort().values.expand(2, 2, 64)
    found = attend(query, keys, values, AttentionParams(32**-0.5, **settings), positions)
    reference = attention(query, keys[:, :, positions[0, 0]], values[:, :, positions[0, 0]], 32**-0.5, **settings)
    plain = plain_attention(query, keys[:, :, positions[0, 0]], values[:, :, positions[0, 0]], 32**-0.5, **settings)
    assert_as_precise(found, plain, reference)


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend in plain PyTorch, as a model's eager code does: everything in the inputs' dtype."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    logits = (query[:, :, None] @ keys.transpose(-1, -2)) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if sinks is not None:
        column = sinks.to(query.dtype).view(1, -1, 1, 1).expand(len(query), -1, -1, -1)
        logits = torch.cat((logits, column), dim=-1)
    weights = logits.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values)[:, :, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_attention_rounds_only_its_output(dtype: torch.dtype) -> None:
    rows, keys, values = (torch.randn(1, 2, n, 16).to(dtype) for n in (3, 200, 200))
    found = softmax_attention(rows, keys, values, AttentionParams(0.3, softcap=2.0))
    exact = softmax_attention(rows.double(), keys.double(), values.double(), AttentionParams(0.3, softcap=2.0))
    torch.testing.assert_close(found.double(), exact.double(), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_softmax_attention_is_in_float32_under_autocast(softcap: float | None) -> None:
    rows, keys, values = torch.randn(2, 1, 3, 16), torch.randn(2, 1, 40, 16), torch.randn(2, 1, 40, 8)
    params = AttentionParams(0.3, softcap=softcap, sinks=torch.randn(1, 1, 3))
    expected = softmax_attention(rows, keys, values, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert softmax_attention(rows, keys, values, params).equal(expected)


def test_softmax_attention_drops_weights_and_scales_the_rest() -> None:
    rows, keys, values = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 500, 8), torch.ones(1, 2, 500, 1)
    out = softmax_attention(rows, keys, values, AttentionParams(0.1), dropout=0.5)
    assert not torch.allclose(out, torch.ones(()))
    assert (out - 1).abs().max() < 0.3
    assert_near(softmax_attention(rows, keys, values, AttentionParams(0.1)), torch.ones(1, 2, 3, 1))


@pytest.mark.parametrize("extras", EXTRAS)
def test_every_part_gives_the_same_bits_twice(extras: str) -> None:
    query, keys, values = torch.randn(2, 6, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    settings = settings_for(extras, 6)

    def step() -> tuple[Tensor, ...]:
        logits = scored(query, keys, 3, 9, softcap=settings["softcap"])
        chosen, weight = select(logits, 50, stored=300, lengths=None, kv_heads=2, unit_size=3, sinks=settings["sinks"])
        return logits, chosen, weight, attend(query, keys, values, AttentionParams(0.3, **settings), chosen)

    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_attend_ignores_garbage_outside_its_choice() -> None:
    query, keys, values = torch.randn(1, 4, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    positions = torch.arange(5, 15).expand(1, 2, 10)
    clean = attend(query, keys, values, AttentionParams(0.3), positions)
    keys, values = F.pad(keys[:, :, 5:15], (0, 0, 5, 5), value=torch.nan), F.pad(values[:, :, 5:15], (0, 0, 5, 5))
    assert torch.equal(attend(query, keys, values, AttentionParams(0.3), positions), clean)
