"""Arms of the ablation, and the split with which an arm reads as many bytes as `rocketkv`.

Bytes are those of `stats()`, counted in 16 bits (index, scales and means included), mean over the steps, and the extra
bytes that an arm declares.

Letters: B batch, Hkv KV heads, S tokens of the prompt, W window, t token budget, D head dim, N stored tokens, k tokens
attended to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from rocketkv.budget import METHODS, BudgetSplit, rocketkv_plus_split, rocketkv_split
from rocketkv.config import RocketKVConfig
from rocketkv.core.eviction import TORCH_OPS, EvictionOps
from rocketkv.state.stats import step_bytes

from .steps import plain_step

RESERVE = RocketKVConfig().decode_reserve
WINDOW = RocketKVConfig().window_size
KERNEL = RocketKVConfig().stage_1_kernel_size
TOLERANCE = 0.02  # by which bytes of arms may differ
WIDEST_WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """The inputs of a split.

    Attributes:
        prompt: tokens of the prompt.
        steps: decoded after it.
        head_dim: D, of keys and values.
        budget: t.
        group: G, query heads of a KV head.
    """

    prompt: int
    steps: int
    head_dim: int
    budget: int
    group: int = 1


@dataclass(frozen=True)
class Arm:
    """One way to store and to read.

    Attributes:
        name: the method, and after a colon the change.
        what: the change in a few words.
        split: from a case to the split, before bytes are made equal.
        fitted: the field of the split that makes bytes equal, or None where they stay unequal.
        window_size: W of stage 1.
        kernel_size: of its pooling.
        ranks: from a layer's values and number to the operations of stage 1.
        summary: from the window's queries, the prompt's keys and values, the closed store, and the model's attention
            parameters to the state of its steps; or None.
        storage: from the window's queries, the prompt's keys and values, N, the model's attention parameters, and the
            pooling to the tokens that each head stores, [B, Hkv, S] bool, where their numbers differ; or None.
        step: the decode step.
        extra: tokens' worth of bytes that the step reads in addition to `stats()`.
        extra_a_head: likewise, for each query head of a group but one.
        extra_bytes: from the split, the case and a step's number, from 1, to the bytes that it reads in addition
            to `stats()`, below 0 where it does not read a part of the index; or None.
    """

    name: str
    what: str
    split: Callable[[Case], BudgetSplit]
    fitted: str | None = "top_k"
    window_size: int = WINDOW
    kernel_size: int = KERNEL
    ranks: Callable[[Tensor, int], EvictionOps] = lambda values, number: TORCH_OPS
    summary: Callable[..., Any] | None = None
    storage: Callable[..., Tensor] | None = None
    step: Callable[..., Tensor] = plain_step
    extra: float = 0.0
    extra_a_head: float = 0.0
    extra_bytes: Callable[[BudgetSplit, Case, int], float] | None = None

    def extra_tokens(self, group: int) -> float:
        """Return the tokens' worth of bytes that a step of G query heads reads in addition to `stats()`."""
        return self.extra + self.extra_a_head * (group - 1)


def mean_bytes(split: BudgetSplit, case: Case) -> float:
    """Return the bytes that a step reads per row and KV head, counted in 16 bits, mean over the steps."""
    dims = (case.head_dim, case.head_dim)
    counts = (stored_in(split, case, step) for step in range(1, case.steps + 1))
    return fmean(step_bytes(split, count, dims, (2, 2), nominal=True) for count in counts)


def stored_in(split: BudgetSplit, case: Case, step: int) -> int:
    """Return the tokens that are stored in a step, by its number from 1; its own included."""
    return step + (case.prompt if split.kept_tokens is None else min(split.kept_tokens, case.prompt))


def extra_bytes_of(arm: Arm, split: BudgetSplit, case: Case) -> float:
    """Return the bytes that a step reads in addition to `stats()`, per row and KV head, mean over the steps."""
    beside = arm.extra_tokens(case.group) * 4 * case.head_dim
    if arm.extra_bytes is not None:
        beside += fmean(arm.extra_bytes(split, case, step) for step in range(1, case.steps + 1))
    return beside


def target_bytes(case: Case) -> float:
    """Return the bytes that arms are to read: those of `rocketkv`."""
    return mean_bytes(papers_split(case), case)


def fitted_split(arm: Arm, case: Case) -> BudgetSplit:
    """Return an arm's split, with equal bytes where the arm is fitted.

    Raises:
        ValueError: no split has equal bytes, for instance because the window would not be kept.
    """
    split, field = arm.split(case), arm.fitted
    if field is None:
        return split
    token = 4 * case.head_dim
    spare = target_bytes(case) - mean_bytes(split, case) - extra_bytes_of(arm, split, case)
    count = (getattr(split, field) or 0) + round(spare / token)
    least = arm.window_size + 1 if field == "kept_tokens" else 1
    if count < least:
        raise ValueError(
            f"{arm.name} cannot read as little as a budget of {case.budget} tokens: {field} would be {count}, and must "
            f"be at least {least}; leave the arm out or raise the budget"
        )
    if field == "kept_tokens":
        return replace(split, kept_tokens=count)
    return replace(split, top_k=count, token_budget=max(split.token_budget, count))


def method_split(name: str, case: Case) -> BudgetSplit:
    return METHODS[name].split(case.prompt, case.budget, case.head_dim, RESERVE)


def papers_split(case: Case) -> BudgetSplit:
    return rocketkv_split(case.prompt, case.budget, case.head_dim, RESERVE)


def plus_split(case: Case, *, most_stored: int | None = None, **changes: Any) -> BudgetSplit:
    split = rocketkv_plus_split(case.prompt, case.budget, case.head_dim, RESERVE, most_stored=most_stored)
    plain = {"by_largest": False, "value_aware": False, "calibrated": False, "pool_offset": 0}
    return replace(split, **{**plain, **changes})
