"""Every method against a plain loop of its definition, which shares no code with the library."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from close import assert_near
from naive_methods import BUDGET, HKV, KERNEL, PROMPT, SCALING, STEPS, WINDOW, D, H, Head, best, snap, sparse
from rocketkv.budget import METHODS
from rocketkv.config import RocketKVConfig
from rocketkv.core.params import AttentionParams
from rocketkv.dispatch import decode_step
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore


def compression(head: Head) -> float:
    return max(1.0, (PROMPT + head.reserve) / BUDGET)


def rocket_capacity(head: Head) -> int:
    c = compression(head)
    total = PROMPT + head.reserve
    return max(math.floor(total / c ** min(0.2 + 0.06 * math.log2(c), 0.8)), min(2 * head.reserve, total))


def exact(head: Head, at: int, stored: list[int], k: int) -> list[int]:
    weights = head.logits(at, stored).softmax(-1).mean(0)
    return [stored[i] for i in best(weights.tolist(), k)]


def even_levels(numbers: list[float], step: float) -> list[float]:
    """Round to the nearest of the four levels -1.5, -0.5, 0.5 and 1.5 steps."""
    return [max(-1.5, min(1.5, math.floor(number / step) + 0.5)) for number in numbers]


def spread(head_dim: int) -> Tensor:
    """Return random signs, then minus a Hadamard matrix by its definition, the parity of common bits: orthogonal."""
    draw = random.Random(head_dim)
    signs = [1 if draw.random() < 0.5 else -1 for _ in range(head_dim)]
    rows = [[-((-1) ** (i & j).bit_count()) * signs[j] for j in range(head_dim)] for i in range(head_dim)]
    return torch.tensor(rows, dtype=torch.float64) / math.sqrt(head_dim)


def balanced(queries: list[Tensor], keys: Tensor) -> Tensor:
    """Return a factor for each channel: the larger, the more queries ask for it and the less keys differ."""
    asked = torch.stack([query.square().sum(0) for query in queries]).sum(0)
    factors = (asked / (keys - keys.mean(0)).square().sum(0)) ** 0.25
    return (factors / 2 ** factors.min().log2().floor()).to(torch.bfloat16).double()


def sketched(key: Tensor, mean: Tensor, factors: Tensor) -> Tensor:
    """Return what two bits a channel tell of a key: levels fit for a Gaussian, scaled to have the right product."""
    difference = (key - mean) * factors
    grain = float(difference.abs().max()) / 256
    whole = torch.tensor([round(x / grain) for x in difference.tolist()], dtype=torch.float64)
    turned = spread(D) @ whole
    step = 0.9957 * math.sqrt(float(turned @ turned) / D)
    levels = torch.tensor(even_levels(turned.tolist(), step), dtype=torch.float64)
    scale = (grain * (whole @ whole) / (turned @ levels)).to(torch.bfloat16).double()
    return mean + scale * (spread(D).T @ levels) / factors


Steps = list[Tensor]


def full(head: Head) -> Steps:
    return [head.attend(at, list(range(at + 1))) for at in range(PROMPT, PROMPT + STEPS)]


def rocketkv(head: Head) -> Steps:
    capacity = rocket_capacity(head)
    c2 = max(1.0, capacity / BUDGET)
    page = math.ceil(math.sqrt(c2))
    page = 1 if page > c2 else page
    channels = max(1, math.floor(D * page / c2))
    kept = snap(head, capacity - head.reserve)
    out = []
    for at in range(PROMPT, PROMPT + STEPS):
        stored = kept + list(range(PROMPT, at + 1))
        out.append(head.attend(at, sparse(head, at, stored, page, channels, BUDGET // 2)))
    return out


def rocketkv_plus(head: Head, attended: int = BUDGET // 2) -> Steps:
    total = PROMPT + head.reserve
    token, sketch = 4 * D, D // 4 + 2  # bytes
    capacity = max(min(((BUDGET - attended) * token - 2 * D) // sketch, total), min(2 * head.reserve, total))
    k = math.floor(BUDGET - (capacity * sketch + 2 * D) / token) - 1
    # Moved back by two tokens, but no further than to end at the token itself.
    ahead = max(0, KERNEL // 2 - 2)
    kept = list(range(PROMPT))
    if capacity < total:
        kept = snap(head, capacity - head.reserve, value_aware=True, ahead=ahead)
    mean = head.keys[kept].mean(0)
    factors = balanced([head.queries[at] for at in range(PROMPT - WINDOW, PROMPT)], head.keys[kept])
    estimates = {i: sketched(head.keys[i], mean, factors) for i in [*kept, *range(PROMPT, PROMPT + STEPS)]}

    def parted(at: int, stored: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what is attended to, its mass [G, 1], that of the others, and their mean value."""
        estimate = torch.stack([head.queries[at] @ estimates[i] * SCALING for i in stored], 1)
        chosen = [stored[i] for i in best(estimate.softmax(-1).amax(0).tolist(), k)]
        others = [i for i in range(len(stored)) if stored[i] not in chosen]
        mass, rest = head.logits(at, chosen).exp(), estimate[:, others].exp().sum(-1, keepdim=True)
        guessed = estimate.exp().sum(-1, keepdim=True) - rest
        rest = rest * (mass.sum(-1, keepdim=True) / guessed).clamp(max=1).sqrt()
        mean_value = head.values[[stored[i] for i in others]].mean(0)
        return mass @ head.values[chosen], mass.sum(-1, keepdim=True), rest, mean_value

    # By what factor of the others' mass the window's queries would have erred least, each as if it were a step.
    halves = torch.zeros(2, 2, len(head.queries[0]), 1, dtype=torch.float64)
    for at in range(PROMPT - WINDOW, PROMPT) if len(kept) > BUDGET else ():
        stored = [i for i in kept if i <= at]
        own, mass, rest, mean_value = parted(at, stored)
        full = head.attend(at, list(range(at + 1)))
        fixed, linear = (own - mass * full) / (mass + rest), rest * (mean_value - full) / (mass + rest)
        terms = torch.stack((-(fixed * linear).sum(-1), linear.square().sum(-1))) / full.square().sum(-1)
        halves[(at - PROMPT + WINDOW) % 2] += terms[..., None]

    def fitted(cross: Tensor, square: Tensor) -> Tensor:
        return ((cross + 0.1 * square + 1e-6) / (1.1 * square + 1e-6)).clamp(1e-4, 3)

    # None where what one half of the queries says makes the other half err more.
    crossed = [(fitted(*halves[1 - half]), *halves[half]) for half in (0, 1)]
    added = torch.stack([tried**2 * square - 2 * tried * cross for tried, cross, square in crossed]).sum(0)
    factor = torch.where(added > 1e-6, 1e-4, fitted(*halves.sum(0)))
    out = []
    for at in range(PROMPT, PROMPT + STEPS):
        own, mass, rest, mean_value = parted(at, kept + list(range(PROMPT, at + 1)))
        out.append((own + factor * rest * mean_value) / (mass + factor * rest))
    return out


def snapkv(head: Head) -> Steps:
    kept = snap(head, BUDGET)
    return [head.attend(at, kept + list(range(PROMPT, at + 1))) for at in range(PROMPT, PROMPT + STEPS)]


def quest(head: Head) -> Steps:
    page = math.ceil(compression(head))
    steps = range(PROMPT, PROMPT + STEPS)
    return [head.attend(at, sparse(head, at, list(range(at + 1)), page, D, BUDGET // 2)) for at in steps]


def sparq(head: Head) -> Steps:
    channels = max(1, math.floor(D / compression(head)))
    steps = range(PROMPT, PROMPT + STEPS)
    return [head.attend(at, sparse(head, at, list(range(at + 1)), 1, channels, BUDGET // 2)) for at in steps]


def streaming(head: Head) -> Steps:
    steps = range(PROMPT, PROMPT + STEPS)
    return [head.attend(at, [0, 1, 2, 3, *range(at + 1 - (BUDGET - 4), at + 1)]) for at in steps]


def exact_topk(head: Head) -> Steps:
    steps = range(PROMPT, PROMPT + STEPS)
    return [head.attend(at, exact(head, at, list(range(at + 1)), BUDGET)) for at in steps]


def stored_topk(head: Head) -> Steps:
    kept = snap(head, rocket_capacity(head) - head.reserve)
    out = []
    for at in range(PROMPT, PROMPT + STEPS):
        stored = kept + list(range(PROMPT, at + 1))
        out.append(head.attend(at, exact(head, at, stored, BUDGET // 2)))
    return out


DEFINITIONS: dict[str, Callable[[Head], Steps]] = {
    "full": full,
    "rocketkv": rocketkv,
    "rocketkv+": rocketkv_plus,
    "rocketkv-mt": rocketkv,  # of one turn, its filter decodes as the eviction does
    "rocketkv-mt+": functools.partial(rocketkv_plus, attended=BUDGET * 13 // 20),
    "snapkv": snapkv,
    "quest": quest,
    "sparq": sparq,
    "streaming": streaming,
    "exact-topk": exact_topk,
    "stored-topk": stored_topk,
}


def test_every_method_has_a_definition() -> None:
    assert DEFINITIONS.keys() == METHODS.keys()


# With 20 tokens of reserve, the buffers never fill up; with 5, they grow by a step, or roll.
@pytest.mark.parametrize(("batch", "reserve"), [(1, 20), (2, 5)])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_definition(method: str, batch: int, reserve: int) -> None:
    tokens = PROMPT + STEPS
    query, key, value = (
        torch.randn(batch, H, tokens, D),
        torch.randn(batch, HKV, tokens, D),
        torch.randn(batch, HKV, tokens, D),
    )
    config = RocketKVConfig(
        method=method, token_budget=BUDGET, window_size=WINDOW, kernel_size=KERNEL, decode_reserve=reserve
    )
    store = KVStore()
    store.extend(key[:, :, :PROMPT], value[:, :, :PROMPT])
    store.prompt.remember(query[:, :, :PROMPT], WINDOW)
    split, params = config.split_for(PROMPT, D), AttentionParams(SCALING)
    close_prompt(store, split, params, decode_reserve=reserve, kernel_size=KERNEL)
    steps = range(PROMPT, tokens)
    found = torch.stack([decode_step(query[:, :, at], key[:, :, at], value[:, :, at], store, params) for at in steps])
    group = H // HKV
    for b in range(batch):
        for g in range(HKV):
            own = slice(g * group, (g + 1) * group)
            head = Head(query[b, own].transpose(0, 1).double(), key[b, g].double(), value[b, g].double(), reserve)
            assert_near(found[:, b, own], torch.stack(DEFINITIONS[method](head)))
