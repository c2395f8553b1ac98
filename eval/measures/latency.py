"""Latency and memory of one method: time to the first token, time of each later token, bytes stored, read and at peak.

Prompts are random tokens, and every repeat generates the same number of tokens; no end token ends it. A repeat is a
prefill, at whose end a method compresses, and greedy decode steps over a new cache. The first repeats warm up. The last
of those measures memory: on a CPU that needs free memory to be returned to the system before each phase, which slows
the next allocations down. Resident bytes are those of the whole process, so that each configuration on a CPU runs in a
new process (`apart.py`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.params import AttentionParams
from ...hf.cache import cache_stats
from ...hf.layer import RocketKVLayer, rocketkv_layers
from ..checks import WrongResultError, require_near_logits
from ..generate import DecodeLoop
from ..methods import Compressed, Full, Method
from ..progress import Progress
from ..records import CostDict
from .arms import what_ran
from .kl import decode_logprobs
from .largest import largest_batch
from .memory import OutOfMemory, cache_cost, peak_bytes, release_free_memory, reset_peak

CHECK_TOKENS, CHECK_STEPS = 512, 3
POSITIONS = 32  # of decode steps, at most, in a record


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """Seconds and bytes of one measurement.

    Attributes:
        prompt_tokens: of each sequence.
        new_tokens: of each sequence, the first one included.
        batch_size: sequences.
        first_token_seconds: of each repeat: prefill, stage 1 and the choice of the first token.
        compression_seconds: of each repeat: stage 1 of all layers; None for methods without layers of this library.
        step_seconds: of each decode step of all repeats, one repeat after the other.
        prefill_kv_bytes: of all tensors of the cache after the prefill.
        cache: bytes that the cache stores and reads at the end.
        weight_bytes: of the model's parameters and buffers.
        base_bytes: in use before a prefill, weights included; None where it cannot be known.
        peak_prefill_bytes: the most in use during the prefill; likewise.
        peak_decode_bytes: the most in use during the decode steps; likewise.
        ran: see `what_ran`.
    """

    prompt_tokens: int
    new_tokens: int
    batch_size: int
    first_token_seconds: list[float]
    compression_seconds: list[float] | None
    step_seconds: list[float]
    prefill_kv_bytes: int
    cache: CostDict
    weight_bytes: int
    base_bytes: int | None
    peak_prefill_bytes: int | None
    peak_decode_bytes: int | None
    ran: dict[str, Any]

    def cost(self) -> CostDict:
        """Return the medians of the repeats, the bytes and the peaks, as a record's cost."""
        compression = self.compression_seconds
        return {
            **self.cache,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first_token_seconds": median(self.first_token_seconds),
            "compression_seconds": None if compression is None else median(compression),
            **step_cost(self.step_seconds),
            "tokens_per_second": self.batch_size / median(self.step_seconds),
            "batch_size": self.batch_size,
            "peak_prefill_bytes": self.peak_prefill_bytes,
            "peak_decode_bytes": self.peak_decode_bytes,
        }

    def values(self) -> dict[str, float | None]:
        """Return the figures that a cost has no field for; `added` bytes are a peak less the bytes in use before."""
        base, prefill, decode = self.base_bytes, self.peak_prefill_bytes, self.peak_decode_bytes
        return {
            "prefill_kv_bytes": self.prefill_kv_bytes,
            "weight_bytes": self.weight_bytes,
            "base_bytes": base,
            "added_prefill_bytes": None if base is None or prefill is None else prefill - base,
            "added_decode_bytes": None if base is None or decode is None else decode - base,
        }

    def details(self) -> dict[str, Any]:
        """Return what ran, and pairs of position and median seconds of the decode steps, at most 32 of them."""
        count = self.new_tokens - 1
        steps = [self.step_seconds[number::count] for number in range(count)]
        size = -(-count // POSITIONS)
        groups = [range(begin, min(begin + size, count)) for begin in range(0, count, size)]
        curve = [
            [self.prompt_tokens + group[0], median(seconds for number in group for seconds in steps[number])]
            for group in groups
        ]
        return {"ran": self.ran, "step_seconds_by_position": curve}


def measure_latency(
    model: PreTrainedModel,
    method: Method,
    *,
    prompt_tokens: int,
    new_tokens: int,
    warmup: int = 2,
    repeats: int = 5,
    batch_size: int | str = 1,
    seed: int = 0,
) -> LatencyResult:
    """Check a method, then measure it on random prompts, the same in every repeat.

    Args:
        model: a model on a CPU or a CUDA device, to which no method is attached.
        method: how to compress.
        prompt_tokens: of each sequence.
        new_tokens: to generate, at least 2: the first comes from the prefill, the others are timed steps.
        warmup: repeats whose times do not count, at least 1: the last of them measures memory.
        repeats: whose times count.
        batch_size: sequences; `max`: as many as fit into the memory of a CUDA device.
        seed: of the prompts.

    Raises:
        ValueError: the device is of another kind.
        OutOfMemory: not even one sequence fits.
        WrongResultError: the method does not give the logits of its baseline, or within its budget those of the stock
            model; nothing is timed then.
    """
    device = model.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"latency is measured on cpu or cuda, got a model on {device.type}; move it")
    embedding: Any = model.get_input_embeddings()

    def prompts(rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, embedding.num_embeddings, (rows, prompt_tokens), generator=generator).to(device)

    if isinstance(batch_size, str):
        check_method(model, method, prompts(1))
        batch_size = _largest(model, method, prompts, new_tokens)
        prompt = prompts(batch_size)
    else:
        prompt = prompts(batch_size)
        check_method(model, method, prompt)
    runs: list[_Run] = []
    with method.attached(model), Progress("warming up", total=warmup + repeats) as progress:
        for number in range(warmup + repeats):
            if number == warmup:
                progress.say("timing")
            gc.collect()  # the last repeat's cache
            runs.append(_run(model, method, prompt, new_tokens, memory=number == warmup - 1))
            progress.step()
    watched, timed = runs[warmup - 1], runs[warmup:]
    compression = [run.compression_seconds for run in timed if run.compression_seconds is not None]
    weights = {weight.data_ptr(): weight.nbytes for weight in (*model.parameters(), *model.buffers())}
    return LatencyResult(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        first_token_seconds=[run.forward_seconds[0] for run in timed],
        compression_seconds=compression or None,
        step_seconds=[seconds for run in timed for seconds in run.forward_seconds[1:]],
        prefill_kv_bytes=timed[-1].prefill_kv_bytes,
        cache=timed[-1].cache,
        weight_bytes=sum(weights.values()),
        base_bytes=watched.base_bytes,
        peak_prefill_bytes=watched.peak_prefill_bytes,
        peak_decode_bytes=watched.peak_decode_bytes,
        ran=timed[-1].ran,
    )


def _largest(model: PreTrainedModel, method: Method, prompts: Callable[[int], Tensor], new_tokens: int) -> int:
    """Return how many prompts fit into the memory of the model's device.

    Raises:
        ValueError: the device is a CPU, whose system ends a process instead, or a forward is compiled for each batch.
        OutOfMemory: none does.
    """
    if model.device.type != "cuda":
        raise ValueError(f"the largest batch is found by running out of a GPU's memory; the model is on {model.device}")

    if hasattr(method, "forward"):
        raise ValueError(f"{method.name} would be compiled for every size; ask for a batch of a given size")

    def run(rows: int) -> None:
        with method.attached(model):
            _run(model, method, prompts(rows), new_tokens, memory=False)

    found = largest_batch(run)
    if found == 0:
        raise OutOfMemory(f"not even one sequence of {method.name} fits into the memory of {model.device}")
    return found


def check_method(model: PreTrainedModel, method: Method, prompt: Tensor) -> None:
    """Check a method before it is timed: against its baseline if it has one, else as `check_within_budget` does.

    Args:
        model: a model to which no method is attached.
        method: to check.
        prompt: token ids [B, S]; a compiled method reads all of it, so that it is compiled once.

    Raises:
        WrongResultError: logits differ, or in float32 the tokens.
    """
    short = prompt[:1, :CHECK_TOKENS]
    baseline: Method | None = getattr(method, "baseline", None)
    if baseline is None:
        check_within_budget(model, method, short[0].tolist())
        return
    read = prompt if hasattr(method, "forward") else short
    expected, tokens = _greedy(model, baseline, read, None)
    found, _ = _greedy(model, method, read, tokens)
    name = f"logits of {method.name}"
    require_near_logits(name, found, expected)
    if model.dtype == torch.float32 and not found.argmax(-1).equal(expected.argmax(-1)):
        raise WrongResultError(f"{name} lead to other tokens than those of {baseline.name}; nothing is timed")


def _greedy(
    model: PreTrainedModel, method: Method, prompt: Tensor, tokens: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits [m, B, V] after a prompt and some tokens, those given or greedy ones, and the tokens."""
    with method.attached(model):
        loop = _loop(model, method, prompt)
        logits, taken = [loop.prefill(prompt).clone()], list[Tensor]()
        for number in range(CHECK_STEPS):
            taken.append(loop.token.clone() if tokens is None else tokens[number])
            logits.append(loop.step(taken[-1]).clone())
    return torch.stack(logits), taken


def _loop(model: PreTrainedModel, method: Method, prompt: Tensor) -> DecodeLoop:
    """Return a loop over a new cache of a method, which is attached to the model."""
    cache = method.new_cache(model, prompt.shape[1])
    return DecodeLoop(model=model, cache=cache, forward=getattr(method, "forward", None))


def step_cost(seconds: Sequence[float]) -> CostDict:
    """Return median and 95th percentile of the decode steps, as fields of a record."""
    p95 = float(np.quantile(seconds, 0.95, method="inverted_cdf"))
    return {"step_seconds": median(seconds), "step_seconds_p95": p95}


def check_within_budget(model: PreTrainedModel, method: Method, ids: list[int]) -> None:
    """Check a method of the library against the stock model's predictions, with a budget that covers all tokens.

    Methods without layers of this library, such as the full cache itself, pass.

    Args:
        model: a model to which no method is attached.
        method: to check, with its settings and a raised budget.
        ids: a prompt, after which some of its tokens are decoded.

    Raises:
        WrongResultError: it does not.
    """
    prompt, continuation = ids, (ids * CHECK_STEPS)[-CHECK_STEPS:]
    with method.attached(model):
        layers = rocketkv_layers(method.new_cache(model, len(prompt)))
    if not layers:
        return
    config = replace(layers[0].config, token_budget=8 * (len(ids) + layers[0].config.decode_reserve), split=None)
    expected = decode_logprobs(model, Full(), prompt, continuation)
    result = decode_logprobs(model, Compressed(config), prompt, continuation)
    name = f"log-probabilities of {method.name} within its budget"
    require_near_logits(name, result.to(model.dtype), expected.to(model.dtype))


class _Run(NamedTuple):
    """One repeat."""

    forward_seconds: list[float]
    compression_seconds: float | None
    prefill_kv_bytes: int
    cache: CostDict
    base_bytes: int | None
    peak_prefill_bytes: int | None
    peak_decode_bytes: int | None
    ran: dict[str, Any]


def _run(model: PreTrainedModel, method: Method, prompt: Tensor, new_tokens: int, *, memory: bool) -> _Run:
    """Prefill and decode once, timed; with `memory`, measure the peaks of both."""
    device = prompt.device

    def begin_peak() -> int | None:
        if not memory:
            return None
        release_free_memory()
        return reset_peak(device)

    base = begin_peak()
    loop = _loop(model, method, prompt)
    cache = loop.cache
    stage_1 = time_stage_1(cache)
    loop.prefill(prompt)
    peak_prefill = None if base is None else peak_bytes(device)
    prefill_kv_bytes = cache_stats(cache).total_bytes
    begin_peak()
    for _ in range(new_tokens - 1):
        loop.step(loop.token)
    peak_decode = None if base is None else peak_bytes(device)
    compression = None if stage_1 is None else stage_1()
    kept, ran = cache_cost(cache_stats(cache)), what_ran(model, method, cache)
    return _Run(loop.seconds, compression, prefill_kv_bytes, kept, base, peak_prefill, peak_decode, ran)


class _TimedLayer(RocketKVLayer):
    """A layer that times its stage 1.

    A class: a function set on the layer would refer to it, and the cycle would keep the cache in memory until the
    garbage collector runs.
    """

    spans: list[Callable[[], float]]  # each returns seconds; shared by the layers of a cache and its copies

    def end_prompt(self, params: AttentionParams) -> None:
        """Run stage 1 and time it."""
        if self.store.keys is None or not self.store.keys.is_cuda:
            start = time.perf_counter()
            super().end_prompt(params)
            seconds = time.perf_counter() - start
            self.spans.append(lambda: seconds)
            return
        # Events, as synchronizing after each layer would distort the times; read after a synchronization.
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        super().end_prompt(params)
        last.record()
        self.spans.append(lambda: float(first.elapsed_time(last)) / 1e3)


def time_stage_1(cache: Any) -> Callable[[], float] | None:
    """Time stage 1 of each layer of a cache and of its copies from now on.

    Returns:
        A function that returns the seconds of all layers so far, or None where no layer is of this library.
    """
    layers = rocketkv_layers(cache)
    spans: list[Callable[[], float]] = _Shared()
    for layer in layers:
        layer.__class__ = _TimedLayer
        layer.spans = spans  # type: ignore[attr-defined]  # an attribute of the new class
    return (lambda: sum(span() for span in spans)) if layers else None


class _Shared(list[Callable[[], float]]):
    """A list that deep copies share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self
