"""The benchmark of one attention layer on a CPU (see `cli`)."""

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from ...config import RocketKVConfig
from ...core.params import AttentionParams
from ...core.sketch import Sketch, rotation_matrix
from ...core.sketch_decode import decode
from ...dispatch import Workspaces, decode_step
from ...environment import machine
from ...state.compress import close_prompt
from ...state.store import KVStore
from ..checks import WrongResultError
from .cli import ROUNDS, STEPS
from .gpu_timing import alternate, ratios, spread

# The relative error of Gaussian keys is largest in 1 bit, about 0.75 (2 bits: 0.36); that of other keys is more than 1.
SKETCH_ERROR = 0.9
MOST_COPIES = 64


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print it; returns the exit code."""
    torch.set_num_threads(args.threads)
    result = bench_attention(context=args.context, token_budget=args.budget, rounds=args.rounds, steps=args.steps)
    sys.stdout.write((json.dumps(result, indent=2) if args.json else table(result)) + "\n")
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
        WrongResultError: a result differs from its definition; nothing is timed then.
    """
    generator = torch.Generator().manual_seed(0)
    scaling = head_dim**-0.5
    params = AttentionParams(scaling)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    key, value = normal(1, kv_heads, context, head_dim), normal(1, kv_heads, context, head_dim)
    query, window = normal(1, heads, head_dim), normal(1, heads, 32, head_dim)
    new_key, new_value = normal(1, kv_heads, head_dim), normal(1, kv_heads, head_dim)
    config = RocketKVConfig(method="rocketkv", token_budget=token_budget)

    def closed(settings: RocketKVConfig) -> KVStore:
        store = KVStore()
        store.extend(key, value)
        store.prompt.remember(window, settings.window_size)
        split = settings.split_for(context, head_dim)
        close_prompt(store, split, params, decode_reserve=128, kernel_size=settings.stage_1_kernel_size)
        return store

    grouped = query.view(1, kv_heads, heads // kv_heads, head_dim)
    with torch.inference_mode():
        store, sketched = closed(config), closed(RocketKVConfig(method="rocketkv+", token_budget=token_budget))
        _check_full(closed(RocketKVConfig(method="full")), key, value, query, new_key, new_value, scaling)
        _check_step(store, query, new_key, new_value, scaling)
        _check_sketched_step(sketched, query, new_key, new_value, scaling)
        read = _bytes_read(store)
        copies = min(MOST_COPIES, 1 + 2 * last_level_cache() // read)

        def stepping(first: KVStore) -> Callable[[], Tensor]:
            stores, shared = itertools.cycle(_past_the_cache(first)), Workspaces()
            return lambda: decode_step(query, new_key, new_value, next(stores), params, workspaces=shared)

        sources = itertools.cycle(torch.empty(copies, read // 4).normal_(generator=generator))
        to = torch.empty(read // 4)

        def gqa() -> Tensor:
            return F.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True, scale=scaling)

        def group_rows() -> Tensor:
            return F.scaled_dot_product_attention(grouped, key, value, scale=scaling)

        calls = {
            "rocketkv": stepping(store),
            "rocketkv+": stepping(sketched),
            "copy of its bytes": lambda: to.copy_(next(sources)),
            "SDPA enable_gqa": gqa,
            "SDPA group as rows": group_rows,
        }
        seconds = alternate({name: partial(_mean_seconds, call, steps) for name, call in calls.items()}, rounds)
    shape = {"context": context, "token_budget": token_budget, "heads": heads, "kv_heads": kv_heads}
    return result_of("attention", {**shape, "head_dim": head_dim, "dtype": "float32"}, seconds, rounds, steps)


def _bytes_read(store: KVStore) -> int:
    """Return the bytes that a step of `rocketkv` reads: bounds in its channels, and the chosen keys and values."""
    split, keys, values = store.decoding.split, store.decoding.keys, store.decoding.values
    scored = -(-store.stored // split.page_size) * (split.channels or 0)
    attended = (split.top_k or 0) * (keys.shape[3] + values.shape[3])
    return keys.shape[0] * keys.shape[1] * keys.itemsize * (scored + attended)


def last_level_cache() -> int:
    """Return the bytes of the CPU's last-level cache, or 32 MiB where Linux does not tell them."""
    found = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        found.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(found)


def _past_the_cache(store: KVStore) -> list[KVStore]:
    """Return the store and copies of it, so many that a step finds none of its own in the last-level cache."""
    size = sum(tensor.nbytes for tensor in store.tensors().values())
    return [store, *(copy.deepcopy(store) for _ in range(min(MOST_COPIES, 2 * last_level_cache() // size)))]


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
    split, stored = store.decoding.split, store.stored
    if split.channels is None:
        raise RuntimeError("this method ranks by no pages")
    queries, keys, values = _stored(store, query)
    expected = []
    for head, group in enumerate(queries):
        channels = group.abs().sum(0).topk(split.channels).indices
        pages = torch.split(keys[head], split.page_size)
        high = torch.stack([page.amax(0) for page in pages])
        low = torch.stack([page.amin(0) for page in pages])
        bound = torch.where(group.sum(0) > 0, high, low)[:, channels]
        share = group[:, channels].abs().sum(1, keepdim=True) / group.abs().sum(1, keepdim=True)
        logits = group[:, channels] @ bound.T * scaling / share.sqrt()
        chosen = _chosen(logits.repeat_interleave(split.page_size, 1)[:, :stored].softmax(1).mean(0), split.top_k)
        attention = (group @ keys[head, chosen].T * scaling).softmax(1)
        expected.append(attention @ values[head, chosen])
    _require_close("a sparse step", out, torch.cat(expected)[None])


def _check_sketched_step(store: KVStore, query: Tensor, new_key: Tensor, new_value: Tensor, scaling: float) -> None:
    """Check a step of `rocketkv+` against its definition, on its own sketch's keys, in loops over heads in float64."""
    out = decode_step(query, new_key, new_value, store, AttentionParams(scaling))
    buffers, split, stored = store.decoding.buffers, store.decoding.split, store.stored
    if split.sketch_bits is None or buffers.residual_bias is None:
        raise RuntimeError("this method has no sketch, or no calibrated residual")
    queries, keys, values = _stored(store, query)
    rotation = rotation_matrix(query.shape[2], query.device)
    sketched = decode(Sketch(*buffers.index_tensors), stored, rotation, split.sketch_bits)[0].double()
    if not (sketched - keys).norm() < SKETCH_ERROR * keys.norm():
        raise RuntimeError("the sketch is not one of the stored keys; nothing is timed")
    factors = buffers.residual_bias[0].double().exp().view(keys.shape[0], -1, 1)
    expected = []
    for head, group in enumerate(queries):
        estimate = group @ sketched[head].T * scaling
        chosen = _chosen(estimate.softmax(1).amax(0), split.top_k)
        others = sorted(set(range(stored)) - set(chosen))
        near = (group @ keys[head, chosen].T * scaling).exp()
        overestimate = estimate[:, chosen].exp().sum(1, keepdim=True) / near.sum(1, keepdim=True)
        rest = estimate[:, others].exp().sum(1, keepdim=True) * factors[head] / overestimate.clamp(min=1).sqrt()
        whole = near @ values[head, chosen] + rest * values[head, others].mean(0)
        expected.append(whole / (near.sum(1, keepdim=True) + rest))
    _require_close("a step of rocketkv+", out, torch.cat(expected)[None])


def _stored(store: KVStore, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a step's queries [Hkv, G, D] and its stored keys and values [Hkv, N, D], all in float64."""
    budget, stored = store.decoding.split.token_budget, store.stored
    if stored <= budget:
        raise ValueError(
            f"token_budget must be below the {stored} stored tokens, or a step reads them all and selects nothing; got "
            f"{budget}"
        )
    keys, values = (tensor[0, :, :stored].double() for tensor in store.decoding.buffers[:2])
    return query[0].double().view(keys.shape[0], -1, keys.shape[2]), keys, values


def _chosen(weight: Tensor, count: int | None) -> list[int]:
    """Return the tokens of largest weight [N]; equal ones in order of position."""
    return sorted(range(len(weight)), key=lambda token: (-float(weight[token]), token))[:count]


def _require_close(what: str, got: Tensor, expected: Tensor) -> None:
    error = float((got.double() - expected.double()).abs().max())
    if not error < 1e-4:
        raise WrongResultError(f"{what} is wrong by {error:.2e}; nothing is timed")


def _mean_seconds(call: Callable[[], Any], count: int) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.timeit(count).mean


def result_of(
    bench: str, settings: dict[str, Any], seconds: dict[str, list[float]], rounds: int, steps: int
) -> dict[str, Any]:
    """Return medians, spreads and ratios; a ratio is the median of the rounds' ratios."""
    ours = seconds["rocketkv"]
    others = {name: times for name, times in seconds.items() if name != "rocketkv"}
    return {
        "bench": bench,
        **settings,
        "rounds": rounds,
        "steps": steps,
        "milliseconds": {name: spread(times, 1e3) for name, times in seconds.items()},
        "speedup_over": {name: ratios(times, ours) for name, times in others.items()},
        "machine": machine(),
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':24} {'ms a step':>10} {'min-max':>17} {'rocketkv is faster':>20}"]
    for name, times in result["milliseconds"].items():
        ratio = result["speedup_over"].get(name)
        faster = f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else ""
        spread = f"{times['min']:.2f}-{times['max']:.2f}"
        lines.append(f"{name:24} {times['median']:10.2f} {spread:>17} {faster:>20}")
    host = result["machine"]
    lines.append(
        f"{result['rounds']} rounds of {result['steps']} steps; {host['processor']}, {host['threads']} threads"
    )
    return "\n".join(lines)
