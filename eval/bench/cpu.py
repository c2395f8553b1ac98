"""The benchmarks on a CPU: one attention layer, and whole decode steps of a model (see `cli`)."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ...config import RocketKVConfig
from ...core.params import AttentionParams
from ...core.sketch import Sketch, decode, rotation_matrix
from ...dispatch import decode_step
from ...environment import machine
from ...hf.cache import RocketKVCache, cache_stats
from ...hf.loading import load_model
from ...hf.models import CACHE_ARGUMENT
from ...hf.patch import patch, unpatch
from ...state.compress import close_prompt
from ...state.store import KVStore
from ..progress import Progress
from .cli import ROUNDS, STEPS

# Bound on the relative error of a sketch: about 0.75 for Gaussian keys in 1 bit, the largest (2 bits: 0.36), and more
# than 1 for keys that are not the sketched ones.
SKETCH_ERROR = 0.9


class Arm(NamedTuple):
    """A call that is timed, and a preparation before each round that is not."""

    call: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None


def run(args: argparse.Namespace) -> int:
    """Run a benchmark and print it; returns the exit code."""
    torch.set_num_threads(args.threads)
    if args.benchmark == "attention":
        result = bench_attention(context=args.context, token_budget=args.budget, rounds=args.rounds, steps=args.steps)
    else:
        result = bench_decode(
            args.model, context=args.context, token_budget=args.budget, rounds=args.rounds, steps=args.steps
        )
    sys.stdout.write((json.dumps(result, indent=2) if args.json else _table(result)) + "\n")
    return 0


def bench_attention(
    *,
    context: int,
    token_budget: int,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
) -> dict[str, Any]:
    """Time one layer's decode step, float32 on the CPU, against dense attention over the same keys and values.

    Args:
        context: S, tokens of the full cache.
        token_budget: t.
        rounds: alternating rounds.
        steps: calls a round; a round's time is their mean.
        heads: H.
        kv_heads: Hkv.
        head_dim: D.

    Raises:
        ValueError: the budget is so large that nothing is selected, or so small that `rocketkv+` cannot have it.
        RuntimeError: a result is wrong; nothing is timed then.
    """
    generator = torch.Generator().manual_seed(0)
    scaling = head_dim**-0.5
    params = AttentionParams(scaling)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    key, value = normal(1, kv_heads, context, head_dim), normal(1, kv_heads, context, head_dim)
    query, window = normal(1, heads, head_dim), normal(1, heads, 32, head_dim)
    new_key, new_value = normal(1, kv_heads, head_dim), normal(1, kv_heads, head_dim)
    config = RocketKVConfig(token_budget=token_budget)

    def closed(settings: RocketKVConfig) -> KVStore:
        store = KVStore()
        store.extend(key, value)
        store.prompt.remember(window, settings.window_size)
        split = settings.split_for(context, head_dim)
        close_prompt(store, split, params, decode_reserve=128, kernel_size=settings.pool_size)
        return store

    grouped = query.view(1, kv_heads, heads // kv_heads, head_dim)
    with torch.inference_mode(), Progress("checking", total=rounds) as progress:
        store, sketched = closed(config), closed(RocketKVConfig(method="rocketkv+", token_budget=token_budget))
        _check_full(closed(RocketKVConfig(method="full")), key, value, query, new_key, new_value, scaling)
        _check_step(store, query, new_key, new_value, scaling)
        _check_sketched_step(sketched, query, new_key, new_value, scaling)

        def sparse() -> Tensor:
            return decode_step(query, new_key, new_value, store, params)

        def plus() -> Tensor:
            return decode_step(query, new_key, new_value, sketched, params)

        def gqa() -> Tensor:
            return F.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True, scale=scaling)

        def group_rows() -> Tensor:
            return F.scaled_dot_product_attention(grouped, key, value, scale=scaling)

        calls = {"rocketkv": sparse, "rocketkv+": plus, "SDPA enable_gqa": gqa, "SDPA group as rows": group_rows}
        seconds = _alternate({name: Arm(call) for name, call in calls.items()}, rounds, steps, progress)
    shape = {"context": context, "token_budget": token_budget, "heads": heads, "kv_heads": kv_heads}
    return _result("attention", {**shape, "head_dim": head_dim, "dtype": "float32"}, seconds, rounds, steps)


def _check_full(
    store: KVStore, key: Tensor, value: Tensor, query: Tensor, new_key: Tensor, new_value: Tensor, scaling: float
) -> None:
    """Check that a step that reads everything is dense attention."""
    out = decode_step(query, new_key, new_value, store, AttentionParams(scaling))
    all_keys, all_values = (torch.cat(pair, 2) for pair in ((key, new_key[:, :, None]), (value, new_value[:, :, None])))
    dense = F.scaled_dot_product_attention(query[:, :, None], all_keys, all_values, enable_gqa=True, scale=scaling)
    _require_close("a step over all tokens", out, dense[:, :, 0])


def _check_step(store: KVStore, query: Tensor, new_key: Tensor, new_value: Tensor, scaling: float) -> None:
    """Check a sparse step against its definition, in plain loops over heads in float64 (paper, hybrid attention)."""
    out = decode_step(query, new_key, new_value, store, AttentionParams(scaling))
    (keys, values), split, stored = store.decoding.buffers[:2], store.decoding.split, store.stored
    if split.channels is None or split.top_k is None:
        raise RuntimeError("this method selects nothing")
    if stored <= split.token_budget:
        raise ValueError(
            f"token_budget must be below the {stored} stored tokens, or a step reads them all and selects nothing; got "
            f"{split.token_budget}"
        )
    keys, values = keys[0, :, :stored].double(), values[0, :, :stored].double()
    queries = query[0].double().view(keys.shape[0], -1, keys.shape[2])
    expected = []
    for head, group in enumerate(queries):
        channels = group.abs().sum(0).topk(split.channels).indices
        pages = torch.split(keys[head], split.page_size)
        high = torch.stack([page.amax(0) for page in pages])
        low = torch.stack([page.amin(0) for page in pages])
        bound = torch.where(group.sum(0) > 0, high, low)[:, channels]
        share = group[:, channels].abs().sum(1, keepdim=True) / group.abs().sum(1, keepdim=True)
        logits = group[:, channels] @ bound.T * scaling / share.sqrt()
        weight = logits.repeat_interleave(split.page_size, 1)[:, :stored].softmax(1).mean(0)
        chosen = sorted(range(stored), key=lambda token: (-float(weight[token]), token))[: split.top_k]
        attention = (group @ keys[head, chosen].T * scaling).softmax(1)
        expected.append(attention @ values[head, chosen])
    _require_close("a sparse step", out, torch.cat(expected)[None])


def _check_sketched_step(store: KVStore, query: Tensor, new_key: Tensor, new_value: Tensor, scaling: float) -> None:
    """Check a step of `rocketkv+` against its definition, on its own sketch's keys, in loops over heads in float64."""
    out = decode_step(query, new_key, new_value, store, AttentionParams(scaling))
    buffers, split, stored = store.decoding.buffers, store.decoding.split, store.stored
    keys, values, bias = buffers.keys, buffers.values, buffers.residual_bias
    if split.sketch_bits is None or split.top_k is None or bias is None:
        raise RuntimeError("this method has no sketch, or no calibrated residual")
    if stored <= split.token_budget:
        raise ValueError(
            f"token_budget must be below the {stored} stored tokens, or a step reads them all and selects nothing; got "
            f"{split.token_budget}"
        )
    rotation = rotation_matrix(query.shape[2], query.device)
    sketched = decode(Sketch(*buffers.index_tensors), stored, rotation, split.sketch_bits)[0].double()
    keys, values = keys[0, :, :stored].double(), values[0, :, :stored].double()
    if not (sketched - keys).norm() < SKETCH_ERROR * keys.norm():
        raise RuntimeError("the sketch is not one of the stored keys; nothing is timed")
    queries = query[0].double().view(keys.shape[0], -1, keys.shape[2])
    factors = bias[0].double().exp().view(keys.shape[0], -1, 1)
    expected = []
    for head, group in enumerate(queries):
        estimate = group @ sketched[head].T * scaling
        weight = estimate.softmax(1).amax(0)
        chosen = sorted(range(stored), key=lambda token: (-float(weight[token]), token))[: split.top_k]
        others = sorted(set(range(stored)) - set(chosen))
        near = (group @ keys[head, chosen].T * scaling).exp()
        rest = estimate[:, others].exp().sum(1, keepdim=True) * factors[head]
        whole = near @ values[head, chosen] + rest * values[head, others].mean(0)
        expected.append(whole / (near.sum(1, keepdim=True) + rest))
    _require_close("a step of rocketkv+", out, torch.cat(expected)[None])


def _require_close(what: str, got: Tensor, expected: Tensor) -> None:
    error = float((got.double() - expected.double()).abs().max())
    if not error < 1e-4:
        raise RuntimeError(f"{what} is wrong by {error:.2e}; nothing is timed")


def bench_decode(
    model_name: str | None, *, context: int | None, token_budget: int, rounds: int = ROUNDS, steps: int = STEPS
) -> dict[str, Any]:
    """Time whole decode steps of a model after a prompt of random tokens: compressed, stock, dense preallocated.

    Args:
        model_name: a hub name or folder, or None for SmolLM2-135M-Instruct.
        context: prompt tokens; None for 8192 less what will be decoded.
        token_budget: t.
        rounds: alternating rounds.
        steps: decode steps a round; a round's time is their mean.

    Raises:
        RuntimeError: at full budget the patched model's logits are not the stock model's; nothing is timed then.
    """
    length = 8192 - (rounds + 1) * steps if context is None else context
    model, _ = load_model(model_name)
    configs = {
        "rocketkv": RocketKVConfig(token_budget=token_budget),
        "rocketkv+": RocketKVConfig(method="rocketkv+", token_budget=token_budget),
        "stock": None,
        "dense preallocated": RocketKVConfig(method="full"),
    }
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    with torch.inference_mode(), Progress("checking", total=rounds) as progress:
        _check_logits(model, prompt[:, :512])
        caches: dict[str, Any] = {}
        for name, config in configs.items():
            progress.say(f"{name}: reading {length} tokens")
            caches[name] = _prefilled(model, prompt, config)
        arms = {name: _stepper(model, caches[name], config) for name, config in configs.items()}
        seconds = _alternate(arms, rounds, steps, progress)
    result = _result(
        "decode", {"context": length, "token_budget": token_budget, "dtype": "float32"}, seconds, rounds, steps
    )
    result["kv_bytes"] = {name: cache_stats(cache).total_bytes for name, cache in caches.items()}
    return result


def _check_logits(model: PreTrainedModel, prompt: Tensor) -> None:
    """Check that a patched model within its budget gives the stock model's logits, prefill and decoding."""

    def logits(cache: Any) -> Tensor:
        first = model(prompt[:, :-2], **{CACHE_ARGUMENT: cache}).logits[:, -1]
        return torch.stack(
            [first, *(model(prompt[:, i][:, None], **{CACHE_ARGUMENT: cache}).logits[:, -1] for i in (-2, -1))]
        )

    expected = logits(DynamicCache(config=model.config))
    with patch(model, token_budget=1024) as handle:
        _require_close("a model within its budget", logits(RocketKVCache(model.config, handle.config)), expected)


def _prefilled(model: PreTrainedModel, prompt: Tensor, config: RocketKVConfig | None) -> Any:
    if config is None:
        cache: Any = DynamicCache(config=model.config)
        model(prompt, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        return cache
    cache = RocketKVCache(model.config, config, prompt_length=prompt.shape[1])
    with patch(model, config):
        model(prompt, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    return cache


def _stepper(model: PreTrainedModel, cache: Any, config: RocketKVConfig | None) -> Arm:
    """Return what decodes one token, and sees to it before that the model is patched or not, as it needs."""
    token = torch.zeros(1, 1, dtype=torch.int64)

    def prepare() -> None:
        if config is None:
            unpatch(model)
        else:
            patch(model, config)

    def step() -> Any:
        return model(token, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)

    return Arm(step, prepare)


def _alternate(arms: dict[str, Arm], rounds: int, steps: int, progress: Progress) -> dict[str, list[float]]:
    """Time every arm in turn, round after round; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        progress.say(f"timing round {number} of {rounds}")
        for name, arm in arms.items():
            arm.prepare()
            start = time.perf_counter()
            for _ in range(steps):
                arm.call()
            if number:
                seconds[name].append((time.perf_counter() - start) / steps)
        progress.step()
    return seconds


def _result(
    what: str, settings: dict[str, Any], seconds: dict[str, list[float]], rounds: int, steps: int
) -> dict[str, Any]:
    """Gather medians, spreads and ratios; a ratio is the median of the rounds' own."""
    ours = seconds["rocketkv"]
    return {
        "bench": what,
        **settings,
        "rounds": rounds,
        "steps": steps,
        "milliseconds": {
            name: {"median": 1e3 * median(times), "min": 1e3 * min(times), "max": 1e3 * max(times)}
            for name, times in seconds.items()
        },
        "speedup_over": {
            name: {
                "median": median(ratios := [b / a for a, b in zip(ours, times, strict=True)]),
                "min": min(ratios),
                "max": max(ratios),
            }
            for name, times in seconds.items()
            if name != "rocketkv"
        },
        "machine": machine(),
    }


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'':20} {'ms a step':>10} {'min-max':>17} {'rocketkv is faster':>20}"]
    for name, times in result["milliseconds"].items():
        ratio = result["speedup_over"].get(name)
        faster = f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else ""
        spread = f"{times['min']:.2f}-{times['max']:.2f}"
        lines.append(f"{name:20} {times['median']:10.2f} {spread:>17} {faster:>20}")
    host = result["machine"]
    lines.append(
        f"{result['rounds']} rounds of {result['steps']} steps; {host['processor']}, {host['threads']} threads"
    )
    return "\n".join(lines)
