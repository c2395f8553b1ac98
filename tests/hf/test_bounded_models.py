"""Bounded decoding through models: exact while there is room; then nothing grows, and caches are taken along."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from close import assert_near
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.compiled import TORCH
from rocketkv.hf.layer import RocketKVLayer, rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from static import compiling, inputs_of, own_loop, places
from tiny import SETTINGS, SMALL, build, greedy, left_padded, prompt
from turns import last_queries

# That steps are not compiled is said, which is tested in test_compiled.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:RocketKV runs these decode steps eagerly"),
    # Triton 3.2's interpreter
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
traced = pytest.mark.skipif(TORCH < (2, 7), reason="this PyTorch does not trace models of newer transformers")

ROOM = 24  # half of it is kept
BOUNDED: dict[str, Any] = {**SMALL, "decode_capacity": ROOM}


def forward(model: Any, cache: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, **{CACHE_ARGUMENT: cache}, use_cache=True, **kwargs).logits
    return logits


def read(model: Any, rows: str, **fields: Any) -> tuple[RocketKVCache, Tensor]:
    """Return a cache that has read a prompt, and the position [B, 1] of what comes next."""
    inputs = inputs_of(rows)
    mask = inputs["attention_mask"]
    cache = RocketKVCache(model.config, prompt_length=mask.shape[1], **{**BOUNDED, **fields})
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    forward(model, cache, inputs["input_ids"], attention_mask=mask, position_ids=position)
    return cache, position[:, -1:] + 1


def forced(model: Any, cache: Any, ids: Tensor, position: Tensor) -> Tensor:
    """Decode given tokens [B, n], the first at `position`; return their logits [B, n, V]."""
    logits = []
    for i in range(ids.shape[1]):
        given = {"position_ids": position + i}
        if position.shape[0] == 1:
            given = {}
        logits.append(forward(model, cache, ids[:, i : i + 1], **given))
    return torch.cat(logits, dim=1)


def rows_of(rows: str) -> int:
    return int(inputs_of(rows)["input_ids"].shape[0])


@pytest.mark.integration
@pytest.mark.parametrize("rows", ["one", "padded"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss"])
def test_exact_until_the_room_is_used(family: str, rows: str) -> None:
    model, count = build(family), 40
    ids = prompt(count, rows=rows_of(rows), seed=8)
    with rocketkv.patch(model, **BOUNDED):
        growing = forced(model, *reversed_pair(ids, read(model, rows, decode_capacity=None)))
        bounded = forced(model, *reversed_pair(ids, read(model, rows)))
    assert_near(bounded[:, :ROOM], growing[:, :ROOM], 1e-4)
    assert bounded.isfinite().all()
    assert (bounded[:, ROOM:] - growing[:, ROOM:]).abs().max() > 1e-2


def reversed_pair(ids: Tensor, made: tuple[RocketKVCache, Tensor]) -> tuple[RocketKVCache, Tensor, Tensor]:
    return made[0], ids, made[1]


@pytest.mark.integration
@pytest.mark.parametrize("method", ["rocketkv", "rocketkv-mt", "snapkv", "stored-topk"])
def test_generate_is_the_loop(method: str) -> None:
    split = rocketkv.RocketKVConfig(**{**SETTINGS, "token_budget": 24}, method=method).split_for(90, 16)
    fields = {**BOUNDED, "method": method, "split": split, "when_full": "evict"}
    model = build()
    with rocketkv.patch(model, **fields) as handle:
        for rows in ("one", "padded"):
            expected, logits, cache = own_loop(model, inputs_of(rows), model, 45, **fields)
            found, found_logits, _ = greedy(model, inputs_of(rows), 45)
            assert found.equal(expected)
            assert_near(found_logits, logits, 1e-4)
            stats = handle.stats()
            assert stats.total_bytes == cache.stats().total_bytes
            assert {layer.tokens_stored for layer in stats.layers} == {cache.layers[0].store.stored}
            assert stats.layers[0].tokens_stored <= (split.kept_tokens or 0) + ROOM
            assert stats.tokens_seen == 90 + 44


@pytest.mark.integration
def test_a_padded_batch_is_its_rows_alone() -> None:
    model = build()
    ids = prompt(45, rows=3, seed=8)
    inputs = inputs_of("padded")
    with rocketkv.patch(model, **BOUNDED):
        cache, position = read(model, "padded")
        together = forced(model, cache, ids, position)
        for b, (row, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            own = row[mask.bool()][None]
            alone = RocketKVCache(model.config, prompt_length=own.shape[1], **BOUNDED)
            forward(model, alone, own)
            assert_near(forced(model, alone, ids[b : b + 1], position[b : b + 1])[0], together[b], 1e-4)


def test_nothing_grows_over_a_dozen_evictions() -> None:
    model = build(num_hidden_layers=1)
    capacity, period, count, every = 64, 32, 480, 4
    ids = prompt(count, seed=8)
    with rocketkv.patch(model, **SMALL):
        cache, _ = read(model, "one", decode_capacity=capacity)
        before, bytes_read, live = places(cache), [], []
        for i in range(count):
            forward(model, cache, ids[:, i : i + 1])
            if i % every == every - 1:
                stats = cache.stats()
                bytes_read.append(stats.total("step_bytes"))
                live.append(stats.total_bytes)
    assert stats.tokens_seen == 90 + count
    assert set(live) == {live[0]}
    assert places(cache) == before
    # From the first eviction on, each step reads what the one a period before it has read.
    full, period = capacity // every, period // every
    assert bytes_read[full + period :] == bytes_read[full:-period]
    assert max(bytes_read) == max(bytes_read[:full])
    assert stats.layers[0].tokens_stored <= 40 + capacity


@traced
@pytest.mark.integration
@pytest.mark.parametrize(("rows", "generates"), [("padded", False), ("one", True)])
def test_compiled_steps_evict_between_them(rows: str, generates: bool) -> None:
    fields = {**BOUNDED, "when_full": "evict"}
    model = build()
    handle = rocketkv.patch(model, **fields)
    torch._dynamo.reset()
    expected, logits, eager = own_loop(model, inputs_of(rows), model, 45, **fields)
    if generates:
        found, found_logits, cache = greedy(model, inputs_of(rows), 45, compile_config=compiling("eager"))
    else:
        compiled = handle.compile_step(backend="eager")
        with torch.inference_mode():
            found, found_logits, cache = own_loop(model, inputs_of(rows), compiled, 45, **fields)
    torch._dynamo.reset()
    assert found.equal(expected)
    assert_near(found_logits, logits, 1e-4)
    for layer, other in zip(rocketkv_layers(cache), rocketkv_layers(eager), strict=True):
        assert layer.store.stored == other.store.stored
        assert layer.store.phase.positions is not None
        assert other.store.phase.positions is not None
        assert layer.store.phase.positions.equal(other.store.phase.positions)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["full", "quest", "sparq", "streaming", "exact-topk"])
def test_methods_without_a_stage_1_end_as_before(method: str) -> None:
    model = build()
    with rocketkv.patch(model, **SETTINGS, method=method, token_budget=24, decode_capacity=20):
        assert greedy(model, prompt(60), 21)[0].shape[1] == 21
        with pytest.raises(ValueError, match="room for decode_capacity=20 generated tokens"):
            greedy(model, prompt(60), 22)


@pytest.mark.integration
def test_too_little_room_to_rank_says_how_much_is_enough() -> None:
    model = build()
    for fields, message in (
        ({"decode_capacity": 15}, "decode_capacity=15 .* twice window_size is enough"),
        ({"decode_capacity": 20, "when_full": "raise"}, "decode_capacity=20 .* with when_full='evict'"),
    ):
        with rocketkv.patch(model, **{**SMALL, **fields}), pytest.raises(ValueError, match=message):
            greedy(model, prompt(60), 22)
    with rocketkv.patch(model, **{**SMALL, "decode_capacity": 16}):
        assert greedy(model, prompt(60), 50)[0].shape[1] == 50


@pytest.mark.integration
@pytest.mark.parametrize("rows", ["one", "padded"])
def test_a_cache_is_taken_along_from_behind_an_eviction(rows: str, tmp_path: Path) -> None:
    model, inputs = build(), inputs_of(rows)
    ids = prompt(60, rows=rows_of(rows), seed=8)
    order = torch.arange(rows_of(rows)).flip(0)
    with rocketkv.patch(model, **BOUNDED):
        cache, position = read(model, rows)
        first = forced(model, cache, ids[:, :30], position)
        taken, fork, reordered, selected = cache.snapshot(), *(copy.deepcopy(cache) for _ in range(3))
        path = tmp_path / "cache.safetensors"
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(ids[:, :30])), dim=1)
        whole = torch.cat((inputs["input_ids"], ids[:, :30]), dim=1)
        rocketkv.save_cache(cache, path, model=model, ids=whole, attention_mask=mask)
        expected = forced(model, cache, ids[:, 30:], position + 30)
        assert forced(model, fork, ids[:, 30:], position + 30).equal(expected)
        loaded = rocketkv.load_cache(path, model)
        assert_near(forced(model, loaded, ids[:, 30:], position + 30), expected, 1e-4)
        for layer, other in zip(rocketkv_layers(loaded), rocketkv_layers(cache), strict=True):
            assert layer.store.phase.positions is not None
            assert other.store.phase.positions is not None
            assert layer.store.phase.positions.equal(other.store.phase.positions)
        reordered.reorder_cache(order)
        selected.batch_select_indices(order)
        for each in (reordered, selected):
            assert_near(forced(model, each, ids[order, 30:], position[order] + 30), expected[order], 1e-5)
        for count in (30, 7, 20):
            cache.rollback(taken)
            assert forced(model, cache, ids[:, 30 : 30 + count], position + 30).equal(expected[:, :count])
        assert first.isfinite().all()


@pytest.fixture
def queries_seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[int, Tensor]]:
    """By the `id` of each layer, the last query that was given for each position."""
    seen: dict[int, dict[int, Tensor]] = {}
    attend = RocketKVLayer.attend

    def recorded(self: RocketKVLayer, query: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Tensor:
        own = seen.setdefault(id(self), {})
        for i in range(query.shape[2]):
            own[self.store.seen + i] = query[:, :, i].clone()
        return attend(self, query, mask, *args, **kwargs)

    monkeypatch.setattr(RocketKVLayer, "attend", recorded)
    return seen


@pytest.mark.integration
@pytest.mark.parametrize("drafts", [2, 5, 10])
def test_drafts_that_are_dropped_leave_no_queries(drafts: int, queries_seen: dict[int, dict[int, Tensor]]) -> None:
    model = build()
    # A text that repeats itself, so that drafts are found.
    ids = prompt(30).repeat(1, 3)
    with rocketkv.patch(model, **BOUNDED):
        plain = greedy(model, ids, 60)[0]
        queries_seen.clear()
        found, _, cache = greedy(model, ids, 60, prompt_lookup_num_tokens=drafts)
    same = int((found[0] == plain[0]).cumprod(0).sum())
    assert same > ROOM - drafts, "exact until the room is used"
    for layer in rocketkv_layers(cache):
        queries, seen = last_queries(layer.store), layer.store.seen
        assert 0 < queries.shape[2] <= 8
        for i in range(queries.shape[2]):
            at = seen - queries.shape[2] + i
            assert queries[:, :, i].equal(queries_seen[id(layer)][at])
        assert layer.store.stored <= 40 + ROOM
        assert layer.store.phase.positions is not None
        assert int(layer.store.phase.positions.max()) == seen - 1


@pytest.mark.integration
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("rows", ["one", "padded"])
def test_the_history_keeps_what_decoding_evicted(rows: str, device: str | None) -> None:
    # With one layer, keys and values do not depend on what was attended to before.
    model = build(num_hidden_layers=1)
    fields = {**BOUNDED, "method": "rocketkv-mt", "history_device": device}
    answer, turn = prompt(45, rows=rows_of(rows), seed=8), prompt(12, rows=rows_of(rows), seed=9)
    mask = torch.cat((inputs_of(rows)["attention_mask"], torch.ones_like(answer), torch.ones_like(turn)), dim=1)
    logits = []
    with rocketkv.patch(model, **fields):
        for capacity in (None, ROOM):
            cache, position = read(model, rows, **{**fields, "decode_capacity": capacity})
            forced(model, cache, answer, position)
            taken = cache.snapshot()
            given = {"attention_mask": mask, "position_ids": position + 45 + torch.arange(12)}
            both = []
            for _ in range(2):
                cache.begin_turn()
                prefilled = forward(model, cache, turn, **given)
                both.append(torch.cat((prefilled, forced(model, cache, answer[:, :20], position + 57)), dim=1))
                cache.rollback(taken)
            assert both[0].equal(both[1])
            logits.append(both[0])
    assert_near(logits[1], logits[0], 1e-4)


def test_the_kernels_give_the_same_tokens() -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    model, rows = build(num_hidden_layers=1), left_padded([prompt(56), prompt(27, seed=3)])
    found = []
    for backend in ("torch", "triton"):
        with rocketkv.patch(model, **{**BOUNDED, "decode_capacity": 16}, backend=backend):
            found.append(greedy(model, rows, 20))
    assert found[0][0].equal(found[1][0])
    assert_near(found[1][1], found[0][1], 1e-4)
    for layer, other in zip(*(rocketkv_layers(each[2]) for each in found), strict=True):
        assert layer.store.phase.positions is not None
        assert other.store.phase.positions is not None
        assert layer.store.phase.positions.equal(other.store.phase.positions)
