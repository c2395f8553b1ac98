"""Compiled decode steps of a static cache: one graph, the same output, and what is not compiled says so."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, MinNewTokensLengthLogitsProcessor

import rocketkv
from close import assert_near
from rocketkv.budget import BudgetSplit
from rocketkv.hf.cache import RocketKVCache, cache_stats
from rocketkv.hf.compiled import TORCH
from rocketkv.hf.layer import RocketKVLayer, layer_of, rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from static import PADDED, PROMPT, ROOM, STATIC, compiling, inputs_of, later, own_loop, places, uncounted
from tiny import SKETCH_SPLIT, SMALL, SPLIT, TRANSFORMERS, build, greedy, hand_written, prompt
from turns import HKV

# That steps are not compiled is said, and tested below; elsewhere it does not matter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:RocketKV runs these decode steps eagerly"),
    # Triton 3.2's interpreter
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
traced = pytest.mark.skipif(TORCH < (2, 7), reason="this PyTorch does not trace models of newer transformers")

AT_END = "room for decode_capacity=5 generated tokens, .* raise decode_capacity"
EAGERLY = "RocketKV runs these decode steps eagerly, not compiled: "


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextmanager
def compiled_once() -> Iterator[None]:
    """See to it that one graph is made, without a break, and used from then on."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def said(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


@pytest.mark.integration
@pytest.mark.parametrize("way", ["generate", "loop", "compiled generate", "compiled loop"])
def test_the_end_names_the_field_to_raise(way: str) -> None:
    model = build(num_hidden_layers=1)
    handle = rocketkv.patch(model, **{**STATIC, "decode_capacity": 5})
    step = handle.compile_step(backend="eager") if way == "compiled loop" else model

    def run(new_tokens: int) -> Tensor:
        if way == "generate":
            return greedy(model, PADDED, new_tokens)[0]
        if way == "compiled generate":
            return greedy(model, PADDED, new_tokens, compile_config=compiling("eager"))[0]
        return own_loop(model, PADDED, step, new_tokens, decode_capacity=5)[0]

    assert run(6).shape[1] == 6  # the last token is never stored
    with pytest.raises(ValueError, match=AT_END):
        run(7)


@traced
@pytest.mark.integration
def test_a_compiled_generate_ends_at_once() -> None:
    model = build(num_hidden_layers=1)
    rocketkv.patch(model, **{**STATIC, "decode_capacity": 5})
    lengths: list[int] = []

    class Recorded(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            lengths.append(input_ids.shape[1])
            return scores

    with pytest.raises(ValueError, match=AT_END):
        greedy(model, PROMPT, 12, compile_config=compiling("eager"), logits_processor=LogitsProcessorList([Recorded()]))
    assert lengths == [90 + i for i in range(7)]


@pytest.mark.integration
def test_a_compiled_generate_keeps_processors_of_ones_own() -> None:
    model = build(num_hidden_layers=1)
    rocketkv.patch(model, **STATIC)
    expected = greedy(model, PROMPT)[0]
    eos = int(expected[0, 3])
    for processors in (None, LogitsProcessorList([MinNewTokensLengthLogitsProcessor(90, 12, [eos], device="cpu")])):
        given = {"eos_token_id": eos, "logits_processor": processors, "compile_config": compiling("eager")}
        found, *_ = greedy(model, PROMPT, **given)
        assert (found.shape[1] == 12) == (processors is not None)


@traced
@pytest.mark.integration
@pytest.mark.parametrize(
    ("family", "rows", "split", "backend"),
    [  # what a step writes in place, which the index decides, is what the two backends treat differently
        ("llama", "one", SPLIT, "eager"),
        ("qwen3", "padded", SPLIT, "eager"),
        ("llama", "padded", SPLIT, "aot_eager"),
        ("llama", "padded", SKETCH_SPLIT, "aot_eager"),
    ],
)
def test_a_compiled_loop(family: str, rows: str, split: BudgetSplit, backend: str) -> None:
    model = build(family)
    rocketkv.patch(model, **{**STATIC, "split": split})
    own = {"split": split}
    expected, expected_logits, _ = own_loop(model, inputs_of(rows), model, decode_capacity=None, **own)
    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    with compiled_once():
        for _ in range(2):  # another cache of the same shape compiles nothing anew
            found, logits, cache = own_loop(model, inputs_of(rows), compiled, **own)
            assert found.equal(expected)
            assert_near(logits, expected_logits, 1e-4)
    assert cache.is_compileable
    # Nobody counted; asked, the cache knows.
    length = cache.get_seq_length()
    assert isinstance(length, Tensor)
    assert int(length) == 90 + 11
    assert cache.stats().tokens_seen == 90 + 11
    assert {layer.tokens_stored for layer in cache.stats().layers} == {40 + 11}
    assert cache.get_seq_length() == 90 + 11


@traced
@pytest.mark.integration
@pytest.mark.parametrize(("rows", "backend"), [("one", "eager"), ("padded", "aot_eager")])
def test_a_compiled_generate(rows: str, backend: str) -> None:
    model = build(num_hidden_layers=1)
    handle = rocketkv.patch(model, **STATIC)
    expected, expected_logits, _ = greedy(model, inputs_of(rows))
    expected_stats = handle.stats()
    with compiled_once():
        for _ in range(2):
            found, logits, _ = greedy(model, inputs_of(rows), compile_config=compiling(backend))
            assert found.equal(expected)
            assert_near(logits, expected_logits, 1e-4)
            assert handle.stats() == expected_stats


@traced
@pytest.mark.integration
def test_the_helper_takes_a_whole_loop() -> None:
    model = build(num_hidden_layers=1)
    handle = rocketkv.patch(model, **STATIC)
    expected, expected_logits, _ = hand_written(model, PADDED["input_ids"], mask=PADDED["attention_mask"])
    step = handle.compile_step(backend="eager")
    with compiled_once():
        found, logits, cache = hand_written(step, PADDED["input_ids"], mask=PADDED["attention_mask"])
    assert not any(layer.store.lens.uncounted for layer in rocketkv_layers(cache))  # nobody needs to ask the device
    assert found.equal(expected)
    assert_near(logits, expected_logits, 1e-4)
    assert cache.get_seq_length() == 90 + 11


@traced
@torch._dynamo.config.patch(recompile_limit=2)
def test_prompts_of_more_splits_than_dynamo_compiles_by_itself() -> None:
    model, limit = build(num_hidden_layers=1), torch._dynamo.config.recompile_limit
    with rocketkv.patch(model, **STATIC) as handle, torch.inference_mode():
        step = handle.compile_step(backend="eager")
        for channels in range(3, 3 + limit + 2):
            config = replace(handle.config, split=replace(SMALL["split"], channels=channels))
            caches = [RocketKVCache(model.config, config, prompt_length=PROMPT.shape[1]) for _ in range(2)]
            logits = []
            for forward, cache in zip((step, model), caches, strict=True):
                forward(PROMPT, **{CACHE_ARGUMENT: cache})
                logits.append(forward(PROMPT[:, :1], **{CACHE_ARGUMENT: cache}).logits)
            assert_near(*logits)
    assert torch._dynamo.config.recompile_limit == limit


@traced
def test_a_compiled_step_on_the_kernels() -> None:
    decode_kernels = pytest.importorskip("rocketkv.kernels.decode", reason="Triton has no package for this platform")
    if not decode_kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET was not 1 when triton was imported")
    model = build(num_hidden_layers=1)
    handle = rocketkv.patch(model, **STATIC)
    expected, expected_logits, _ = own_loop(model, PADDED, model, 4)
    with compiled_once():
        found, logits, cache = own_loop(model, PADDED, handle.compile_step(backend="aot_eager"), 4, backend="triton")
    assert rocketkv_layers(cache)[0].step.workspace
    assert found.equal(expected)
    assert_near(logits, expected_logits, 1e-4)


@pytest.fixture(scope="module")
def decoded() -> Iterator[tuple[Any, Tensor, RocketKVCache, RocketKVCache]]:
    """A patched model, tokens, the cache whose steps of them were compiled, and one that grew."""
    model = build()
    with rocketkv.patch(model, **STATIC):
        found, cache = uncounted(model)
        yield model, found, cache, own_loop(model, inputs_of("one"), model, 8, decode_capacity=None)[2]


@traced
@pytest.mark.integration
def test_crop(decoded: tuple[Any, Tensor, RocketKVCache, RocketKVCache]) -> None:
    model, found, *caches = decoded
    cache, growing = map(copy.deepcopy, caches)
    assert rocketkv_layers(cache)[0].store.lens.uncounted
    before = places(cache)
    for stale in (cache, growing):
        stale.crop(-3 if TRANSFORMERS >= (5, 16) else 90 + 4)
        assert stale.get_seq_length() == 90 + 4
    assert places(cache) == before
    for i in range(3):
        token = found[:, 4 + i : 5 + i]
        assert_near(later(model, cache, token), later(model, growing, token), 1e-4)
    assert places(cache) == before
    for layer, other in zip(rocketkv_layers(cache), rocketkv_layers(growing), strict=True):
        kept = 40 + 7
        assert layer.store.phase.positions[:, :, :kept].equal(other.store.phase.positions[:, :, :kept])


@traced
@pytest.mark.integration
def test_a_second_turn(decoded: tuple[Any, Tensor, RocketKVCache, RocketKVCache]) -> None:
    model, _, *caches = decoded
    cache, growing = map(copy.deepcopy, caches)
    assert rocketkv_layers(cache)[0].store.lens.uncounted
    second = prompt(30, seed=7)
    for each in (cache, growing):
        each.begin_turn()
    assert_near(later(model, cache, second), later(model, growing, second), 1e-4)
    assert cache.get_seq_length() == growing.get_seq_length() == 90 + 7 + 30
    assert not cache.is_compileable  # the prompt may go on
    for i in range(ROOM):
        token = torch.full((1, 1), 5 + i)
        assert_near(later(model, cache, token), later(model, growing, token), 1e-4)
        assert cache.is_compileable
        assert {layer.store.capacity for layer in rocketkv_layers(cache)} == {40 + ROOM}
    with pytest.raises(ValueError, match="raise decode_capacity"):
        later(model, cache, token)


@pytest.mark.integration
def test_turns_of_generate() -> None:
    model = build(num_hidden_layers=1)
    results = []
    for fields in (SMALL, STATIC):
        with rocketkv.patch(model, **fields):
            first, _, cache = greedy(model, PROMPT, 8, compile_config=compiling("eager") if fields is STATIC else None)
            ids = torch.cat((PROMPT, first, prompt(30, seed=7)), dim=1)
            results.append(greedy(model, ids, 8, **{CACHE_ARGUMENT: cache})[:2])
    (expected, expected_logits), (found, logits) = results
    assert found.equal(expected)
    assert_near(logits, expected_logits, 1e-4)


@traced
@pytest.mark.integration
def test_deepcopy() -> None:
    model = build()
    rocketkv.patch(model, **STATIC)
    found, cache = uncounted(model)
    fork = copy.deepcopy(cache)
    addresses = {address for layer in places(cache) for address, _ in layer.values()}
    assert addresses.isdisjoint({address for layer in places(fork) for address, _ in layer.values()})
    before = [layer.store.keys.clone() for layer in rocketkv_layers(cache)]
    expected = later(model, fork, found[:, -1:])
    for layer, keys in zip(rocketkv_layers(cache), before, strict=True):
        assert layer.store.keys.equal(keys)
    assert_near(later(model, cache, found[:, -1:]), expected, 1e-6)


@traced
@pytest.mark.integration
def test_stats_count_the_same_bytes_but_for_the_room(
    decoded: tuple[Any, Tensor, RocketKVCache, RocketKVCache],
) -> None:
    static, dynamic = (cache_stats(copy.deepcopy(cache)).to_dict() for cache in decoded[2:])
    for name in ("tokens_seen", "full_bytes", "step_bytes", "nominal_step_bytes"):
        assert static[name] == dynamic[name]
    assert static["key_bytes"] == 2 * HKV * (40 + ROOM) * 16 * 4


@traced
@pytest.mark.integration
@pytest.mark.parametrize("how", ["hybrid", "chunks", "lookup"])
def test_what_is_not_compiled_says_so_once(how: str) -> None:
    model = build("gemma3" if how == "hybrid" else "llama")
    ways: dict[str, Any] = {"chunks": {"prefill_chunk_size": 40}, "lookup": {"prompt_lookup_num_tokens": 3}}
    extra: dict[str, Any] = ways.get(how, {})
    reason = {"hybrid": "DynamicSlidingWindowLayer", "chunks": "prefill_chunk_size", "lookup": "drafts"}[how]
    with rocketkv.patch(model, **SMALL):
        expected, expected_logits, _ = greedy(model, PROMPT, **extra)
    torch._dynamo.utils.counters.clear()
    with rocketkv.patch(model, **STATIC):
        found: list[Any] = []

        def run() -> None:
            found.extend(greedy(model, PROMPT, compile_config=compiling("eager"), **extra) for _ in range(2))

        messages = said(run)
    assert len(messages) == 1
    assert messages[0].startswith(EAGERLY)
    assert reason in messages[0]
    for tokens_found, logits, _ in found:
        assert tokens_found.equal(expected)
        assert_near(logits, expected_logits, 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@traced
@pytest.mark.integration
@pytest.mark.parametrize(
    ("family", "reason"), [("gemma3", "DynamicSlidingWindowLayer"), ("llama", "gradients are enabled")]
)
def test_the_helper_runs_eagerly_what_it_cannot_compile(family: str, reason: str) -> None:
    torch._dynamo.utils.counters.clear()
    model = build(family)
    handle = rocketkv.patch(model, **STATIC)
    cache = RocketKVCache(model.config, prompt_length=90, **STATIC)
    step = handle.compile_step(backend="eager")
    with torch.no_grad():
        step(PROMPT, **{CACHE_ARGUMENT: cache})
    with torch.set_grad_enabled(family == "llama"):
        messages = said(lambda: [step(PROMPT[:, :1], **{CACHE_ARGUMENT: cache}) for _ in range(2)])
    assert len([message for message in messages if message.startswith(EAGERLY) and reason in message]) == 1
    assert cache.get_seq_length() == 92
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@traced
@pytest.mark.parametrize(
    ("way", "capacity", "split"),
    [
        ("model", None, SKETCH_SPLIT),
        ("generate", None, SPLIT),
        ("layers", None, SKETCH_SPLIT),
        ("layers", ROOM, SPLIT),
    ],
)
def test_ones_own_compile_changes_no_logits(way: str, capacity: int | None, split: BudgetSplit) -> None:
    model = build(num_hidden_layers=1)
    fields = {**STATIC, "decode_capacity": capacity, "split": split}
    rocketkv.patch(model, **fields)

    def run(step: Any) -> tuple[Tensor, Tensor, Any]:
        if way == "generate":
            return greedy(model, PADDED, 4)
        return own_loop(model, PADDED, step, 4, **fields)

    expected, expected_logits, _ = run(model)
    step: Any = model
    if way == "model":
        step = torch.compile(model, backend="eager")
    elif way == "generate":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    for _ in range(2):
        found, logits, cache = run(step)
        assert found.equal(expected)
        assert_near(logits, expected_logits, 1e-5)
    assert {layer.store.seen for layer in rocketkv_layers(cache)} == {90 + 3}


@traced
def test_ones_own_compile_of_a_cache_that_grows_says_that_it_runs_eagerly() -> None:
    model = build(num_hidden_layers=1)
    rocketkv.patch(model, **SMALL)
    step = torch.compile(model, backend="eager")
    messages = said(lambda: hand_written(step, PROMPT, 3))
    assert [message for message in messages if message.startswith(EAGERLY)] == [
        EAGERLY + "the cache grows; set decode_capacity"
    ]


@traced
def test_a_key_keeps_its_layer_where_the_graph_breaks() -> None:
    layer = RocketKVLayer(rocketkv.RocketKVConfig(**SMALL))

    def step(key: Tensor) -> bool:
        layer.armed = True
        key, _ = layer.update(key + 1, key)
        torch._dynamo.graph_break()
        return layer_of(key) is layer

    assert torch.compile(step, backend="eager")(torch.ones(1, 1, 1, 2))
    assert torch._dynamo.utils.counters["graph_break"]


def test_an_attention_that_does_not_read_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    rocketkv.patch(model, **SMALL)
    monkeypatch.setattr("rocketkv.hf.attention.layer_of", lambda key: None)  # as where dynamo lost the mark
    with pytest.raises(ValueError, match="its attention did not read the cache"):
        model(PROMPT)


@pytest.mark.parametrize("fields", [{}, {"split": SKETCH_SPLIT, "audit_every": 1}], ids=["pages", "watched"])
def test_a_compiler_at_work_in_another_thread_changes_nothing(fields: dict[str, Any]) -> None:
    model = build(num_hidden_layers=1)
    at_work, done = threading.Event(), threading.Event()

    def slow(graph: Any, inputs: Any) -> Any:
        at_work.set()
        done.wait(60)
        return graph.forward

    other = threading.Thread(target=lambda: torch.compile(lambda x: x + 1, backend=slow)(torch.ones(2)))
    with rocketkv.patch(model, **SMALL | fields):
        expected = hand_written(model, prompt(90), 4)[0]
        other.start()
        assert at_work.wait(60)
        try:
            found = hand_written(model, prompt(90), 4)[0]
        finally:
            done.set()
            other.join()
    assert found.equal(expected)


def test_a_shallow_copy_of_a_patched_model_is_refused() -> None:
    model = build(num_hidden_layers=1)
    with rocketkv.patch(model, **SMALL), pytest.raises(ValueError, match="is a shallow copy"):
        copy.copy(model.model)(prompt(9))
