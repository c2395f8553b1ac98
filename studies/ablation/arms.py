"""The arms of the ablation: changes of `rocketkv+` or `rocketkv`, at equal bytes read.

Bytes are those of `stats()`, counted in 16 bits (index, scales and means included), mean over the steps. The target is
`rocketkv` with its own split; the other arms attend to as many tokens as come closest to it. Oracles, whose scores are
not counted, and floors, which attend to all stored tokens, are not fitted.

Stage 1 pools as in the paper, and tokens rank by the average of a group's heads, by default,
so that arms differ in one part. The library's own `rocketkv+` pools more narrowly and further back, ranks
by the largest weight, counts in values in stage 1 and calibrates the residual: `rocketkv+:own`. Arms that choose
otherwise pool over 13, too.

Letters: t token budget, D head dim, N stored tokens, k tokens attended to, b bytes of a sketched token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from rocketkv.budget import READ_ON, BudgetSplit, sketch_bytes
from rocketkv.core.index import index_of
from rocketkv.core.pages import page_count

from . import steps
from .choice import (
    coarse_step,
    cost_threshold,
    least_weight_step,
    no_selection,
    planes_step,
    reuse_step,
    scored_pages,
    shared_k_step,
    shared_storage,
    top_p_step,
    value_norms_step,
)
from .fit import RESERVE, WIDEST_WINDOW, Arm, Case, fitted_split, method_split, papers_split, plus_split, stored_in


def _plus_at(case: Case, *, bits: int = 2, share: float = 0.5) -> BudgetSplit:
    """Return `rocketkv+` with other bits, or another share of t for the attention."""
    sequence = case.prompt + RESERVE
    token, sketched = 4 * case.head_dim, sketch_bytes(case.head_dim, bits)
    attended = int(share * case.budget)
    stored = min((case.budget - attended) * token // sketched, sequence)
    stored = max(stored, min(2 * RESERVE, sequence))
    return plus_split(case, sketch_bits=bits, kept_tokens=stored - RESERVE, top_k=max(1, attended - 1))


def _papers_n(case: Case) -> BudgetSplit:
    kept = papers_split(case).kept_tokens or 0
    return plus_split(case, most_stored=kept + RESERVE)


def _exact(case: Case, *, residual: bool = False, **changes: Any) -> BudgetSplit:
    """Return the N and k of `rocketkv+`, chosen by exact scores."""
    own = fitted_split(BY_NAME["rocketkv+"], case)
    return replace(own, sketch_bits=None, channels=case.head_dim, oracle=True, residual=residual, **changes)


def _floor(case: Case, own: Callable[[Case], BudgetSplit]) -> BudgetSplit:
    split = own(case)
    return BudgetSplit(
        token_budget=case.budget,
        kept_tokens=split.kept_tokens,
        value_aware=split.value_aware,
        pool_offset=split.pool_offset,
    )


def _plus(name: str, what: str, **fields: Any) -> Arm:
    return Arm(f"rocketkv+:{name}", what, **{"split": plus_split, **fields})


def _method(name: str, what: str, **fields: Any) -> Arm:
    """Return an arm of a method's own split."""
    return Arm(name, what, split=partial(method_split, name), **fields)


def _at_13(name: str, what: str, **fields: Any) -> Arm:
    """Return an arm that pools over 13, as the library's own `rocketkv+` does."""
    return _plus(name, what, **{"kernel_size": 13, **fields})


def _index_bytes(split: BudgetSplit, case: Case, step: int) -> int:
    index = index_of(split)
    if index is None:
        raise ValueError("such an arm needs an index")
    return index.read_bytes(stored_in(split, case, step), case.head_dim, 2, nominal=True)


def _norms_bytes(split: BudgetSplit, case: Case, step: int) -> float:
    """Return the bytes of a length in 16 bits of each stored value."""
    return 2.0 * stored_in(split, case, step)


def _reuse_bytes(split: BudgetSplit, case: Case, step: int, *, period: int) -> float:
    """Return the bytes that a step without scoring saves, less those of the tokens since the last scoring."""
    since = (step - 1) % period
    return float(4 * case.head_dim * since - _index_bytes(split, case, step)) if since else 0.0


def _coarse_bytes(split: BudgetSplit, case: Case, step: int, *, page_size: int, channels: int, share: float) -> float:
    """Return the bytes of pages' bounds, less those of the sketch of the tokens that are not scored."""
    if split.sketch_bits is None:
        raise ValueError("such an arm needs a sketch")
    stored = stored_in(split, case, step)
    pages = page_count(stored, page_size)
    left_out = max(0, stored - scored_pages(pages, share) * page_size)
    return float(2 * channels * pages - left_out * sketch_bytes(case.head_dim, split.sketch_bits))


def _coarse_split(case: Case, *, page_size: int, channels: int, share: float, attended: float = 0.5) -> BudgetSplit:
    """Return `rocketkv+` with the tokens that the sketch's bytes pay for where pages are ranked first."""
    sequence, plus = case.prompt + RESERVE, plus_split(case)
    scored = share * sketch_bytes(case.head_dim, plus.sketch_bits or 0) + 2 * channels / page_size
    stored = min(int((1 - attended) * case.budget * 4 * case.head_dim / scored), sequence)
    return replace(plus, kept_tokens=max(stored, min(2 * RESERVE, sequence)) - RESERVE)


def _planes_bytes(split: BudgetSplit, case: Case, step: int, *, share: float) -> float:
    """Return the bytes, below 0, of the low bits of a two-bit sketch that are not read."""
    stored = stored_in(split, case, step)
    scored = min(stored, max(math.ceil(share * stored), split.top_k or 0))
    return -(stored - scored) * case.head_dim / 8


def _planes_split(case: Case, *, share: float) -> BudgetSplit:
    """Return `rocketkv+` of two bits with the tokens that half of t pays for."""
    sequence, token = case.prompt + RESERVE, 4 * case.head_dim
    stored = int(case.budget // 2 * token / (case.head_dim * (1 + share) / 8 + 2))
    stored = max(min(stored, sequence), min(2 * RESERVE, sequence))
    return plus_split(case, sketch_bits=2, kept_tokens=stored - RESERVE)


def _coarse(name: str, what: str, *, more_stored: bool = False, **pages: Any) -> Arm:
    return _at_13(
        name,
        what,
        split=partial(_coarse_split, **pages) if more_stored else plus_split,
        step=partial(coarse_step, **pages),
        extra_bytes=partial(_coarse_bytes, **pages),
    )


def _planes(name: str, what: str, **fields: Any) -> Arm:
    step, extra_bytes = partial(planes_step, share=_NEAR), partial(_planes_bytes, share=_NEAR)
    defaults = {"split": partial(_plus_at, bits=2), "step": step, "extra_bytes": extra_bytes}
    return _at_13(name, what, **{**defaults, **fields})


_FACTOR = partial(steps.calibrate, learned=False)
_LEARNED = partial(steps.calibrate, learned=True)
_PAGES: dict[str, Any] = {"page_size": 32, "channels": 16, "share": 0.5}
_SMALL_PAGES: dict[str, Any] = {"page_size": 8, "channels": 16, "share": 0.5}
_NEAR = 0.25  # of the tokens, whose low bits are scored, too
# The cost of a token is minus the logarithm of its weight.
_NEED: dict[str, Any] = {"summary": partial(cost_threshold, most=(0.0, 30.0)), "step": least_weight_step}
_NEED_PLANES = {**_NEED, "step": partial(planes_step, share=_NEAR)}
_SHARED_NORMS = partial(shared_storage, by_values=True)
_OWN_RANKS: dict[str, Any] = {"by_largest": True, "value_aware": True, "pool_offset": READ_ON}
_OWN = partial(plus_split, calibrated=True, **_OWN_RANKS)
_ONE_RUN = partial(steps.evicted_summary, runs=1)

MAIN = (
    Arm("rocketkv", "the paper's method", split=papers_split, fitted=None),
    Arm("rocketkv+", "sketch and value residual, the paper's pooling", split=plus_split),
    _method("stored-topk", "exact top-k of the paper's N, scores free", fitted=None),
    _plus("exact", "its N and k by exact scores, free, no residual: stored-topk there", split=_exact, fitted=None),
    Arm("rocketkv:floor", "dense attention over the paper's N", split=partial(_floor, own=papers_split), fitted=None),
    _plus("floor", "dense attention over its N", split=partial(_floor, own=plus_split), fitted=None),
)

OTHERS = (
    _method("snapkv", "stage 1 alone, to t tokens", fitted="kept_tokens"),
    _method("quest", "stage 2 alone, pages"),
    _method("sparq", "stage 2 alone, channels"),
    _method("exact-topk", "exact top-k of everything, scores free"),
)

ABLATIONS = (
    _plus("no-residual", "without the residual", split=partial(plus_split, residual=False)),
    _plus("exact-residual", "exact scores, free, with the residual", split=partial(_exact, residual=True), fitted=None),
    _plus("sketch-mass", "weight of the chosen from the sketch, too", step=steps.sketch_mass_step),
    _plus("ends", "first 4 and last k/8 always attended to", step=steps.ends_step),
    _plus("1-bit", "1 bit, k 0.7 t", split=partial(_plus_at, bits=1, share=0.7)),
    _plus("3-bit", "3 bits", split=partial(_plus_at, bits=3)),
    _plus("4-bit", "4 bits", split=partial(_plus_at, bits=4)),
    _plus("papers-n", "the paper's N, k takes the rest", split=_papers_n),
    _plus("k-0.35", "0.35 t for the attention", split=partial(_plus_at, share=0.35)),
    _plus("k-0.65", "0.65 t for the attention", split=partial(_plus_at, share=0.65)),
    Arm("rocketkv:residual", "pages with the residual", split=lambda case: replace(papers_split(case), residual=True)),
    _plus("random", "stage 1 by chance", ranks=steps.random_ranks),
    _plus("kernel-7", "pooled over 7", kernel_size=7),
    _plus("kernel-13", "pooled over 13", kernel_size=13),
    _at_13(
        "largest-13", "and ranked by the largest weight of a group's heads", split=partial(plus_split, by_largest=True)
    ),
    _at_13(
        "value-aware-13",
        "and stage 1 by what a token's loss would change",
        split=partial(plus_split, by_largest=True, value_aware=True),
    ),
    _at_13("centred-13", "and the residual calibrated", split=partial(_OWN, pool_offset=0)),
    _at_13("own", "and pools that reach further back than ahead: the library's own", split=_OWN),
    _at_13(
        "exact-own",
        "its N and k by exact scores, free, no residual: stored-topk there",
        split=partial(_exact, **_OWN_RANKS),
        fitted=None,
    ),
    _at_13("floor-own", "dense attention over its N", split=partial(_floor, own=_OWN), fitted=None),
    _plus("kernel-21", "pooled over 21", kernel_size=21),
    _plus("exact-kernel-13", "exact scores, free, pooled over 13", split=_exact, fitted=None, kernel_size=13),
    Arm("rocketkv:kernel-7", "the paper's, pooled over 7", split=papers_split, kernel_size=7),
    Arm("rocketkv:kernel-13", "the paper's, pooled over 13", split=papers_split, kernel_size=13),
    Arm("rocketkv:kernel-21", "the paper's, pooled over 21", split=papers_split, kernel_size=21),
    _plus("window-16", "window of 16", window_size=16),
    _plus("window-64", "window of 64", window_size=WIDEST_WINDOW),
    _plus("unpooled-ties", "plateaus by unpooled scores", ranks=steps.unpooled_ties),
    _plus("value-norms", "scores times the length of values", ranks=steps.by_value_norms),
    _plus("segments-8", "8 means in the residual", step=partial(steps.segments_step, segments=8), extra=3.5),
    _plus(
        "calibrated",
        "the residual's weight times a factor, by the window's queries",
        summary=_FACTOR,
        step=steps.calibrated_step,
    ),
    _plus("calibrated-13", "and pooled over 13", summary=_FACTOR, step=steps.calibrated_step, kernel_size=13),
    _plus(
        "learned",
        "and its value is what the window's queries would have missed",
        summary=_LEARNED,
        step=steps.calibrated_step,
        extra_a_head=0.5,
    ),
    _plus(
        "learned-13",
        "and pooled over 13",
        summary=_LEARNED,
        step=steps.calibrated_step,
        extra_a_head=0.5,
        kernel_size=13,
    ),
    _plus(
        "evicted",
        "a mean of what stage 1 evicted",
        summary=_ONE_RUN,
        step=partial(steps.evicted_step, with_variance=False),
        extra=1,
    ),
    _plus(
        "evicted-variance",
        "and the variance of its keys",
        summary=_ONE_RUN,
        step=partial(steps.evicted_step, with_variance=True),
        extra=1.5,
    ),
    _plus(
        "evicted-8",
        "8 means of what stage 1 evicted",
        summary=partial(steps.evicted_summary, runs=8),
        step=partial(steps.evicted_step, with_variance=True),
        extra=12,
    ),
)

CHOICES = (
    _coarse("coarse", "pages of 32 first, the sketch of half of them, k takes the rest", **_PAGES),
    _coarse("coarse-n", "and N takes the rest", more_stored=True, **_PAGES),
    _coarse("coarse-8", "pages of 8 first, the sketch of half of them, k takes the rest", **_SMALL_PAGES),
    _coarse("coarse-8-n", "and N takes the rest", more_stored=True, **_SMALL_PAGES),
    _planes("planes", "high bits first, low bits of the best quarter, k takes the rest"),
    _planes("planes-n", "and N takes the rest", split=partial(_planes_split, share=_NEAR)),
    _at_13("shared-k", "k shared by the KV heads of a layer", step=shared_k_step),
    _at_13(
        "top-p",
        "the fewest tokens of a share of the weight, equal over layers, heads and steps",
        summary=partial(cost_threshold, most=(0.0, 1.0)),
        step=top_p_step,
    ),
    _at_13(
        "least-weight", "all tokens of a least weight, equal over layers, heads and steps; k/4 in any case", **_NEED
    ),
    _at_13(
        "reuse-2",
        "every other step attends to what the one before did, k takes the rest",
        summary=no_selection,
        step=partial(reuse_step, period=2),
        extra_bytes=partial(_reuse_bytes, period=2),
    ),
    _at_13("adakv", "N shared by the KV heads of a layer", storage=shared_storage),
    _at_13("adakv-norms", "and by scores times the length of values", storage=_SHARED_NORMS),
    _at_13("value-norms-13", "stage 1 by scores times the length of values", ranks=steps.by_value_norms),
    _at_13(
        "value-norms-select",
        "stage 2 by estimated weight times the length of values",
        step=value_norms_step,
        extra_bytes=_norms_bytes,
    ),
    _at_13("least-weight-norms", "least-weight and value-norms-13", ranks=steps.by_value_norms, **_NEED),
    _at_13("least-weight-adakv-norms", "least-weight and adakv-norms", storage=_SHARED_NORMS, **_NEED),
    _planes("planes-least-weight", "planes and least-weight", **_NEED_PLANES),
    _planes("all", "planes, least-weight and adakv-norms", storage=_SHARED_NORMS, **_NEED_PLANES),
    _planes(
        "all-n",
        "and N takes the rest",
        split=partial(_planes_split, share=_NEAR),
        storage=_SHARED_NORMS,
        **_NEED_PLANES,
    ),
)
"""Arms that choose otherwise, all pooled over 13: their measure is `rocketkv+:kernel-13`."""

ARMS = (*MAIN, *OTHERS, *ABLATIONS, *CHOICES)
BY_NAME = {arm.name: arm for arm in ARMS}
FULL = _method("full", "everything", fitted=None)
