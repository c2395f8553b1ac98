"""Latency and memory of one method: time to the first token, time of each token after it, bytes held, read and at peak.

Prompts are random tokens, and every repeat generates the same number of tokens: time depends on neither, and no end
token ends it. A repeat is a prefill, at whose end a method compresses, and greedy decode steps over a cache of its own;
the first repeats warm up, and their times do not count. Memory is measured in the last of these, for on a CPU free
memory has to be given back to the system before each phase, and taking it again costs time. Resident bytes there are
those of the whole process, so each configuration is measured in a process of its own (`measure_apart`).
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...hf.cache import cache_stats
from ...hf.layer import rocketkv_layers
from ...hf.layer import RocketKVLayer
from ...hf.loading import load_model
from ...hf.models import CACHE_ARGUMENT
from ..bench.model_arms import require_near_logits
from ..methods import Compressed, Full, Method, find_method
from ..progress import Progress
from ..records import CostDict
from .kl import decode_logprobs
from .memory import OutOfMemory, cache_cost, is_out_of_memory, peak_bytes, release_free_memory, reset_peak

CHECK_TOKENS, CHECK_STEPS = 512, 3
_SIGKILL = -9  # as `subprocess` reports it
# With this process's own path: `-m` would put the working directory before it, where a folder `kernels` would be a
# module of a name that transformers looks for.
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from rocketkv.eval.measures.latency import main
raise SystemExit(main(sys.argv[1]))
"""


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """What was measured; seconds and bytes.

    Attributes:
        prompt_tokens: of each sequence.
        new_tokens: of each sequence, the first one included.
        batch_size: sequences.
        first_token_seconds: of each repeat: prefill, stage 1 in it, and the choice of the first token.
        compression_seconds: of each repeat: stage 1 of all layers together; None where a method has none of ours.
        step_seconds: of each decode step of all repeats.
        prefill_kv_bytes: all that lives in the cache after the prefill.
        cache: what it holds and reads at the end.
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
        """Return the medians of the repeats, the bytes and the peaks, as a record has them."""
        compression = self.compression_seconds
        return {
            **self.cache,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first_token_seconds": median(self.first_token_seconds),
            "compression_seconds": None if compression is None else median(compression),
            "step_seconds": median(self.step_seconds),
            "step_seconds_p95": percentile(self.step_seconds, 0.95),
            "peak_prefill_bytes": self.peak_prefill_bytes,
            "peak_decode_bytes": self.peak_decode_bytes,
        }

    def values(self) -> dict[str, float | None]:
        """Return what a record's cost has no field for; `added` bytes are a peak less what was in use before."""
        base, prefill, decode = self.base_bytes, self.peak_prefill_bytes, self.peak_decode_bytes
        return {
            "tokens_per_second": self.batch_size / median(self.step_seconds),
            "prefill_kv_bytes": self.prefill_kv_bytes,
            "weight_bytes": self.weight_bytes,
            "base_bytes": base,
            "added_prefill_bytes": None if base is None or prefill is None else prefill - base,
            "added_decode_bytes": None if base is None or decode is None else decode - base,
        }


def percentile(values: list[float], share: float) -> float:
    """Return the least of the values that `share` of them do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


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
        new_tokens: to generate, at least 2: the first comes out of the prefill, the others are timed steps.
        warmup: repeats whose times do not count, at least 1: the last of them measures memory.
        repeats: whose times do.
        batch_size: sequences.
        seed: of the prompts.

    Raises:
        ValueError: a number is too small, or the device is of another kind.
        WrongResultError: within its budget the method does not give the stock model's logits; nothing is timed then.
    """
    _require_least("prompt_tokens", prompt_tokens, 1)
    _require_least("new_tokens", new_tokens, 2)
    _require_least("warmup", warmup, 1)
    _require_least("repeats", repeats, 1)
    _require_least("batch_size", batch_size, 1)
    device = model.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"latency is measured on cpu or cuda, got a model on {device.type}; move it")
    generator = torch.Generator().manual_seed(seed)
    embedding: Any = model.get_input_embeddings()
    prompt = torch.randint(0, embedding.num_embeddings, (batch_size, prompt_tokens), generator=generator).to(device)
    check_within_budget(model, method, prompt[0, :CHECK_TOKENS].tolist())
    runs: list[_Run] = []
    with torch.inference_mode(), method.attached(model), Progress("warming up", total=warmup + repeats) as progress:
        for number in range(warmup + repeats):
            progress.say(f"repeat {number + 1 - warmup} of {repeats}" if number >= warmup else "warming up")
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
        first_token_seconds=[run.first_token_seconds for run in timed],
        compression_seconds=compression or None,
        step_seconds=[seconds for run in timed for seconds in run.step_seconds],
        prefill_kv_bytes=timed[-1].prefill_kv_bytes,
        cache=timed[-1].cache,
        weight_bytes=sum(weights.values()),
        base_bytes=watched.base_bytes,
        peak_prefill_bytes=watched.peak_prefill_bytes,
        peak_decode_bytes=watched.peak_decode_bytes,
    )


def _require_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_within_budget(model: PreTrainedModel, method: Method, ids: list[int]) -> None:
    """Check that a method of ours gives the stock model's predictions, with a budget so large that nothing is left out.

    Methods without layers of ours, such as the full cache itself, pass.

    Args:
        model: a model to which no method is attached.
        method: the one to check: its settings stay, its budget is raised.
        ids: a prompt; some of its last tokens are decoded.

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
    found = decode_logprobs(model, Compressed(config), prompt, continuation)
    what = f"log-probabilities of {method.name} within its budget"
    require_near_logits(what, found.to(model.dtype), expected.to(model.dtype))


class _Run(NamedTuple):
    """One repeat."""

    first_token_seconds: float
    compression_seconds: float | None
    step_seconds: list[float]
    prefill_kv_bytes: int
    cache: CostDict
    base_bytes: int | None
    peak_prefill_bytes: int | None
    peak_decode_bytes: int | None


def _run(model: PreTrainedModel, method: Method, prompt: Tensor, new_tokens: int, *, memory: bool) -> _Run:
    """Read a prompt and generate after it, timed, and with peaks of memory where told."""
    device = prompt.device

    places = torch.arange(prompt.shape[1] + new_tokens, device=device)[None]

    def step(ids: Tensor, seen: int) -> tuple[Tensor, float]:
        """Return the next token [B, 1] after `ids`, which follow `seen` tokens, and the seconds that it took."""
        # Positions of the text: a cache that a press has shortened counts from its own length.
        positions = places[:, seen : seen + ids.shape[1]]
        synchronize(device)
        start = time.perf_counter()
        logits = model(ids, position_ids=positions, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        synchronize(device)
        return token, time.perf_counter() - start

    def begin_peak() -> int | None:
        release_free_memory()
        return reset_peak(device)

    base = begin_peak() if memory else None
    cache = method.new_cache(model, prompt.shape[1])
    stage_1 = time_stage_1(cache)
    token, first_token_seconds = step(prompt, 0)
    peak_prefill = None if base is None else peak_bytes(device)
    prefill_kv_bytes = cache_stats(cache).total_bytes
    if memory:
        begin_peak()
    step_seconds = []
    for number in range(new_tokens - 1):
        token, seconds = step(token, prompt.shape[1] + number)
        step_seconds.append(seconds)
    return _Run(
        first_token_seconds=first_token_seconds,
        compression_seconds=None if stage_1 is None else stage_1(),
        step_seconds=step_seconds,
        prefill_kv_bytes=prefill_kv_bytes,
        cache=cache_cost(cache_stats(cache)),
        base_bytes=base,
        peak_prefill_bytes=peak_prefill,
        peak_decode_bytes=None if base is None else peak_bytes(device),
    )


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _TimedLayer(RocketKVLayer):
    """A layer that notes how long its stage 1 takes.

    A class, not a function put on the layer: that would hold the layer, which holds it, and a cache that is a part of
    such a ring stays in memory until the garbage collector comes by.
    """

    spans: list[Callable[[], float]]  # each gives seconds; shared by the layers of a cache

    def close_prompt(self, exact: dict[str, Any]) -> None:
        """Run stage 1, and note its span."""
        end = _begin_on_cuda() if self.store.keys is not None and self.store.keys.is_cuda else _begin()
        super().close_prompt(exact)
        self.spans.append(end())


def time_stage_1(cache: Any) -> Callable[[], float] | None:
    """Time stage 1 of each layer of a cache, and of those of its copies, from now on.

    Returns:
        What gives the seconds of all layers so far, or None where no layer is ours.
    """
    layers = rocketkv_layers(cache)
    spans: list[Callable[[], float]] = _Shared()
    for layer in layers:
        layer.__class__ = _TimedLayer
        layer.spans = spans  # type: ignore[attr-defined]  # of the class that it has now
    return (lambda: sum(span() for span in spans)) if layers else None


class _Shared(list[Callable[[], float]]):
    """A list that copies of what holds it go on to share."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def _begin() -> Callable[[], Callable[[], float]]:
    """Begin a span; what comes back ends it, and returns what gives its seconds."""
    start = time.perf_counter()

    def end() -> Callable[[], float]:
        seconds = time.perf_counter() - start
        return lambda: seconds

    return end


def _begin_on_cuda() -> Callable[[], Callable[[], float]]:
    """Begin a span on the present stream, between events: to wait for each layer would slow down what is measured."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()

    def end() -> Callable[[], float]:
        last.record()
        return lambda: float(first.elapsed_time(last)) / 1e3  # read once the device has caught up

    return end


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What to measure in a process of its own: a model on the CPU, a method, and the arguments of `measure_latency`.

    Attributes:
        model: see `load_model`; None for SmolLM2-135M-Instruct.
        dtype: of the weights, such as `float32`.
        method: see `find_method`.
        token_budget: likewise.
        settings: likewise, of JSON's types.
        threads: of PyTorch.
        prompt_tokens: see `measure_latency`.
        new_tokens: likewise.
        warmup: likewise.
        repeats: likewise.
        batch_size: likewise.
        seed: likewise.
    """

    model: str | None
    dtype: str
    method: str
    token_budget: int | None
    settings: dict[str, Any]
    threads: int
    prompt_tokens: int
    new_tokens: int
    warmup: int = 2
    repeats: int = 5
    batch_size: int = 1
    seed: int = 0


def measure_apart(configuration: Configuration) -> LatencyResult:
    """Measure in a new process of the same interpreter, so that no other measurement's memory counts.

    Raises:
        OutOfMemory: memory ran out there, or the system killed the process, as Linux does when it runs out.
        RuntimeError: it failed for another reason, whose message is passed on.
    """
    command = [sys.executable, "-c", _PROGRAM, json.dumps(asdict(configuration)), json.dumps(sys.path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    what = f"measuring {configuration.method} at {configuration.prompt_tokens} tokens"
    if child.returncode == _SIGKILL:
        raise OutOfMemory(f"{what}: the system killed the process (SIGKILL), as it does where memory runs out")
    if child.returncode:
        raise RuntimeError(f"{what} failed with exit code {child.returncode}:\n{child.stderr.strip()[-2000:]}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if answer["out_of_memory"] is not None:
        raise OutOfMemory(f"{what}: {answer['out_of_memory']}")
    return LatencyResult(**answer["result"])


def main(document: str) -> int:
    """Measure a configuration and print what came out, both as JSON; returns the exit code."""
    configuration = Configuration(**json.loads(document))
    answer: dict[str, Any] = {"result": None, "out_of_memory": None}
    try:
        answer["result"] = asdict(_measure(configuration))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        answer["out_of_memory"] = str(error) or type(error).__name__
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _measure(given: Configuration) -> LatencyResult:
    torch.set_num_threads(given.threads)
    model, _ = load_model(given.model, getattr(torch, given.dtype))
    return measure_latency(
        model,
        find_method(given.method, given.token_budget, given.settings),
        prompt_tokens=given.prompt_tokens,
        new_tokens=given.new_tokens,
        warmup=given.warmup,
        repeats=given.repeats,
        batch_size=given.batch_size,
        seed=given.seed,
    )
