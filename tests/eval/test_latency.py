"""Latency and memory: bytes are those of the cache, repeats as many as told, and a lack of memory is known.

No test asks for a time: what is checked is that each is taken of the right work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from rocketkv import RocketKVConfig
from rocketkv.eval.checks import WrongResultError
from rocketkv.eval.measures import latency
from rocketkv.eval.measures.apart import measure_apart
from rocketkv.eval.measures.latency import LatencyResult, measure_latency
from rocketkv.eval.measures.memory import (
    OutOfMemory,
    cache_cost,
    is_out_of_memory,
    peak_bytes,
    release_free_memory,
    reset_peak,
)
from rocketkv.eval.methods import Compressed, Full
from rocketkv.hf import layer
from rocketkv.hf.cache import cache_stats
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import SMALL, VOCABULARY, build

CPU = torch.device("cpu")
MEGA = 10**6
TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of a token in the tiny model's full cache: layers, K and V, heads, width, float32
counts_peaks = pytest.mark.skipif(reset_peak(CPU) is None, reason="this system does not tell a peak of memory")


def ours(**fields: Any) -> Compressed:
    return Compressed(RocketKVConfig(**fields))


class Hungry(Full):
    """The full cache; a forward of several tokens takes 200 MB for itself, and one of a single token 50 MB."""

    def attached(self, model: Any) -> Any:
        @contextmanager
        def hooked() -> Iterator[None]:
            def take(_: Any, args: tuple[Any, ...]) -> None:
                torch.ones((200 if args[0].shape[1] > 1 else 50) * MEGA, dtype=torch.uint8)

            hook = model.register_forward_pre_hook(take)
            yield
            hook.remove()

        return hooked()


def measured(model: Any, method: Any, **fields: Any) -> LatencyResult:
    return measure_latency(model, method, **{"prompt_tokens": 90, "new_tokens": 4, "warmup": 1, "repeats": 3, **fields})


def generated(model: Any, method: Any, *, prompt_tokens: int, steps: int, rows: int = 1) -> Any:
    """The cache after a prompt of ones and as many steps."""
    cache = method.new_cache(model, prompt_tokens)
    with torch.no_grad(), method.attached(model):
        for tokens in [prompt_tokens] + [1] * steps:
            model(torch.ones(rows, tokens, dtype=torch.int64), **{CACHE_ARGUMENT: cache})
    return cache


@pytest.mark.integration
@pytest.mark.parametrize("method", [Full(), ours(**SMALL)], ids=["full", "rocketkv"])
@pytest.mark.parametrize("rows", [1, 2])
def test_bytes_are_those_of_the_cache(method: Any, rows: int) -> None:
    model = build()
    result = measured(model, method, batch_size=rows)
    at_the_end = cache_stats(generated(model, method, prompt_tokens=90, steps=3, rows=rows))
    cost = result.cost()
    assert cost["kv_bytes"] == at_the_end.total_bytes
    assert cost["index_bytes"] == at_the_end.total("index_bytes")
    assert cost["step_bytes"] == at_the_end.total("step_bytes")
    assert cost["dense_step_bytes"] == at_the_end.total("dense_step_bytes")
    assert cost["nominal_step_bytes"] == at_the_end.total("nominal_step_bytes")
    assert cost["full_kv_bytes"] == rows * 93 * TOKEN
    after_prefill = cache_stats(generated(model, method, prompt_tokens=90, steps=0, rows=rows))
    assert result.values()["prefill_kv_bytes"] == after_prefill.total_bytes


@pytest.mark.integration
def test_a_full_cache_holds_every_token() -> None:
    result = measured(build(), Full())
    assert result.prefill_kv_bytes == 90 * TOKEN
    assert result.cost()["kv_bytes"] == 93 * TOKEN
    assert result.compression_seconds is None
    assert result.cost()["compression_seconds"] is None


@pytest.mark.integration
def test_a_compressed_step_reads_less() -> None:
    cost = measured(build(), ours(**SMALL)).cost()
    assert 0 < cost["step_bytes"] < cost["dense_step_bytes"]
    assert 0 < cost["index_bytes"] < cost["kv_bytes"]


@pytest.mark.integration
@pytest.mark.parametrize(("warmup", "repeats"), [(1, 1), (2, 5)])
def test_forwards_are_those_asked_for(warmup: int, repeats: int) -> None:
    model, seen = build(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    result = measured(model, Full(), warmup=warmup, repeats=repeats, new_tokens=3, batch_size=2)
    assert seen == [(2, 90), (2, 1), (2, 1)] * (warmup + repeats)
    assert len(result.first_token_seconds) == repeats
    assert len(result.step_seconds) == repeats * 2
    assert (result.prompt_tokens, result.new_tokens, result.batch_size) == (90, 3, 2)


def test_times_are_of_their_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once a layer's stage 1 and once a forward, every figure is known."""
    now = 0.0

    def clock() -> float:
        return now

    def ticking(work: Any, seconds: float) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal now
            now += seconds
            return work(*args, **kwargs)

        return wrapper

    model = build()
    monkeypatch.setattr(latency.time, "perf_counter", clock)
    stage_1 = layer.RocketKVLayer.end_prompt
    monkeypatch.setattr(layer.RocketKVLayer, "end_prompt", ticking(stage_1, 100.0))
    model.forward = ticking(model.forward, 1.0)
    result = measured(model, ours(**SMALL), batch_size=2)
    assert result.first_token_seconds == [201.0] * 3  # two layers
    assert result.compression_seconds == [200.0] * 3
    assert result.step_seconds == [1.0] * 9
    assert result.cost()["tokens_per_second"] == 2.0
    cost = result.cost()
    assert (cost["first_token_seconds"], cost["compression_seconds"], cost["step_seconds"]) == (201.0, 200.0, 1.0)


def test_every_repeat_reads_the_same_prompt_and_the_seed_decides_it() -> None:
    model, prompts = build(), []
    model.register_forward_pre_hook(lambda _, args: prompts.append(args[0]) if args[0].shape[1] > 1 else None)
    measured(model, Full())
    measured(model, Full(), seed=1)
    assert all(prompt.equal(prompts[0]) for prompt in prompts[:4])
    assert not prompts[4].equal(prompts[0])
    assert prompts[0].max() < VOCABULARY


@pytest.mark.integration
def test_the_model_is_left_as_it_was() -> None:
    model = build()
    measured(model, ours(**SMALL))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, 90, dtype=torch.int64), **{CACHE_ARGUMENT: cache})
    assert not rocketkv_layers(cache)


def test_a_wrong_method_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = layer.decode_step
    monkeypatch.setattr(layer, "decode_step", lambda *args, **kwargs: 1.5 * step(*args, **kwargs))
    with pytest.raises(WrongResultError, match=r"log-probabilities of rocketkv\+ .* nothing is timed"):
        measured(build(), ours(**SMALL))
    measured(build(), Full())


@pytest.mark.integration
def test_what_is_checked_is_the_method_with_room_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        latency, "decode_logprobs", lambda _, method, *ids: asked.append((method, *ids)) or torch.zeros(1)
    )
    measured(build(), ours(method="quest", kernel_size=5, token_budget=8, index_dtype="float8_e5m2"))
    (stock, *_), (checked, prompt, continuation) = asked
    assert stock == Full()
    room = checked.config.token_budget
    assert checked.config == RocketKVConfig(method="quest", kernel_size=5, token_budget=room, index_dtype="float8_e5m2")
    assert room > len(prompt) + len(continuation)
    assert len(prompt) == 90


def test_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="measured on cpu or cuda, got a model on meta"):
        measured(build().to("meta"), Full())


@counts_peaks
def test_a_peak_begins_anew() -> None:
    peaks = []
    for size in (200, 50):
        release_free_memory()  # as the harness does: what the collector freed meanwhile would hide the peak
        before = reset_peak(CPU)
        torch.ones(size * MEGA, dtype=torch.uint8)
        after = peak_bytes(CPU)
        assert before is not None
        assert after is not None
        peaks.append(after - before)
    assert peaks == pytest.approx([200 * MEGA, 50 * MEGA], abs=20 * MEGA)


@counts_peaks
def test_what_was_freed_before_does_not_hide_a_peak() -> None:
    # In pieces too small for mappings of their own, the last of which stays: the C library keeps all of them.
    pieces = [bytearray(MEGA // 10) for _ in range(1000)]
    del pieces[:-1]
    release_free_memory()
    before = reset_peak(CPU)
    pieces += [bytearray(b"1") * (MEGA // 10) for _ in range(1000)]
    after = peak_bytes(CPU)
    assert before is not None
    assert after is not None
    assert after - before > 80 * MEGA


@counts_peaks
def test_prefill_and_decode_have_peaks_of_their_own() -> None:
    values = measured(build(), Hungry()).values()
    assert values["added_prefill_bytes"] == pytest.approx(200 * MEGA, abs=30 * MEGA)
    assert values["added_decode_bytes"] == pytest.approx(50 * MEGA, abs=30 * MEGA)


def test_no_peak_where_none_can_be_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rocketkv.eval.measures.memory._CLEAR_REFS", tmp_path / "no" / "such" / "file")
    result = measured(build(), Full())
    assert (result.base_bytes, result.peak_prefill_bytes, result.peak_decode_bytes) == (None, None, None)
    assert result.values()["added_prefill_bytes"] is None
    assert reset_peak(torch.device("mps")) is peak_bytes(torch.device("mps")) is None


@pytest.mark.integration
def test_weights_are_counted_once() -> None:
    model = build(tie_word_embeddings=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert measured(model, Full()).weight_bytes == 4 * parameters + buffers


def test_a_cost_is_of_json() -> None:
    result = measured(build(), ours(**SMALL))
    for figures in (result.cost(), result.values()):
        for name, value in figures.items():
            assert value is None or (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0), name
    assert cache_cost(cache_stats(DynamicCache()))["kv_bytes"] == 0


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (OutOfMemory("in a process of our own"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_means_that_memory_ran_out(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_what_pytorch_raises_means_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(1 << 50, dtype=torch.uint8)  # a pebibyte
    assert is_out_of_memory(caught.value)


ARGUMENTS: dict[str, Any] = {
    "model": None, "dtype": "float32", "method": "full", "token_budget": None, "settings": {}, "threads": 1,
    "prompt_tokens": 40, "new_tokens": 3,
}  # fmt: skip


@pytest.mark.integration
def test_a_child_measures_what_it_is_told(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    settings = {name: value for name, value in SMALL.items() if name not in ("split", "token_budget")}
    given = {"model": str(tmp_path), "method": "rocketkv", "token_budget": 48, "settings": settings}
    result = measure_apart(**ARGUMENTS | given | {"prompt_tokens": 90, "warmup": 1, "repeats": 2})
    here = measured(model, ours(method="rocketkv", token_budget=48, **settings), new_tokens=3, warmup=1, repeats=2)
    assert result.cache == here.cache
    assert result.prefill_kv_bytes == here.prefill_kv_bytes
    assert len(result.first_token_seconds) == len(result.compression_seconds or ()) == 2
    assert len(result.step_seconds) == 4
    assert (result.peak_prefill_bytes is None) is (here.peak_prefill_bytes is None)


@pytest.mark.parametrize(
    ("method", "error", "message", "no_memory"),
    [
        ("killed", OutOfMemory, r"killed at 40 tokens: the system killed .*SIGKILL", True),
        ("exits", RuntimeError, r"exits at 40 tokens failed with exit code 3", False),
        ("broken", ValueError, "it broke", False),
    ],
)
def test_a_child_that_fails(method: str, error: type[Exception], message: str, no_memory: bool) -> None:
    with pytest.raises(error, match=message) as caught:
        measure_apart(**ARGUMENTS | {"method": f"failing_methods:{method}", "token_budget": 8})
    assert is_out_of_memory(caught.value) is no_memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [Full(), ours(**SMALL)], ids=["full", "rocketkv"])
def test_on_a_cuda_device(method: Any) -> None:
    result = measured(build().to("cuda"), method)
    assert result.base_bytes is not None
    assert result.peak_prefill_bytes is not None
    assert result.peak_decode_bytes is not None
    assert result.weight_bytes <= result.base_bytes < result.peak_decode_bytes <= result.peak_prefill_bytes
    if result.compression_seconds is not None:
        spans = zip(result.compression_seconds, result.first_token_seconds, strict=True)
        assert all(0 < compression < first for compression, first in spans)
