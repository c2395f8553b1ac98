"""Dense attention by blocks of rows, and the lazy mask that tells it who sees whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from close import assert_as_precise, assert_near
from naive import attention
from rocketkv.core import dense
from rocketkv.core.dense import VisibleBlock, dense_attention
from rocketkv.core.params import AttentionParams
from rocketkv.hf.masks import LazyMask
from tracking import Tracker

SLIDING = 7


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def sliding(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - SLIDING)


def blocks_of_tokens(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Causal, except that the tokens of an image (10 to 19) see each other."""
    image = (query >= 10) & (query < 20) & (key >= 10) & (key < 20)
    return (key <= query) | image


# They take tensors, as a model gives, and single numbers, as the loops below do.
FUNCTIONS: dict[str, Callable[..., Any]] = {"causal": causal, "sliding": sliding, "image": blocks_of_tokens}


def lazy(kind: str, length: int, size: int, batch: int = 2, padding: Tensor | None = None, **fields: Any) -> LazyMask:
    given: dict[str, Any] = {
        "mask_function": FUNCTIONS[kind],
        "padding": padding,
        "batch_size": batch,
        "query_length": length,
        "query_offset": size - length,
        "kv_length": size,
        "kv_offset": 0,
        "causal": kind == "causal",
        "device": torch.device("cpu"),
    }
    return LazyMask(**{**given, **fields})


def left_padding(batch: int, size: int) -> Tensor:
    padding = torch.ones(batch, size, dtype=torch.bool)
    padding[0, :11] = False
    padding[-1, :3] = False
    return padding


def visible_tokens(
    kind: str, query: int, size: int, padding: Tensor | None, batch: int, kv_heads: int
) -> list[list[list[int]]]:
    """List the tokens that a query sees in each row, one pair at a time."""

    def sees(row: int, key: int) -> bool:
        return bool(FUNCTIONS[kind](row, 0, query, key)) and (real is None or real[row][key])

    real = None if padding is None else padding.tolist()
    return [[[key for key in range(size) if sees(row, key)]] * kv_heads for row in range(batch)]


SHAPES = [  # B, H, Hkv, D, n, S
    (2, 3, 3, 8, 23, 23),
    (2, 6, 2, 5, 17, 31),
    (1, 5, 1, 16, 1, 30),
]


@pytest.fixture(params=[1, 700, 64 * 2**20], ids=["single-rows", "some-rows", "all-rows"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_attention_under_a_lazy_mask_is_a_softmax_over_what_is_visible(
    shape: tuple[int, ...], kind: str, padded: bool, extras: str
) -> None:
    batch, heads, kv_heads, head_dim, length, size = shape
    query = torch.randn(batch, heads, length, head_dim)
    key, value = torch.randn(batch, kv_heads, size, head_dim), torch.randn(batch, kv_heads, size, head_dim + 1)
    settings: dict[str, Any] = {
        "softcap": 1.3 if extras == "softcap" else None,
        "sinks": torch.randn(heads) if extras == "sinks" else None,
    }
    padding = left_padding(batch, size) if padded else None
    mask = lazy(kind, length, size, batch, padding)
    window = SLIDING if kind == "sliding" else None
    params = AttentionParams(0.4, **settings)
    found = dense_attention(query, key, value, params, lambda i, j: mask.block(i, j, size, window=window))
    assert found.shape == (batch, length, heads, head_dim + 1)
    for i in range(length):
        seen = visible_tokens(kind, size - length + i, size, padding, batch, kv_heads)
        assert_near(found[:, i], attention(query[:, :, i], key, value, 0.4, seen, **settings))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_masks_may_differ_between_kv_heads(softcap: float | None) -> None:
    query, key, value = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    allowed = torch.rand(2, 2, 9, 20) > 0.5

    def visible(start: int, stop: int) -> VisibleBlock:
        return VisibleBlock(0, 20, allowed[:, :, start:stop])

    found = dense_attention(query, key, value, AttentionParams(0.4, softcap), visible, mask_heads=2)
    for i in range(9):
        seen = [[allowed[b, g, i].nonzero()[:, 0].tolist() for g in range(2)] for b in range(2)]
        assert_near(found[:, i], attention(query[:, :, i], key, value, 0.4, seen, softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_do_not_come_from_what_is_hidden(softcap: float | None) -> None:
    query, key, value = (torch.randn(2, 2, 12, 8, requires_grad=True) for _ in range(3))
    padding = left_padding(2, 12)
    mask = lazy("causal", 12, 12, 2, padding)
    out = dense_attention(query, key, value, AttentionParams(0.4, softcap), lambda i, j: mask.block(i, j, 12))
    out.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert (tensor.grad[0, :, :11] == 0).all()
        assert tensor.grad[1, :, 3:].any()


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_row_of_only_padding_gives_zeros_and_garbage_in_padding_is_not_seen(softcap: float | None) -> None:
    query, key, value = torch.randn(3, 4, 12, 8), torch.randn(3, 2, 12, 8), torch.randn(3, 2, 12, 8)
    padding = left_padding(3, 12)
    padding[1] = False
    mask = lazy("causal", 12, 12, 3, padding)

    def attended() -> Tensor:
        return dense_attention(query, key, value, AttentionParams(0.4, softcap), lambda i, j: mask.block(i, j, 12))

    clean = attended()
    assert (clean[1] == 0).all()
    assert (clean[0, :11] == 0).all()
    assert not clean.isnan().any()
    key[0, :, :11], value[0, :, :11] = 1e30, -1e30
    assert torch.equal(attended(), clean)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_twice_plain_pytorch(dtype: torch.dtype, softcap: float | None) -> None:
    query, key, value = (torch.randn(1, 4, 64, 32).to(dtype) for _ in range(3))
    mask = lazy("sliding", 64, 64, 1)
    found = dense_attention(query, key, value, AttentionParams(0.2, softcap), lambda i, j: mask.block(i, j, 64))
    hidden = ~mask.block(0, 64, 64).mask  # type: ignore[operator]

    def plain(precision: torch.dtype) -> Tensor:
        logits = (query.to(precision) @ key.to(precision).transpose(-1, -2)) * 0.2
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value.to(precision)).transpose(1, 2)

    assert_as_precise(found, plain(dtype), plain(torch.float64))


def test_dropout_is_applied() -> None:
    query, key, value = torch.randn(1, 2, 50, 8), torch.randn(1, 1, 50, 8), torch.ones(1, 1, 50, 1)

    def visible(start: int, stop: int) -> VisibleBlock:
        return VisibleBlock(0, stop, torch.ones(1, 1, stop, stop, dtype=torch.bool).tril()[:, :, start:])

    for softcap in (None, 5.0):
        out = dense_attention(query, key, value, AttentionParams(0.1, softcap), visible, dropout=0.5)
        assert (out != 1).any()
        assert abs(float(out[:, 20:].mean()) - 1) < 0.2


def test_no_square_matrix_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_BYTES", 2**19)
    size = 2048
    query, key, value = torch.randn(1, 2, size, 4), torch.randn(1, 1, size, 4), torch.randn(1, 1, size, 4)
    mask = lazy("causal", size, size, 1, left_padding(1, size))
    for softcap in (None, 2.0):
        with Tracker([query, key, value]) as tracker:
            dense_attention(query, key, value, AttentionParams(0.4, softcap), lambda i, j: mask.block(i, j, size))
        # The mask of all rows would be 4 MiB in bytes, its logits 32 MiB; a block's is copied to floats.
        assert tracker.peak < 4 * 2**20


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("offset_as_tensor", [False, True])
def test_blocks_are_pieces_of_the_whole_mask(kind: str, padded: bool, offset_as_tensor: bool) -> None:
    length, size, start_of_keys = 19, 27, 4
    padding = left_padding(2, size + start_of_keys) if padded else None
    first_query = size + start_of_keys - length
    mask = lazy(
        kind,
        length,
        size,
        padding=padding,
        kv_offset=start_of_keys,
        query_offset=torch.tensor(first_query) if offset_as_tensor else first_query,
    )
    assert mask.shape == tuple(mask.size()) == (2, 1, length, size)
    assert mask.ndim == mask.dim() == 4
    assert mask.to("cpu") is mask.contiguous() is mask
    window = SLIDING if kind == "sliding" else None
    for first, last in [(0, 1), (0, 19), (3, 11), (18, 19)]:
        for given in (None, window):
            block = mask.block(first, last, size, window=given)
            assert block.mask is not None
            found = F.pad(block.mask.expand(2, 1, -1, -1), (block.start, size - block.stop))
            for row in range(2):
                for i in range(first, last):
                    seen = visible_tokens(kind, first_query + i, size + start_of_keys, padding, 2, 1)[row][0]
                    visible = [key - start_of_keys for key in seen if key >= start_of_keys]
                    assert found[row, 0, i - first].nonzero()[:, 0].tolist() == visible


@pytest.mark.parametrize("kind", ["causal", "sliding"])
def test_a_mask_is_evaluated_at_stored_positions(kind: str) -> None:
    mask = lazy(kind, 5, 30)
    positions = torch.tensor([[[-1, 3, 20, 26, 29], [22, 23, 24, 25, -1]], [[0, 1, 2, 3, 4], [24, 25, 26, 27, 28]]])
    found = mask.block_at(1, 4, positions.int())
    assert found.shape == (2, 2, 3, 5)
    for i in range(3):
        query = 25 + 1 + i
        expected = (positions <= query) & (positions >= 0)
        if kind == "sliding":
            expected &= positions > query - SLIDING
        assert torch.equal(found[:, :, i], expected)


def test_keys_that_the_padding_mask_does_not_reach_are_padding() -> None:
    short = torch.ones(2, 8, dtype=torch.bool)
    mask = lazy("causal", 10, 10, padding=short)
    assert mask.padded
    block = mask.block(9, 10, 10)
    assert block.mask is not None
    assert block.mask[:, 0, 0].tolist() == [[True] * 8 + [False] * 2] * 2
    valid = mask.valid_tokens(5, 10)
    assert valid is not None
    assert valid.tolist() == [[True] * 3 + [False] * 2] * 2


def test_the_longest_row_is_counted_without_padding() -> None:
    mask = lazy("causal", 30, 30, padding=left_padding(2, 30))
    assert [mask.longest_row(stop) for stop in (30, 20, 2)] == [27, 17, 0]
    assert lazy("causal", 30, 30).longest_row(21) == 21
    assert lazy("causal", 30, 30, padding=ones(30)).longest_row(21) == 21


def ones(size: int) -> Tensor:
    return torch.ones(2, size, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda: lazy("causal", 10, 10), True),
        (lambda: lazy("causal", 10, 10, padding=ones(10)), True),
        (lambda: lazy("causal", 1, 10), True),
        (lambda: lazy("causal", 10, 10, padding=left_padding(2, 10)), False),
        # One query: asking for padding would make the host wait, so any may be there.
        (lambda: lazy("causal", 1, 10, padding=ones(10)), False),
        (lambda: lazy("causal", 4, 10), False),
        (lambda: lazy("sliding", 10, 10), False),
        # A static cache has room behind the queries.
        (lambda: lazy("causal", 10, 16, query_offset=0, kv_length=16), False),
        (lambda: lazy("causal", 1, 16, query_offset=torch.tensor(9), kv_length=16), False),
        (lambda: lazy("causal", 10, 10, query_offset=torch.tensor(0)), True),
    ],
)
def test_plain_is_what_a_causal_kernel_computes(make: Callable[[], LazyMask], plain: bool) -> None:
    assert make().plain is plain


def test_a_single_query_asks_no_device() -> None:
    padding = left_padding(2, 30)
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    with Tracker() as tracker:
        mask = lazy("causal", 1, 30, padding=padding)
        assert not mask.plain
        dense_attention(query, key, value, AttentionParams(0.4), lambda i, j: mask.block(i, j, 30))
    assert tracker.syncs() == []
