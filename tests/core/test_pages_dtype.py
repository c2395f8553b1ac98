"""An index in 8 bits: bounds as PyTorch rounds them, wherever they are written, and every other part as with 16."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from close import assert_near
from rocketkv import RocketKVConfig
from rocketkv.budget import BudgetSplit
from rocketkv.cli.main import main as cli
from rocketkv.core.compact import compact
from rocketkv.core.pages import FLOAT8, build_pages, grow_pages, index_dtype_of, rounded, score_pages
from rocketkv.core.params import AttentionParams
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.state.compress import close_prompt
from rocketkv.state.stats import store_stats
from rocketkv.state.store import KVStore
from static import inputs_of, own_loop
from tiny import build, prompt
from turns import HKV, KERNEL, PROMPT, RESERVE, SCALING, D, Tokens, decode, extend, left_padding, tokens

SPLIT = BudgetSplit(token_budget=16, kept_tokens=40, page_size=2, channels=4, top_k=8)


def need_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    if torch.cuda.is_available():
        pytest.skip("kernels that are compiled for a GPU take no tensors of the CPU")


def finite(dtype: torch.dtype) -> Tensor:
    """Return all finite values of a format, ascending, in float32."""
    values = torch.arange(256).to(torch.uint8).view(dtype).float()
    return values[values.isfinite()].unique()


def awkward(dtype: torch.dtype) -> Tensor:
    """Return values that are exact, half-way and next to it, tiny and of every size within the range."""
    exact = finite(dtype)
    middle = (exact[1:] + exact[:-1]) / 2
    near = (torch.nextafter(middle, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    sizes = torch.randn(4000) * 2.0 ** torch.randint(-30, 5, (4000,))
    return torch.cat((exact, middle, *near, sizes, torch.tensor([0.0, -0.0, 1e-40, -1e-40])))


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each value's nearest of a format, of two as near the one whose bits are even."""
    exact = finite(dtype).double()
    distance = (values.double()[:, None] - exact).abs()
    even = exact.to(dtype).view(torch.uint8) % 2 == 0
    best = distance == distance.amin(-1, keepdim=True)
    return exact[(best * 2 + (best & even)).int().argmax(-1)].float()


def test_bounds_are_rounded_to_the_nearest_as_torch_does() -> None:
    values = awkward(FLOAT8)
    found = rounded(values, FLOAT8)
    assert found.dtype == FLOAT8
    assert torch.equal(found.float(), values.to(FLOAT8).float())
    assert torch.equal(found.float(), nearest(values, FLOAT8))


def test_what_is_out_of_range_becomes_its_end_and_nan_stays() -> None:
    end = finite(FLOAT8)[-1].item()
    given = torch.tensor([end, 1.03 * end, 1e30, torch.inf, -end, -1.2 * end, -torch.inf, torch.nan])
    expected = torch.tensor([end] * 4 + [-end] * 3 + [torch.nan])
    torch.testing.assert_close(rounded(given, FLOAT8).float(), expected, equal_nan=True, rtol=0, atol=0)
    half = given.to(torch.bfloat16).clamp(-1e30, 1e30)
    torch.testing.assert_close(rounded(half, FLOAT8).float(), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("keys_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 3])
def test_a_built_index_is_the_exact_one_rounded(page_size: int, keys_dtype: torch.dtype) -> None:
    keys = (torch.randn(2, 2, 131 * page_size + 5, 6) * 300).to(keys_dtype)
    keys[0, 1, 7, 2] = torch.nan
    exact = build_pages(keys, 130 * page_size + 1, page_size)
    found = build_pages(keys, 130 * page_size + 1, page_size, FLOAT8)
    assert found.dtype == FLOAT8
    torch.testing.assert_close(found.float(), rounded(exact, FLOAT8).float(), equal_nan=True, rtol=0, atol=0)
    grown = grow_pages(found, 300 * page_size, page_size)
    assert grown.dtype == FLOAT8
    assert grown.shape[2] == 3
    torch.testing.assert_close(grown[:, :, :2].float(), found.float(), equal_nan=True, rtol=0, atol=0)
    assert not grown[:, :, 2].float().any()


def closed(
    dtype: torch.dtype | None, given: Tokens, valid: Tensor | None = None, split: BudgetSplit = SPLIT, **fields: Any
) -> KVStore:
    """Return a store whose prompt is over."""
    store = KVStore()
    extend(store, given, valid)
    settings = {"decode_reserve": RESERVE, "kernel_size": KERNEL, "index_dtype": dtype, **fields}
    close_prompt(store, split, AttentionParams(SCALING), **settings)
    return store


def index_of(store: KVStore) -> Tensor:
    return store.decoding.buffers.index_tensors[0]


def assert_index_is_right(store: KVStore, dtype: torch.dtype) -> None:
    """Assert that each row's full pages hold what an index built of that row alone does."""
    keys, seq_lens, index = store.decoding.keys, store.decoding.buffers.seq_lens, index_of(store)
    assert index.dtype == dtype
    page_size = store.decoding.split.page_size
    for b, g in product(*map(range, seq_lens.shape)):
        length = int(seq_lens[b, g])
        rebuilt = build_pages(keys[b : b + 1, g : g + 1], length, page_size, dtype)[0, 0].float()
        pages = torch.arange(length // page_size)
        found = index[b, g].float()[pages // 128, :, pages % 128]
        assert torch.equal(found, rebuilt[pages // 128, :, pages % 128])


@pytest.mark.parametrize("page_size", [1, 2, 5])
@pytest.mark.parametrize("lengths", [(60, 60), (60, 33)], ids=str)
def test_appending_one_by_one_equals_building_at_once(lengths: tuple[int, ...], page_size: int) -> None:
    valid = None if min(lengths) == PROMPT else left_padding(lengths, PROMPT)
    store = closed(FLOAT8, tokens(2, PROMPT), valid, replace(SPLIT, page_size=page_size))
    for _ in range(9):  # beyond the room that there is: it grows
        decode(store, tokens(2, 7))
        assert_index_is_right(store, FLOAT8)


@pytest.mark.parametrize("lengths", [None, (37, 40)], ids=str)
@pytest.mark.parametrize("page_size", [1, 3])
def test_scores_are_those_of_the_rounded_bounds(page_size: int, lengths: tuple[int, ...] | None) -> None:
    query, keys = torch.randn(2, 6, D), torch.randn(2, HKV, 47, D)
    index = build_pages(keys, 40, page_size, FLOAT8)
    rows = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)[:, None].expand(2, HKV)

    def score(bounds: Tensor) -> Tensor:
        params, sizes = AttentionParams(SCALING), {"page_size": page_size, "channels": 5}
        return score_pages(query, bounds, keys, params, stored=40, lengths=rows, **sizes)

    found = score(index)
    assert found.dtype == torch.float32
    assert_near(found, score(index.float()))
    # The open page is derived from the keys: exact, as with an index in the keys' own dtype.
    exact = score(build_pages(keys, 40, page_size))
    if page_size == 3 and lengths is None:
        assert_near(found[..., -1], exact[..., -1])
    assert not torch.allclose(found, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lengths", [(60, 60, 60), (60, 33, 47)], ids=str)
def test_rows_copies_and_crops_go_their_own_way(lengths: tuple[int, ...]) -> None:
    valid = None if min(lengths) == PROMPT else left_padding(lengths, PROMPT)
    given, early, late = tokens(3, PROMPT), tokens(3, 6), tokens(3, 11)
    store = closed(FLOAT8, given, valid)
    decode(store, early)
    copied = copy.deepcopy(store)
    rows = torch.tensor([2, 0, 0])
    reordered, repeated, chosen = (copy.deepcopy(store) for _ in range(3))
    reordered.map(lambda tensor: tensor.index_select(0, rows))
    repeated.map(lambda tensor: tensor.repeat_interleave(2, dim=0))
    chosen.map(lambda tensor: tensor[rows[:1]])
    cropped = copy.deepcopy(store)
    decode(cropped, tokens(3, 5))
    cropped.crop(PROMPT + len(early))
    expected = decode(store, late)
    assert_near(decode(copied, late), expected)
    assert_near(decode(cropped, late), expected)
    assert_near(decode(reordered, late.rows(rows)), expected[rows])
    assert_near(decode(repeated, late.rows(torch.arange(3).repeat_interleave(2))), expected.repeat_interleave(2, dim=0))
    assert_near(decode(chosen, late.rows(rows[:1])), expected[rows[:1]])
    for each in (store, copied, cropped, reordered, repeated, chosen):
        assert_index_is_right(each, FLOAT8)


def test_a_static_index_stays_where_it_is_when_rows_are_reordered() -> None:
    store = closed(FLOAT8, tokens(3, PROMPT), decode_capacity=RESERVE)
    place = index_of(store).data_ptr()
    rows = torch.tensor([1, 2, 0])
    store.map(lambda tensor: tensor.index_select(0, rows))
    assert index_of(store).data_ptr() == place
    assert_index_is_right(store, FLOAT8)


def test_bytes_are_those_that_live_and_nominal_ones_do_not_change() -> None:
    given = tokens(2, PROMPT)
    given = Tokens(*(tensor.to(torch.float16) for tensor in (given.query, given.key, given.value)))
    plain, store = closed(None, given), closed(FLOAT8, given)
    before, found = store_stats(plain), store_stats(store)
    assert index_of(store).untyped_storage().nbytes() == found.index_bytes == before.index_bytes // 2
    scored = 2 * HKV * 128 * 4  # rows, one tile of pages, channels
    assert before.step_bytes - found.step_bytes == scored
    assert replace(found, index_bytes=0, step_bytes=0) == replace(before, index_bytes=0, step_bytes=0)


@pytest.mark.parametrize("method", ["rocketkv", "quest", "sparq", "snapkv"])
@pytest.mark.integration
def test_a_generation_allocates_what_was_planned(method: str) -> None:
    settings: dict[str, Any] = {"method": method, "index_dtype": "float8_e5m2"}
    model = build().to(torch.bfloat16)
    with rocketkv.patch(model, **settings, token_budget=48, decode_reserve=40) as handle:
        model.generate(prompt(331), max_new_tokens=1, do_sample=False)
        expected = handle.stats().layers
    from rocketkv import plan

    made = plan(model.config, **settings, context=331, token_budget=48, decode_reserve=40)
    assert made.cache.layers == expected
    plain = plan(model.config, method=method, context=331, token_budget=48, decode_reserve=40)
    assert made.split == plain.split
    assert made.cache.total("nominal_step_bytes") == plain.cache.total("nominal_step_bytes")
    assert 2 * made.cache.total("index_bytes") == plain.cache.total("index_bytes")
    assert (made.cache.total("step_bytes") < plain.cache.total("step_bytes")) == (method != "snapkv")


@pytest.mark.integration
def test_the_plan_says_which(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    build().config.save_pretrained(tmp_path)
    command = ["plan", "--model", str(tmp_path), "--context", "300", "--budget", "48", "--reserve", "40"]
    command += ["--method", "rocketkv"]
    assert cli([*command, "--index-dtype", "float8_e5m2"]) == 0
    assert "bfloat16, index float8_e5m2\n" in capsys.readouterr().out
    assert cli([*command, "--index-dtype", "float8_e5m2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["index_dtype"] == "float8_e5m2"
    with pytest.raises(SystemExit):
        cli([*command, "--index-dtype", "int8"])


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.integration
def test_a_model_generates_with_it(kernels: str) -> None:
    if kernels == "triton":
        need_interpreter()
    model = build()
    with rocketkv.patch(model):
        fields: dict[str, Any] = {"index_dtype": "float8_e5m2", "backend": kernels}
        growing, _, cache = own_loop(model, inputs_of("one"), model, 8, **fields, decode_capacity=None)
        static, _, static_cache = own_loop(model, inputs_of("one"), model, 8, **fields)
        plain, _, _ = own_loop(model, inputs_of("one"), model, 8, **{**fields, "backend": "torch"})
    for layer in (*rocketkv_layers(cache), *rocketkv_layers(static_cache)):
        assert index_of(layer.store).dtype == FLOAT8
    assert torch.equal(growing, static)
    assert torch.equal(growing, plain)


def test_an_unknown_name_is_refused_with_the_list() -> None:
    message = "index_dtype must be one of keys, float8_e5m2; got 'float8'"
    with pytest.raises(ValueError, match=re.escape(message)):
        RocketKVConfig(method="rocketkv", index_dtype="float8")
    assert index_dtype_of(RocketKVConfig().index_dtype) is None
    assert index_dtype_of(RocketKVConfig(method="rocketkv", index_dtype="float8_e5m2").index_dtype) == FLOAT8


@pytest.mark.parametrize("page_size", [1, 2, 3])
@pytest.mark.parametrize("keys_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compaction_by_the_kernel_rounds_alike(keys_dtype: torch.dtype, page_size: int) -> None:
    need_interpreter()
    from rocketkv.kernels import evict

    keys = (torch.randn(2, 2, 50, 11) * 300).to(keys_dtype)
    keys[1, 0, 3, 4] = torch.nan
    keys[0, 0, 5, 1] = torch.inf
    slots = torch.rand(2, 2, 50).argsort(-1)[..., :41].sort(-1).values
    arguments = (keys, keys, slots, None, None, 41, 47, page_size, FLOAT8)
    for found, expected in zip(evict.compact(*arguments), compact(*arguments), strict=True):
        assert found is not None
        assert expected is not None
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.double(), expected.double(), equal_nan=True, rtol=0, atol=0)


def test_compaction_rounds_every_value_as_torch_does() -> None:
    need_interpreter()
    from rocketkv.kernels import evict

    keys = awkward(FLOAT8)[None, None, :, None].contiguous()
    count = keys.shape[2]
    index = evict.compact(keys, keys, None, None, None, count, count, 1, FLOAT8)[4]
    assert index is not None
    assert torch.equal(index[0, 0, :, 0].float().flatten()[:count], rounded(keys, FLOAT8).float().flatten())
