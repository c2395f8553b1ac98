"""Latency and memory of one method: time to the first token, time of each later token, bytes stored, read and at peak.

Prompts are random tokens, and every repeat generates the same number of tokens; no end token ends it. A repeat is a
prefill, at whose end a method compresses, and greedy decode steps over a new cache. The first repeats warm up. The last
of those measures memory: on a CPU that needs free memory to be returned to the system before each phase, which slows
the next allocations down. Resident bytes are those of the whole process, so that each configuration on a CPU runs in a
new process (`measure_apart`).
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.params import AttentionParams
from ...hf.cache import cache_stats
from ...hf.layer import RocketKVLayer, rocketkv_layers
from ...hf.loading import load_model
from ..checks import require_near_logits
from ..generate import DecodeLoop
from ..methods import Compressed, Full, Method, find_method
from ..progress import Progress
from ..records import CostDict
from .kl import decode_logprobs
from .memory import OutOfMemory, cache_cost, peak_bytes, release_free_memory, reset_peak

CHECK_TOKENS, CHECK_STEPS = 512, 3
_SIGKILL = -9  # as `multiprocessing` reports it


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """Seconds and bytes of one measurement.

    Attributes:
        prompt_tokens: of each sequence.
        new_tokens: of each sequence, the first one included.
        batch_size: sequences.
        first_token_seconds: of each repeat: prefill, stage 1 and the choice of the first token.
        compression_seconds: of each repeat: stage 1 of all layers; None for methods without layers of this library.
        step_seconds: of each decode step of all repeats.
        prefill_kv_bytes: of all tensors of the cache after the prefill.
        cache: bytes that the cache stores and reads at the end.
        weight_bytes: of the model's parameters and buffers.
        base_bytes: in use before a prefill, weights included; None where it cannot be known.
        peak_prefill_bytes: the most in use during the prefill; likewise.
        peak_decode_bytes: the most in use during the decode steps; likewise.
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
            "peak_prefill_bytes": self.peak_prefill_bytes,
            "peak_decode_bytes": self.peak_decode_bytes,
        }

    def values(self) -> dict[str, float | None]:
        """Return the figures that a cost has no field for; `added` bytes are a peak less the bytes in use before."""
        base, prefill, decode = self.base_bytes, self.peak_prefill_bytes, self.peak_decode_bytes
        return {
            "tokens_per_second": self.batch_size / median(self.step_seconds),
            "prefill_kv_bytes": self.prefill_kv_bytes,
            "weight_bytes": self.weight_bytes,
            "base_bytes": base,
            "added_prefill_bytes": None if base is None or prefill is None else prefill - base,
            "added_decode_bytes": None if base is None or decode is None else decode - base,
        }


def measure_latency(
    model: PreTrainedModel,
    method: Method,
    *,
    prompt_tokens: int,
    new_tokens: int,
    warmup: int = 2,
    repeats: int = 5,
    batch_size: int = 1,
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
        batch_size: sequences.
        seed: of the prompts.

    Raises:
        ValueError: the device is of another kind.
        WrongResultError: within its budget the method does not give the stock model's logits; nothing is timed then.
    """
    device = model.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"latency is measured on cpu or cuda, got a model on {device.type}; move it")
    generator = torch.Generator().manual_seed(seed)
    embedding: Any = model.get_input_embeddings()
    prompt = torch.randint(0, embedding.num_embeddings, (batch_size, prompt_tokens), generator=generator).to(device)
    check_within_budget(model, method, prompt[0, :CHECK_TOKENS].tolist())
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
    )


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


def _run(model: PreTrainedModel, method: Method, prompt: Tensor, new_tokens: int, *, memory: bool) -> _Run:
    """Prefill and decode once, timed; with `memory`, measure the peaks of both."""
    device = prompt.device

    def begin_peak() -> int | None:
        if not memory:
            return None
        release_free_memory()
        return reset_peak(device)

    base = begin_peak()
    cache = method.new_cache(model, prompt.shape[1])
    stage_1 = time_stage_1(cache)
    loop = DecodeLoop(model=model, cache=cache)
    loop.prefill(prompt)
    peak_prefill = None if base is None else peak_bytes(device)
    prefill_kv_bytes = cache_stats(cache).total_bytes
    begin_peak()
    for _ in range(new_tokens - 1):
        loop.step(loop.token)
    peak_decode = None if base is None else peak_bytes(device)
    compression = None if stage_1 is None else stage_1()
    kept = cache_cost(cache_stats(cache))
    return _Run(loop.seconds, compression, prefill_kv_bytes, kept, base, peak_prefill, peak_decode)


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


def measure_apart(**arguments: Any) -> LatencyResult:
    """Call `measure_by_name` in a new process, so that nothing else counts as its memory.

    Raises:
        OutOfMemory: the system killed the process, as Linux does where memory runs out.
        RuntimeError: the process ended without a result for another reason.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(sender, arguments))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    child.join()
    what = f"measuring {arguments['method']} at {arguments['prompt_tokens']} tokens"
    if child.exitcode == _SIGKILL:
        raise OutOfMemory(f"{what}: the system killed the process (SIGKILL), as it does where memory runs out")
    if result is None:
        raise RuntimeError(f"{what} failed with exit code {child.exitcode}")
    if isinstance(result, Exception):
        raise result
    return cast(LatencyResult, result)


def _send_result(sender: Connection, arguments: dict[str, Any]) -> None:
    """Send the result of `measure_by_name`, or its exception."""
    try:
        sender.send(measure_by_name(**arguments))
    except Exception as error:  # noqa: BLE001  # the parent raises it
        sender.send(error)


def measure_by_name(
    *,
    model: str,
    dtype: str,
    method: str,
    token_budget: int | None,
    settings: dict[str, Any],
    threads: int,
    revision: str | None = None,
    attention: str | None = None,
    **numbers: int,
) -> LatencyResult:
    """Load a model on the CPU and measure a method.

    Args:
        model: see `load_model`.
        dtype: of the weights, such as `float32`.
        method: see `find_method`.
        token_budget: likewise.
        settings: likewise.
        threads: of PyTorch.
        revision: see `load_model`.
        attention: likewise.
        numbers: see `measure_latency`.
    """
    torch.set_num_threads(threads)
    found = find_method(method, token_budget, settings)
    loaded, _ = load_model(model, getattr(torch, dtype), attention=attention, revision=revision)
    return measure_latency(loaded, found, **numbers)
