"""The kernels of stage 1, in Triton's interpreter where there is no GPU, against the PyTorch reference.

Scores by what plain PyTorch manages, selections and copies exactly.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton has no package for this platform")

from pairs import pairs
from rocketkv.core import eviction
from rocketkv.core.compact import compact
from rocketkv.core.eviction import EvictionOps
from rocketkv.core.params import AttentionParams
from rocketkv.core.topk import select_top
from rocketkv.kernels import evict
from stage1 import prompt_positions
from tracking import Tracker

GOLDEN = Path(__file__).parents[1] / "golden"
INF, NAN = torch.inf, torch.nan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cpu" and not evict.INTERPRETED, reason="without a GPU, TRITON_INTERPRET=1 must precede triton"
    ),
]
not_finite = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of the interpreter


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with DEVICE:
        yield


PADDING = ["none", "left", "holes", "holes-per-head", "into-the-window", "right", "whole-row"]


def padding(kind: str, batch: int, kv_heads: int, size: int) -> Tensor | None:
    """Return [B, 1 or Hkv, S] bool, or None."""
    if kind == "none":
        return None
    valid = torch.ones(batch, 1, size, dtype=torch.bool)
    if kind == "left":
        valid[0, :, : size // 3] = False
    elif kind == "holes":
        valid = torch.rand(batch, 1, size) > 0.3
    elif kind == "holes-per-head":
        valid = torch.rand(batch, kv_heads, size) > 0.3
    elif kind == "into-the-window":
        valid[0, :, : size - 2] = False
    elif kind == "right":
        valid[-1, :, size - 3 :] = False
    elif kind == "whole-row":
        valid[-1] = False
    return valid


def kernel_ops() -> EvictionOps:
    return EvictionOps(evict.window_scores, evict.pool_scores, evict.select_top, evict.compact)


def exact_scores(query: Tensor, key: Tensor, params: AttentionParams, *, valid: Tensor | None = None) -> Tensor:
    """Return [B, Hkv, S - W] float64 from a softmax over whole rows."""
    scaling, softcap, sinks = params
    batch, heads, window, _ = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    keys = key.double().repeat_interleave(heads // kv_heads, dim=1)
    logits = query.double() @ keys.transpose(-1, -2) * scaling  # [B, H, W, S]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    own = torch.arange(size - window, size)[:, None]
    logits = logits.masked_fill(torch.arange(size) > own, -INF)
    if valid is not None:
        real = valid.expand(batch, kv_heads, size).repeat_interleave(heads // kv_heads, dim=1)
        logits = logits.masked_fill(~real[:, :, None], -INF)
    if sinks is not None:
        column = sinks.double().reshape(1, heads, 1, 1).expand(batch, heads, window, 1)
        logits = torch.cat((logits, column), dim=-1)
    weights = logits.softmax(-1).nan_to_num(nan=0.0)[..., :size]
    if valid is not None:
        weights = weights * real[:, :, -window:, None]
    return weights.sum(2).view(batch, kv_heads, -1, size).sum(2)[..., : size - window]


def assert_precise(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Assert an error of at most twice that of plain PyTorch, or of one bit of the largest score.

    Of root mean squares: few roundings decide the largest error, which differs as much between two libraries of BLAS.
    """
    assert found.dtype == torch.float32
    assert found.shape == plain.shape == exact.shape
    if exact.numel():
        error, allowed = ((scores.double() - exact).square().mean().sqrt() for scores in (found, plain))
        floor = torch.finfo(torch.float32).eps * exact.max()
        assert error <= max(2 * allowed, floor), f"error {error:.3g}, plain PyTorch's is {allowed:.3g}"


SCORED = [  # B, H, Hkv, D, S, W
    (1, 3, 3, 8, 41, 7),  # each query head its own KV head
    (2, 6, 2, 16, 67, 8),  # three query heads a group
    (2, 5, 1, 11, 29, 5),  # one KV head for all
    (1, 14, 2, 13, 97, 32),  # seven a group, more rows than a product takes
    (1, 2, 1, 4, 9, 9),  # nothing before the window
    (1, 2, 1, 4, 13, 9),
    (3, 4, 2, 6, 12, 1),
    (2, 6, 3, 1, 5, 1),  # one channel
    (1, 71, 1, 16, 40, 2),
    (1, 4, 1, 128, 130, 32),
    (1, 2, 1, 80, 65, 16),
    (1, 2, 2, 96, 64, 3),
    (1, 3, 1, 192, 70, 5),
    (1, 2, 1, 256, 66, 4),
    (1, 2, 1, 64, 300, 64),
]
EXTRAS = ["plain", "softcap", "sinks", "both", "padded"]


@pytest.fixture
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply in float64 and round once: how much a BLAS rounds depends on the processor."""
    if not evict.INTERPRETED:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def matmul(left: Any, right: Any, dtype: Any = None) -> Any:
        dtype = dtype or left.dtype
        return (left.astype(np.float64) @ right.astype(np.float64)).astype(dtype)

    numpy = SimpleNamespace(**{**vars(interpreter.np), "matmul": matmul})
    monkeypatch.setattr(interpreter, "np", numpy)


@pytest.mark.usefixtures("_exact_products")
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("shape", SCORED, ids=lambda shape: "-".join(map(str, shape)))
def test_window_scores_are_as_precise_as_plain_pytorch(
    shape: tuple[int, ...], extras: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evict, "SPLIT_KEYS", 64)
    batch, heads, kv_heads, head_dim, size, window = shape
    dtype = [torch.float32, torch.bfloat16, torch.float16][(SCORED.index(shape) + EXTRAS.index(extras)) % 3]
    query = (torch.randn(batch, heads, window, head_dim) * 2).to(dtype)
    key = torch.randn(batch, kv_heads, size, head_dim).to(dtype)
    softcap = 2.5 if extras in ("softcap", "both") else None
    sinks = torch.randn(heads, dtype=dtype) * 4 if extras in ("sinks", "both") else None
    valid = padding("holes-per-head" if extras == "padded" else "none", batch, kv_heads, size)
    given = query, key, AttentionParams(1 / math.sqrt(head_dim), softcap, sinks)
    plain, exact = eviction.window_scores(*given, valid=valid), exact_scores(*given, valid=valid)
    assert_precise(evict.window_scores(*given, valid=valid), plain, exact)


def test_window_scores_of_one_number() -> None:
    query, key = torch.randn(1, 1, 1, 1), torch.randn(1, 1, 2, 1)
    params = AttentionParams(0.7, 2.5, torch.randn(1))
    found = evict.window_scores(query, key, params)
    torch.testing.assert_close(found, exact_scores(query, key, params).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "sinks", "split"), pairs(PADDING, [False, True], [64, 1024]))
def test_window_scores_do_not_see_padding(kind: str, sinks: bool, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict, "SPLIT_KEYS", split)
    query, key = torch.randn(2, 6, 8, 16), torch.randn(2, 2, 75, 16)
    given = query, key, AttentionParams(0.5, sinks=torch.randn(6) if sinks else None)
    valid = padding(kind, 2, 2, 75)
    found = evict.window_scores(*given, valid=valid)
    assert_precise(found, eviction.window_scores(*given, valid=valid), exact_scores(*given, valid=valid))
    if valid is not None:
        hidden = ~valid.expand(2, 2, 75)
        assert (found[hidden[..., :67]] == 0).all()
        key[hidden] = NAN
        assert torch.equal(evict.window_scores(*given, valid=valid), found)


@not_finite
@pytest.mark.parametrize(("garbage", "sinks", "split"), pairs([NAN, INF, -INF], [False, True], [64, 1024]))
def test_a_broken_key_spoils_what_it_spoils_in_pytorch(
    garbage: float, sinks: bool, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evict, "SPLIT_KEYS", split)
    query, key = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 80, 16)
    params = AttentionParams(0.5, sinks=torch.randn(4) if sinks else None)
    clean = evict.window_scores(query, key, params)
    key[1, 1, 70, 3] = garbage
    found = evict.window_scores(query, key, params)
    torch.testing.assert_close(found, eviction.window_scores(query, key, params), equal_nan=True)
    others = torch.ones(2, 2, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(found[others], clean[others])
    kept = prompt_positions(query, key, 20, params, kernel_size=5, ops=kernel_ops())
    assert torch.equal(kept, prompt_positions(query, key, 20, params, kernel_size=5).int())


def views(tensor: Tensor) -> list[Tensor]:
    """Return [B, Hkv, S, D] in other layouts: of a larger buffer, of a fused projection, and with channels apart."""
    batch, kv_heads, size, head_dim = tensor.shape
    buffer = tensor.new_full((batch, kv_heads, size + 9, head_dim), NAN)
    buffer[:, :, :size] = tensor
    fused = tensor.new_full((batch, size, 3 * kv_heads * head_dim + 1), NAN)
    fused[..., 1 : 1 + kv_heads * head_dim] = tensor.transpose(1, 2).flatten(2)
    apart = tensor.transpose(2, 3).contiguous().transpose(2, 3)
    slices = fused[..., 1 : 1 + kv_heads * head_dim].unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)
    return [buffer[:, :, :size], slices, apart]


@pytest.mark.parametrize("layout", [0, 1, 2])
def test_layouts_do_not_matter(layout: int) -> None:
    query, key, value = torch.randn(2, 4, 5, 12), torch.randn(2, 2, 70, 12), torch.randn(2, 2, 70, 7)
    strided, strided_value = views(key)[layout], views(value)[layout]
    assert torch.equal(strided, key)
    turned, params = query.transpose(0, 1).contiguous().transpose(0, 1), AttentionParams(0.3)
    scores = evict.window_scores(query, key, params)
    assert torch.equal(evict.window_scores(turned, strided, params), scores)
    slots = select_top(scores, 30)
    expected = evict.compact(key, value, slots, None, None, 30, 40, 3)
    for found, wanted in zip(
        evict.compact(strided, strided_value, slots, None, None, 30, 40, 3), expected, strict=True
    ):
        assert found is not None
        assert wanted is not None
        assert torch.equal(found, wanted)


def reference_pooled(scores: Tensor, window: int, kernel_size: int, offset: int, valid: Tensor | None) -> Tensor:
    """Pool row by row and token by token: nothing shared with either implementation."""
    batch, kv_heads, older = scores.shape
    out = torch.full((batch, kv_heads, older + window), -INF)
    ahead = max(0, kernel_size // 2 - offset)
    for b in range(batch):
        for h in range(kv_heads):
            real = torch.ones(older + window, dtype=torch.bool) if valid is None else valid[b, h % valid.shape[1]]
            tokens = real[:older].nonzero()[:, 0]
            for at, token in enumerate(tokens.tolist()):
                pool = tokens[max(0, at + ahead + 1 - kernel_size) : at + ahead + 1]
                out[b, h, token] = scores[b, h][pool].max()  # NaN stays
            out[b, h, older:][real[older:]] = INF
    return out


@not_finite
@pytest.mark.parametrize(
    ("kind", "pool", "sizes"),
    pairs(PADDING, [(1, 0), (3, 0), (3, 2), (7, 0), (7, 2), (63, 0), (63, 5)], [(150, 6), (33, 32), (7, 1)]),
)
def test_pooling(kind: str, pool: tuple[int, int], sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel_size, offset), (size, window) = pool, sizes
    monkeypatch.setattr(evict, "POOL_CHUNK", 64)
    scores = torch.randint(0, 40, (2, 2, size - window)).float()
    scores[1, 0, (size - window) // 3] = NAN
    valid = padding(kind, 2, 2, size)
    found = evict.pool_scores(scores, window, kernel_size=kernel_size, pool_offset=offset, valid=valid)
    expected = reference_pooled(scores, window, kernel_size, offset, valid)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    if valid is None and not offset:
        plain = F.max_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)
        torch.testing.assert_close(found[..., : size - window], plain, equal_nan=True, rtol=0, atol=0)


def assert_same_selection(scores: Tensor, n: int) -> None:
    found = evict.select_top(scores, n)
    assert found.dtype == torch.int32
    assert torch.equal(found, select_top(scores, n).int())


SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny]


def drawn(values: str, *shape: int) -> Tensor:
    """Return scores of one kind."""
    if values == "ties":
        return torch.full(shape, 0.25)
    if values == "few":
        return torch.randint(-3, 4, shape).float()
    if values == "special":
        return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
    if values == "zeros":
        return torch.where(torch.rand(shape) > 0.5, 0.0, -0.0)
    if values == "close":  # apart in the last bits only
        return (torch.randint(0, 50, shape) + 0x3F800000).int().view(torch.float32)
    return torch.randn(shape)


@pytest.mark.parametrize("values", ["random", "ties", "few", "special", "close", "zeros"])
@pytest.mark.parametrize("size", [1, 2, 7, 63, 64, 65, 130])
def test_select_top(size: int, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict, "SELECT_CHUNK", 64)
    monkeypatch.setattr(evict, "COUNT_BLOCK", 2)
    assert_same_selection(drawn(values, 2, size), 1 + size // 3)
    for n in (1, size - 1, size):
        if n >= 1:
            assert_same_selection(drawn(values, size), n)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((130,), torch.float32),
        ((1, 90), torch.bfloat16),
        ((2, 3, 65), torch.float16),
        ((2, 3, 65), torch.float32),
        ((1, 2, 1, 70), torch.bfloat16),
    ],
)
def test_select_top_takes_any_shape_dtype_and_layout(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evict, "SELECT_CHUNK", 128)
    assert_same_selection(torch.randn(shape).to(dtype), 37)
    assert_same_selection(torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape)))), 37)


@pytest.mark.parametrize("values", ["random", "few", "special"])
@pytest.mark.parametrize("size", [4095, 4096, 4097, 13000])
def test_select_top_in_chunks_of_full_size(size: int, values: str) -> None:
    assert_same_selection(drawn(values, 2, size), 900)


@pytest.mark.parametrize("n", [0, -1, 8])
def test_select_top_refuses_an_impossible_number(n: int) -> None:
    with pytest.raises(ValueError, match=f"n must be between 1 and the 7 scores, got {n}"):
        evict.select_top(torch.zeros(2, 7), n)


# Pools of every size and padding are those of `test_pooling`.
@pytest.mark.parametrize(
    ("kind", "kernel_size"), [*((kind, 7) for kind in PADDING), ("none", 1), ("holes-per-head", 63)]
)
def test_prompt_positions_are_those_of_the_same_scores(
    kind: str, kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evict, "SELECT_CHUNK", 128)
    query, key, value = torch.randn(2, 4, 6, 16) * 2, torch.randn(2, 2, 130, 16), torch.randn(2, 2, 130, 9)
    params, valid = AttentionParams(0.25), padding(kind, 2, 2, 130)
    settings: dict[str, Any] = {"valid": valid, "kernel_size": kernel_size, "pool_offset": 3}
    scores = eviction.window_scores(query, key, params, valid=valid)
    ops = kernel_ops()._replace(window_scores=lambda *args, **kwargs: scores)
    for kept, counted in ((6, None), (51, None), (51, value)):
        found = prompt_positions(query, key, kept, params, value=counted, ops=ops, **settings)
        assert found.dtype == torch.int32
        assert torch.equal(found, prompt_positions(query, key, kept, params, value=counted, **settings).int())


@pytest.mark.parametrize("layer", [7, 22])
def test_golden_positions(layer: int) -> None:
    info = json.loads((GOLDEN / "params.json").read_text())
    data = load_file(GOLDEN / f"layer_{layer}.safetensors", device=str(DEVICE))
    key, query = data["key"][:, :, : info["prompt_length"]], data["query_window"]
    params, size = AttentionParams(64**-0.5), info["kernel_size"]
    scores = evict.window_scores(query, key, params)
    ops = kernel_ops()._replace(window_scores=lambda *args, **kwargs: scores)
    for budget in (64, 128, 256):
        kept = info["params"][f"layer_{layer}.budget_{budget}"]["prompt_budget"]
        found = prompt_positions(query, key, kept, params, kernel_size=size, ops=ops)
        assert torch.equal(found, data[f"kept_positions.budget_{budget}"].int())


def assert_compacts(keys: Tensor, values: Tensor, slots: Tensor | None, *others: Any) -> None:
    expected = compact(keys, values, None if slots is None else slots.long(), *others)
    for found, wanted in zip(evict.compact(keys, values, slots, *others), expected, strict=True):
        if wanted is None:
            assert found is None
        else:
            assert found is not None
            torch.testing.assert_close(found, wanted, equal_nan=True, rtol=0, atol=0)


COMPACTED = [  # B, Hkv, D, Dv, S, kept, capacity
    (1, 1, 1, 1, 1, 1, 1),  # one number
    (1, 2, 8, 8, 50, 20, 29),
    (2, 2, 16, 16, 60, 37, 37),  # no room beyond
    (2, 1, 11, 5, 70, 70, 75),
    (1, 3, 13, 13, 41, 1, 3),  # one token
    (1, 1, 80, 96, 60, 33, 40),
    (1, 1, 128, 128, 40, 32, 33),
    (1, 1, 192, 256, 30, 17, 21),
    (1, 1, 4, 4, 300, 290, 297),  # more than one tile
]


# Every shape with an index and without one; every page size in one tile and in more; a dtype with other pages.
@pytest.mark.parametrize(
    ("shape", "page_size"),
    [
        (shape, page_size)
        for i, shape in enumerate(COMPACTED)
        for j, page_size in enumerate((None, 1, 2, 3, 4, 7))
        if page_size is None or i == len(COMPACTED) - 1 or (i + 2 * j) % 3 == 0
    ],
    ids=str,
)
def test_compaction_of_a_prompt_without_padding(shape: tuple[int, ...], page_size: int | None) -> None:
    batch, kv_heads, head_dim, value_dim, size, kept, capacity = shape
    dtype = [torch.float32, torch.bfloat16, torch.float16][(COMPACTED.index(shape) + (page_size or 0)) % 3]
    keys = torch.randn(batch, kv_heads, size, head_dim).to(dtype)
    values = torch.randn(batch, kv_heads, size, value_dim).to(dtype)
    slots = select_top(torch.randn(batch, kv_heads, size), kept)
    assert_compacts(keys, values, slots.int(), None, None, kept, capacity, page_size)
    positions = torch.randint(0, 10**6, (batch, kv_heads, size + 5), dtype=torch.int32)
    assert_compacts(keys, values, slots, None, positions[:, :1], kept, capacity, page_size)
    # Everything stays: slots are not listed.
    assert_compacts(keys, values, None, None, None if batch == 2 else positions, size, size + 3, page_size)


@pytest.mark.parametrize(
    ("kind", "shape", "page_size", "evicts"),
    pairs(PADDING[1:], [(2, 2, 61, 12, 9), (3, 1, 48, 16, 16)], [None, 1, 3], [False, True]),
    ids=str,
)
def test_compaction_puts_padding_behind_the_tokens(
    kind: str, shape: tuple[int, ...], page_size: int | None, evicts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evict, "LIST_CHUNK", 16)
    batch, kv_heads, size, head_dim, value_dim = shape
    valid = padding(kind, batch, kv_heads, size)
    assert valid is not None
    keys = torch.randn(batch, kv_heads, size, head_dim).bfloat16()
    values = torch.randn(batch, kv_heads, size, value_dim).bfloat16()
    place = torch.arange(size, dtype=torch.int32)
    positions = torch.where(valid, place + 100, -1).int()
    slots = place.expand(batch, kv_heads, size)
    count = int(valid.sum(-1).max())
    if evicts:
        count = 25
        slots = select_top(torch.randn(batch, kv_heads, size).masked_fill(~valid, -INF), count)
    for given in (positions, None):
        assert_compacts(keys, values, slots, valid, given, count, count + 6, page_size)


def test_compaction_of_padding_alone() -> None:
    keys, slots = torch.randn(2, 2, 20, 8), torch.arange(20).expand(2, 2, 20)
    padding_alone = torch.zeros(2, 1, 20, dtype=torch.bool)
    new_keys, new_values, positions, lengths, index = evict.compact(keys, keys, slots, padding_alone, None, 0, 5, 2)
    assert new_keys.shape == new_values.shape == (2, 2, 5, 8)
    assert (positions == -1).all()
    assert index is not None
    assert not any(made.any() for made in (new_keys, new_values, lengths, index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [1, 2, 5])
def test_nan_and_infinity_stay_in_the_bounds(page_size: int, dtype: torch.dtype) -> None:
    keys = torch.randn(1, 2, 40, 6)
    for garbage in (NAN, INF, -INF):
        keys[torch.rand(keys.shape) < 0.1] = garbage
    keys = keys.to(dtype)
    slots = select_top(torch.randn(1, 2, 40), 31)
    assert_compacts(keys, keys.clone(), slots, None, None, 31, 36, page_size)


class Unlaunched:
    """A kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size >= 1 for size in grid)
        assert max(grid[1:], default=1) < 2**16  # what CUDA allows
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("padded", [False, True])
def test_scratch_of_a_128k_prompt_stays_under_64_mb(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in vars(evict).copy():
        if name.endswith("_kernel"):
            monkeypatch.setattr(evict, name, Unlaunched())
    size = 128 * 1024
    query = torch.zeros(1, 32, 32, 128, dtype=torch.bfloat16)
    key = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16).expand(1, 8, size, 128)
    valid = torch.ones(1, 1, size, dtype=torch.bool) if padded else None
    ranking: dict[str, Any] = {"kernel_size": 63, "valid": valid, "ops": kernel_ops()}
    for value in (None, key):
        with Tracker([query, key]) as tracker:
            found = prompt_positions(query, key, 6344, AttentionParams(128**-0.5), value=value, **ranking)
        assert found.shape == (1, 8, 6344)
        assert tracker.peak < 64 * 10**6
        assert not tracker.syncs()
