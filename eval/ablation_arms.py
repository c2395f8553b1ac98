"""The arms of the ablation: what each changes of `rocketkv+` or `rocketkv`, at equal bytes read.

Bytes are those of `stats()` as budgets count (16 bits; index, scales and means included), mean over the steps. Those of
`rocketkv` with its own split are the measure; the other arms get so many tokens to attend to that theirs are closest to
it. Oracles, whose scores are not counted, and floors, which attend to all that is stored, are what they are.

Stage 1 pools as in the paper in all arms that do not say otherwise, so that what differs is the part in question. The
library's own `rocketkv+` pools more narrowly, as `rocketkv+:kernel-13` does.

Letters: t token budget, D head dim, N stored tokens, k tokens attended to, b bytes of a sketched token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor

from ..budget import METHODS, BudgetSplit, rocketkv_plus_split, rocketkv_split, sketch_bytes
from ..config import RocketKVConfig
from ..stats import step_bytes
from .ablation_steps import (
    Ranks,
    by_value_norms,
    calibrate,
    calibrated_step,
    ends_step,
    evicted_step,
    evicted_summary,
    plain_step,
    random_ranks,
    segments_step,
    sketch_mass_step,
    unpooled_ties,
)

RESERVE = RocketKVConfig().decode_reserve
WINDOW = RocketKVConfig().window_size
KERNEL = RocketKVConfig().pool_size
TOLERANCE = 0.02  # by which bytes of arms may differ
WIDEST_WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """For what a split is made.

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


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to store and to read.

    Attributes:
        name: method, and after a colon what is changed.
        what: the change in a few words.
        split: from a case to the split, before bytes are made equal.
        fitted: the field of the split that makes bytes equal, or None where they are what they are.
        window_size: W of stage 1.
        kernel_size: of its pooling.
        ranks: from a layer's values and number to what ranks in stage 1, or None for the library's.
        summary: from the window's queries, the prompt's keys and values, the closed store, and scaling, softcap and
            sinks to what the step is given as its state; or None.
        step: the decode step.
        extra: tokens' worth of bytes that the step reads beside what `stats()` counts.
        extra_a_head: likewise, for each query head of a group but one.
    """

    name: str
    what: str
    split: Callable[[Case], BudgetSplit]
    fitted: str | None = "top_k"
    window_size: int = WINDOW
    kernel_size: int = KERNEL
    ranks: Callable[[Tensor, int], Ranks] | None = None
    summary: Callable[..., Any] | None = None
    step: Callable[..., Tensor] = plain_step
    extra: float = 0.0
    extra_a_head: float = 0.0

    def extra_tokens(self, group: int) -> float:
        """Return the tokens' worth of bytes that a step reads beside what `stats()` counts, of G query heads."""
        return self.extra + self.extra_a_head * (group - 1)


def mean_bytes(split: BudgetSplit, case: Case) -> float:
    """Return the bytes that a step reads a row and KV head, as budgets count, mean over the steps."""
    kept = case.prompt if split.kept_tokens is None else min(split.kept_tokens, case.prompt)
    dims = (case.head_dim, case.head_dim)
    return fmean(step_bytes(split, kept + step, dims, (2, 2), nominal=True) for step in range(1, case.steps + 1))


def target_bytes(case: Case) -> float:
    """Return the bytes that arms are to read: those of `rocketkv`."""
    return mean_bytes(_rocketkv(case), case)


def fitted_split(arm: Arm, case: Case) -> BudgetSplit:
    """Return an arm's split, with equal bytes where it is to have them.

    Raises:
        ValueError: there is no such split, for instance because the window would not be kept.
    """
    split, field = arm.split(case), arm.fitted
    if field is None:
        return split
    token = 4 * case.head_dim
    spare = target_bytes(case) - mean_bytes(split, case) - arm.extra_tokens(case.group) * token
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


def _method(name: str, case: Case) -> BudgetSplit:
    return METHODS[name](case.prompt, case.budget, case.head_dim, RESERVE)


def _rocketkv(case: Case) -> BudgetSplit:
    return rocketkv_split(case.prompt, case.budget, case.head_dim, RESERVE)


def _plus(case: Case, *, most_stored: int | None = None, **changes: Any) -> BudgetSplit:
    split = rocketkv_plus_split(case.prompt, case.budget, case.head_dim, RESERVE, most_stored=most_stored)
    return replace(split, **changes)


def _plus_at(case: Case, *, bits: int = 2, share: float = 0.5) -> BudgetSplit:
    """Return `rocketkv+` with other bits, or another share of t for the attention."""
    sequence = case.prompt + RESERVE
    token, sketched = 4 * case.head_dim, sketch_bytes(case.head_dim, bits)
    attended = int(share * case.budget)
    stored = min((case.budget - attended) * token // sketched, sequence)
    stored = max(stored, min(2 * RESERVE, sequence))
    return _plus(case, sketch_bits=bits, kept_tokens=stored - RESERVE, top_k=max(1, attended - 1))


def _papers_n(case: Case) -> BudgetSplit:
    kept = _rocketkv(case).kept_tokens or 0
    return _plus(case, most_stored=kept + RESERVE)


def _exact(case: Case, *, residual: bool = False) -> BudgetSplit:
    """Return the N and k of `rocketkv+`, chosen by exact scores."""
    own = fitted_split(BY_NAME["rocketkv+"], case)
    return replace(own, sketch_bits=None, channels=case.head_dim, oracle=True, residual=residual)


def _floor(case: Case, own: Callable[[Case], BudgetSplit]) -> BudgetSplit:
    return BudgetSplit(token_budget=case.budget, kept_tokens=own(case).kept_tokens)


def _with(name: str, what: str, **fields: Any) -> Arm:
    return Arm(**{"name": f"rocketkv+:{name}", "what": what, "split": _plus, **fields})


_FACTOR = functools.partial(calibrate, learned=False)
_LEARNED = functools.partial(calibrate, learned=True)
_ONE_RUN = functools.partial(evicted_summary, runs=1)

MAIN = (
    Arm(name="rocketkv", what="the paper's method", split=_rocketkv, fitted=None),
    Arm(name="rocketkv+", what="sketch and value residual, the paper's pooling", split=_plus),
    Arm(
        name="stored-topk",
        what="exact top-k of the paper's N, scores free",
        split=functools.partial(_method, "stored-topk"),
        fitted=None,
    ),
    _with("exact", "its N and k by exact scores, free, no residual: stored-topk there", split=_exact, fitted=None),
    Arm(
        name="rocketkv:floor",
        what="dense attention over the paper's N",
        split=functools.partial(_floor, own=_rocketkv),
        fitted=None,
    ),
    _with("floor", "dense attention over its N", split=functools.partial(_floor, own=_plus), fitted=None),
)

OTHERS = (
    Arm(
        name="snapkv",
        what="stage 1 alone, to t tokens",
        split=functools.partial(_method, "snapkv"),
        fitted="kept_tokens",
    ),
    Arm(name="quest", what="stage 2 alone, pages", split=functools.partial(_method, "quest")),
    Arm(name="sparq", what="stage 2 alone, channels", split=functools.partial(_method, "sparq")),
    Arm(
        name="exact-topk", what="exact top-k of everything, scores free", split=functools.partial(_method, "exact-topk")
    ),
)

ABLATIONS = (
    _with("no-residual", "without the residual", split=functools.partial(_plus, residual=False)),
    _with(
        "exact-residual",
        "exact scores, free, with the residual",
        split=functools.partial(_exact, residual=True),
        fitted=None,
    ),
    _with("sketch-mass", "weight of the chosen from the sketch, too", step=sketch_mass_step),
    _with("ends", "first 4 and last k/8 always attended to", step=ends_step),
    _with("1-bit", "1 bit, k 0.7 t", split=functools.partial(_plus_at, bits=1, share=0.7)),
    _with("3-bit", "3 bits", split=functools.partial(_plus_at, bits=3)),
    _with("4-bit", "4 bits", split=functools.partial(_plus_at, bits=4)),
    _with("papers-n", "the paper's N, k takes the rest", split=_papers_n),
    _with("k-0.35", "0.35 t for the attention", split=functools.partial(_plus_at, share=0.35)),
    _with("k-0.65", "0.65 t for the attention", split=functools.partial(_plus_at, share=0.65)),
    Arm(
        name="rocketkv:residual",
        what="pages with the residual",
        split=lambda case: replace(_rocketkv(case), residual=True),
    ),
    _with("random", "stage 1 by chance", ranks=random_ranks),
    _with("kernel-7", "pooled over 7", kernel_size=7),
    _with("kernel-13", "pooled over 13, the library's default", kernel_size=13),
    _with("kernel-21", "pooled over 21", kernel_size=21),
    _with("exact-kernel-13", "exact scores, free, pooled over 13", split=_exact, fitted=None, kernel_size=13),
    Arm(name="rocketkv:kernel-7", what="the paper's, pooled over 7", split=_rocketkv, kernel_size=7),
    Arm(name="rocketkv:kernel-13", what="the paper's, pooled over 13", split=_rocketkv, kernel_size=13),
    Arm(name="rocketkv:kernel-21", what="the paper's, pooled over 21", split=_rocketkv, kernel_size=21),
    _with("window-16", "window of 16", window_size=16),
    _with("window-64", "window of 64", window_size=WIDEST_WINDOW),
    _with("unpooled-ties", "plateaus by unpooled scores", ranks=unpooled_ties),
    _with("value-norms", "scores times the length of values", ranks=by_value_norms),
    _with("segments-8", "8 means in the residual", step=functools.partial(segments_step, segments=8), extra=3.5),
    _with(
        "calibrated",
        "the residual's weight times a factor, by the window's queries",
        summary=_FACTOR,
        step=calibrated_step,
    ),
    _with(
        "calibrated-13",
        "and pooled over 13",
        summary=_FACTOR,
        step=calibrated_step,
        kernel_size=13,
    ),
    _with(
        "learned",
        "and its value is what the window's queries would have missed",
        summary=_LEARNED,
        step=calibrated_step,
        extra_a_head=0.5,
    ),
    _with(
        "learned-13",
        "and pooled over 13",
        summary=_LEARNED,
        step=calibrated_step,
        extra_a_head=0.5,
        kernel_size=13,
    ),
    _with(
        "evicted",
        "a mean of what stage 1 evicted",
        summary=_ONE_RUN,
        step=functools.partial(evicted_step, with_variance=False),
        extra=1,
    ),
    _with(
        "evicted-variance",
        "and the variance of its keys",
        summary=_ONE_RUN,
        step=functools.partial(evicted_step, with_variance=True),
        extra=1.5,
    ),
    _with(
        "evicted-8",
        "8 means of what stage 1 evicted",
        summary=functools.partial(evicted_summary, runs=8),
        step=functools.partial(evicted_step, with_variance=True),
        extra=12,
    ),
)

ARMS = (*MAIN, *OTHERS, *ABLATIONS)
BY_NAME = {arm.name: arm for arm in ARMS}
FULL = Arm(name="full", what="everything", split=functools.partial(_method, "full"), fitted=None)
