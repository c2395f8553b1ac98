"""Choose the split of a layer's prompt: by the token budget, or by the estimated error of decode steps (`max_error`).

Beyond the paper. The estimate decodes the second half of the observation window again, as if the prompt had ended
before it. Stage 1 ranks by the queries of the first half alone; each step runs the method and is compared with exact
attention to the whole prompt. So the error includes evicted tokens, unselected tokens and the residual, and the queries
that measure it have not ranked any token. Tokens that earlier turns evicted do not count.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, S tokens of the prompt, W window.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..budget import METHODS, BudgetSplit
from ..config import RocketKVConfig
from ..core.eviction import TORCH_OPS, EvictionOps
from ..core.index import index_of
from ..core.pages import index_dtype_of
from ..core.params import AttentionParams
from ..core.verify import verify_step_torch
from .compress import close_prompt, window_outputs
from .protection import protected_count
from .store import KVStore

# Trial budgets: the smallest, and each next one larger by a factor. Between two of them, the logarithm of the error is
# interpolated linearly over the logarithm of the budget.
SMALLEST, FACTOR = 64, 4

# Number of independent steps in half a window, since neighbouring tokens have similar errors (docs/beyond.md).
INDEPENDENT = 4

# One-sided confidence of 95 %: the quantile of Student's t with INDEPENDENT - 1 degrees of freedom, since the standard
# deviation is that of the same few steps.
QUANTILE = 2.353

# Chosen budgets are multiples of this.
GRAIN = 8


class FittedBudget(NamedTuple):
    """A layer's budget and its estimated error.

    Attributes:
        token_budget: t, or None to keep and read all tokens.
        expected_error: upper confidence bound of the mean relative error; 0 for all tokens.
        tried: trial budgets, if none is within the bound; otherwise empty.
    """

    token_budget: int | None
    expected_error: float
    tried: tuple[int, ...] = ()


def prompt_split(
    store: KVStore,
    config: RocketKVConfig,
    prompt_tokens: int,
    params: AttentionParams,
    warn: Callable[[str], None],
    ops: EvictionOps = TORCH_OPS,
) -> tuple[BudgetSplit, float | None]:
    """Return the split of an open prompt, and with `max_error` the estimated bound of its error.

    Args:
        store: the layer's store, with an open prompt and its last queries.
        config: the settings of the layer.
        prompt_tokens: tokens of the longest row.
        params: the model's attention parameters.
        warn: called with a message if no budget is within `max_error`.
        ops: the backend's operations of stage 1.
    """
    head_dim = store.prompt.keys.shape[3]
    if config.max_error is None:
        return config.split_for(prompt_tokens, head_dim), None

    index_dtype = index_dtype_of(config.index_dtype)

    def split_of(budget: int) -> BudgetSplit:
        split = config.split_of(budget, prompt_tokens, head_dim)
        return within_full_bytes(split, store, config.decode_reserve, index_dtype)

    fitted = fitted_budget(
        store,
        split_of,
        params,
        max_error=config.max_error,
        least=METHODS[config.method].least_budget(config.window_size, config.decode_reserve),
        kernel_size=config.stage_1_kernel_size,
        decode_reserve=config.decode_reserve,
        index_dtype=index_dtype,
        ops=ops,
    )
    if fitted.token_budget is not None:
        return split_of(fitted.token_budget), fitted.expected_error
    if fitted.tried:
        warn(
            f"RocketKV: no budget up to {fitted.tried[-1]} tokens is expected to be within "
            f"max_error={config.max_error} in some layers; they keep and read all tokens (see the cache's stats)"
        )
    return BudgetSplit(token_budget=max(1, prompt_tokens)), fitted.expected_error


def fitted_budget(
    store: KVStore,
    split_of: Callable[[int], BudgetSplit],
    params: AttentionParams,
    *,
    max_error: float,
    least: int,
    kernel_size: int,
    decode_reserve: int,
    index_dtype: torch.dtype | None = None,
    ops: EvictionOps = TORCH_OPS,
) -> FittedBudget:
    """Return the least budget whose estimated error is within a bound.

    It waits for the device once, and with padding once more for each trial budget. Rows with padding among the tokens
    that are decoded again have no part in the estimate.

    Args:
        store: the layer's store, with an open prompt and its last queries.
        split_of: the method's split of a budget.
        params: the model's attention parameters.
        max_error: bound of the mean relative error of attention outputs: of the worst row, the mean over KV heads and
            steps of |output - exact| / |exact|, over the group's heads together.
        least: the least budget of the method.
        kernel_size: odd width of stage 1's max-pooling.
        decode_reserve: slots beyond the kept tokens.
        index_dtype: dtype of page bounds, or None for the dtype of the keys.
        ops: the backend's operations of stage 1.

    Returns:
        The budget; all tokens if the prompt is too short to compress, if no budget up to half of it is within the
        bound, or if the kept tokens and their index would take more bytes.
    """
    queries, stored = store.prompt.queries, store.lens.longest
    tried = []
    budget = max(SMALLEST, -(-least // GRAIN) * GRAIN)
    while budget <= stored // 2:
        tried.append(budget)
        budget *= FACTOR
    if queries is None or queries.shape[2] < 4 or not tried:
        return FittedBudget(None, 0.0)
    if tried[-1] < stored // 2 // GRAIN * GRAIN:
        tried.append(stored // 2 // GRAIN * GRAIN)
    whole = _whole_rows(store)
    if whole is None:
        return FittedBudget(None, 0.0)
    store = whole
    exact = _exact_outputs(store, params)
    common = (params, exact, kernel_size, decode_reserve, index_dtype, ops)
    bounds = torch.stack([_error_bound(store, split_of(budget), *common) for budget in tried])
    fitted = _least_within(tried, bounds.tolist(), max_error)
    if fitted.token_budget is not None and not _fits(store, split_of(fitted.token_budget), index_dtype):
        return FittedBudget(None, 0.0)
    return fitted


def within_full_bytes(
    split: BudgetSplit, store: KVStore, decode_reserve: int, index_dtype: torch.dtype | None = None
) -> BudgetSplit:
    """Return a split that keeps so few tokens that an index of them takes no more bytes than it lets stage 1 save.

    Keys, values and index of the kept tokens, and of room for `decode_reserve` more, then have at most the bytes of the
    keys and values of all tokens with the same room. At least the observation window and protected tokens are kept. A
    split without stage 1 stays as it is.

    Args:
        split: of the layer.
        store: the layer's store, with an open prompt.
        decode_reserve: slots beyond the kept tokens.
        index_dtype: dtype of page bounds, or None for the dtype of the keys.
    """
    kept, stored, queries = split.kept_tokens, store.lens.longest, store.prompt.queries
    if kept is None or queries is None:
        return split
    full = (stored + decode_reserve) * _token_bytes(store)
    slots = range(stored + decode_reserve + 1)
    most = bisect_right(slots, full, key=lambda count: _bytes_of(split, store, count, index_dtype)) - 1
    most -= decode_reserve + _protected(store)
    return replace(split, kept_tokens=min(kept, max(queries.shape[2], most)))


def _fits(store: KVStore, split: BudgetSplit, index_dtype: torch.dtype | None) -> bool:
    """Whether the kept tokens and their index take no more bytes than all tokens."""
    stored = store.lens.longest
    kept = stored if split.kept_tokens is None else min(split.kept_tokens + _protected(store), stored)
    return _bytes_of(split, store, kept, index_dtype) <= stored * _token_bytes(store)


def _protected(store: KVStore) -> int:
    """Return the protected tokens of the row that has most of them."""
    return 0 if store.marks is None else protected_count(store.marks, store.lens.seen)


def _token_bytes(store: KVStore) -> int:
    """Return the bytes of a token's key and value per row and KV head."""
    keys, values = store.prompt.keys, store.prompt.values
    return (keys.shape[3] + values.shape[3]) * keys.itemsize


def _bytes_of(split: BudgetSplit, store: KVStore, count: int, index_dtype: torch.dtype | None) -> int:
    """Return the bytes of some tokens, and of a split's index of them, per row and KV head."""
    keys, index = store.prompt.keys, index_of(split)
    itemsize = (index_dtype or keys.dtype).itemsize
    index_bytes = 0 if index is None else index.row_bytes(count, keys.shape[3], itemsize)
    return count * _token_bytes(store) + index_bytes


def _whole_rows(store: KVStore) -> KVStore | None:
    """Return the open prompt of the rows without padding among the last tokens, or None if there is no such row."""
    prompt, valid = store.prompt, store.prompt.valid(store.lens.longest)
    if valid is None:
        return store
    has_all = valid[:, 0, -_steps(store) - 1 :].all(-1).tolist()
    if all(has_all):
        return store
    rows = [row for row, has in enumerate(has_all) if has]
    if not rows:
        return None
    part, phase = KVStore(), replace(prompt)
    phase.set_tensors({name: tensor[rows] for name, tensor in prompt.tensors().items()})
    part.phase = phase
    part.lens = store.lens.copy()
    part.marks = None if store.marks is None else tuple(store.marks[row] for row in rows)
    return part


def _least_within(tried: list[int], errors: list[float], max_error: float) -> FittedBudget:
    """Return the least budget within the bound, interpolated between trial budgets."""
    for number, (budget, error) in enumerate(zip(tried, errors, strict=True)):
        if not error <= max_error:  # NaN is no error within a bound
            continue
        below = errors[number - 1] if number else math.nan
        if not error < below < math.inf or error <= 0:
            return FittedBudget(budget, error)
        share = math.log(below / max_error) / math.log(below / error)
        between = tried[number - 1] * (budget / tried[number - 1]) ** share
        return FittedBudget(min(budget, math.ceil(between / GRAIN) * GRAIN), max_error)
    return FittedBudget(None, 0.0, tuple(tried))


def _steps(store: KVStore) -> int:
    """Return how many of the prompt's last tokens are decoded again."""
    queries = store.prompt.queries
    return 0 if queries is None else queries.shape[2] // 2


def _exact_outputs(store: KVStore, params: AttentionParams) -> Tensor:
    """Return the outputs [B, n, H, Dv] of attention to all tokens, for the tokens that are decoded again."""
    return window_outputs(store.prompt, _last_queries(store), store.lens.longest, params)


def _last_queries(store: KVStore) -> Tensor:
    """Return the queries [B, H, n, D] of the tokens that are decoded again."""
    queries = store.prompt.queries
    if queries is None:
        raise ValueError("a budget is fitted by the prompt's last queries: remember them first")
    return queries[:, :, queries.shape[2] - _steps(store) :]


@torch.inference_mode(False)
@torch.no_grad()
def _error_bound(
    store: KVStore,
    split: BudgetSplit,
    params: AttentionParams,
    exact: Tensor,
    kernel_size: int,
    decode_reserve: int,
    index_dtype: torch.dtype | None,
    ops: EvictionOps,
) -> Tensor:
    """Return the upper confidence bound [] float32 of the error with a split, for the row with the largest one."""
    prompt, stored, count = store.prompt, store.lens.longest, _steps(store)
    begin = stored - count
    probe = KVStore()
    positions = None if prompt.positions is None else prompt.positions[:, :, :begin]
    queries, outputs = (None if part is None else part[:, :, :-count] for part in (prompt.queries, prompt.outputs))
    keys, values = prompt.keys[:, :, :begin], prompt.values[:, :, :begin]
    probe.phase = replace(prompt, keys=keys, values=values, positions=positions, queries=queries, outputs=outputs)
    probe.lens.longest = probe.lens.shortest = begin
    probe.lens.seen = store.lens.seen - count
    probe.marks = store.marks
    close_prompt(
        probe,
        split,
        params,
        decode_reserve=max(count, decode_reserve),
        kernel_size=kernel_size,
        index_dtype=index_dtype,
        ops=ops,
    )
    decoding, fill = probe.next_fill()
    new = _last_queries(store), prompt.keys[:, :, begin:stored], prompt.values[:, :, begin:stored]
    out = verify_step_torch(*new, decoding.buffers, decoding.index, decoding.split, params, fill)
    grouped = (*out.shape[:2], keys.shape[1], -1)  # [B, n, Hkv, G Dv]
    wanted = exact.float().reshape(grouped)
    size = torch.linalg.vector_norm(wanted, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    by_step = (torch.linalg.vector_norm(out.float().reshape(grouped) - wanted, dim=-1) / size).mean(-1)
    bounds: Tensor = by_step.mean(1) + QUANTILE / math.sqrt(INDEPENDENT) * by_step.std(1)
    return bounds.max()
