"""Checks of kernels before they are timed, against the PyTorch reference and attention in float64.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, P page size, k tokens read.
"""

import copy

import torch
from torch import Tensor

from ...core import eviction
from ...core.compact import compact
from ...core.residual import residual_attend
from ...core.topk import select, select_top
from ...kernels import decode, evict
from ..checks import WrongResultError, require_near
from .kernel_cases import METHODS, CaseBuffers, MethodStores

# Of the largest value, in units of the dtype's precision: low precisions round weights too, float32 sums in any order.
LOW_PRECISION_UNITS = 2.0
FLOAT32_UNITS = 128.0
SCORE_TOLERANCE = 1e-4  # of the largest score
WEIGHT_TOLERANCE = 1e-3  # of a weight, within which two tokens may change places
# Of one slot a token; those behind the last one hold anything.
ROWS = ("keys", "values", "positions", "codes", "scales")


def require_precise(name: str, result: Tensor, expected: Tensor) -> None:
    """Require a result to be as near to the reference as its precision allows.

    Raises:
        WrongResultError: it is not.
    """
    units = FLOAT32_UNITS if result.dtype == torch.float32 else LOW_PRECISION_UNITS
    require_near(name, result, expected, units * torch.finfo(result.dtype).eps)


def require_equal(what: str, found: Tensor | None, expected: Tensor | None) -> None:
    """Require two tensors to be the same.

    Raises:
        WrongResultError: they are not.
    """
    if found is None or expected is None:
        same = found is expected
    else:
        same = found.shape == expected.shape and bool((found == expected).all())
    if not same:
        raise WrongResultError(f"{what} is not the reference's; nothing is timed")


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Return [B, H, Dv] float64, a row at a time: whole softmax, no blocks."""
    out = []
    for one, its_keys, its_values in zip(query, keys, values, strict=True):
        rows = one.double().view(its_keys.shape[0], -1, its_keys.shape[2])  # [Hkv, G, D]
        weight = (rows @ its_keys.double().transpose(-1, -2) * scaling).softmax(-1)
        out.append((weight @ its_values.double()).flatten(0, 1))
    return torch.stack(out)


def check_dense(name: str, buffers: CaseBuffers, out: Tensor) -> None:
    """Check dense attention over the first set."""
    expected = exact_attention(buffers.query[0], buffers.keys[0], buffers.values[0], buffers.params.scaling)
    require_precise(name, out, expected)


def check_step(
    buffers: CaseBuffers, stores: MethodStores, workspace: decode.DecodeWorkspace, out: Tensor, steps: int
) -> None:
    """Check the last of some decode steps on the first set: its writes, scores, selection and output.

    Args:
        buffers: the case.
        stores: of the method, after the steps.
        workspace: of the kernels.
        out: [B, H, D], of the last step.
        steps: how many there were since the prompt.
    """
    query, split, store, method = buffers.query[0], stores.split, stores.stores[0], stores.method
    expected = copy.deepcopy(store)
    stores.rewind_one(expected)
    for _ in range(steps):
        expected.append(buffers.key[0], buffers.value[0])
    stored, index = expected.stored, expected.decoding.index
    for name, known in expected.tensors().items():
        found = store.tensors()[name]
        shown = (found[:, :, :stored], known[:, :, :stored]) if name in ROWS else (found, known)
        if name != "missed":  # an output, which the reference's `append` leaves alone
            require_equal(f"{name} of {method} after {steps} steps", *shown)
    clock = store.clock()
    require_equal(f"clock of {method} after {steps} steps", clock, torch.full_like(clock, expected.seen))
    if index is None or split.top_k is None:
        raise ValueError("nothing is selected")
    keys, values, _, seq_lens = store.decoding.buffers[:4]
    given = query, expected.decoding.buffers.index_tensors, expected.decoding.keys, buffers.params
    logits = index.score(*given, stored=stored, lengths=None)
    pages = logits.shape[2]
    found_logits = workspace.scores.view(*query.shape[:2], -1)[..., :pages]
    require_near(f"{method}: a step's scores", found_logits, logits, SCORE_TOLERANCE)
    batch, kv_heads = seq_lens.shape
    listed = workspace.chosen.view(batch, kv_heads, -1)
    known, weight = select(
        logits,
        split.top_k,
        stored=stored,
        lengths=None,
        kv_heads=kv_heads,
        unit_size=split.page_size,
        by_largest=split.by_largest,
    )
    if buffers.case.ties:
        # The kernels score a sketch's newest token apart, by a sum in another order: it may rank before its equals.
        newest = -1 if split.sketch_bits is None else stored - 1
        for row, expected_row in zip(listed.flatten(0, 1), known.flatten(0, 1), strict=True):
            others = row[row != newest]
            require_equal(f"{method}: a step's selection among equal scores", others, expected_row[: len(others)])
    else:
        by_head = weight.view(batch, kv_heads, -1, pages)
        shared = by_head.amax(2) if split.by_largest else by_head.mean(2)
        _require_best(listed, known, shared.repeat_interleave(split.page_size, dim=2)[..., :stored])
    written = store.decoding.buffers
    if split.residual and written.value_sum is not None:
        chosen = query.float(), keys, values, listed, logits, written.value_sum, buffers.params
        exact, _ = residual_attend(*chosen, bias=written.residual_bias, lengths=None)
    else:
        place = listed.long()[..., None].expand(-1, -1, -1, query.shape[2])
        exact = exact_attention(query, keys.gather(2, place), values.gather(2, place), buffers.params.scaling)
    require_precise(f"{method}: a step's output", out, exact)


def _require_best(listed: Tensor, known: Tensor, weight: Tensor) -> None:
    """Require a list of positions to ascend and to hold the largest weights, up to what rounding may change."""
    size = weight.shape[2]
    in_range = bool(((listed >= 0) & (listed < size)).all())
    if not in_range or not bool((listed.diff(dim=-1) > 0).all()):
        raise WrongResultError("a step's selection is no ascending list of stored tokens; nothing is timed")
    least = weight.gather(2, known.long()).amin(-1, keepdim=True)
    chosen = torch.zeros_like(weight, dtype=torch.bool).scatter_(2, listed.long(), value=True)
    missing = ~chosen & (weight > least * (1 + WEIGHT_TOLERANCE))
    needless = chosen & (weight < least * (1 - WEIGHT_TOLERANCE))
    if bool((missing | needless).any()):
        wrong = int(missing.sum() + needless.sum())
        raise WrongResultError(f"a step's selection has {wrong} tokens that are not among the best; nothing is timed")


def check_eviction(buffers: CaseBuffers) -> None:
    """Check stage 1's kernels on the first set: scores near, pooling, choice, copies and index exactly."""
    layer, split = buffers.layer, buffers.methods[METHODS[0]].split
    query, keys, values = buffers.window[0], buffers.keys[0], buffers.values[0]
    kept = split.kept_tokens or 0
    scores = evict.window_scores(query, keys, buffers.params)
    require_near("window_scores", scores, eviction.window_scores(query, keys, buffers.params), WEIGHT_TOLERANCE)
    pooled = evict.pool_scores(scores, layer.window, kernel_size=layer.kernel_size)
    around = torch.nn.functional.max_pool1d(scores, layer.kernel_size, stride=1, padding=layer.kernel_size // 2)
    require_equal("pool_scores", pooled, torch.nn.functional.pad(around, (0, layer.window), value=torch.inf))
    slots = evict.select_top(pooled, kept)
    require_equal("select_top", slots, select_top(pooled, kept))
    arguments = (keys, values, slots, None, None, kept, kept + layer.reserve, split.page_size)
    names = ("keys", "values", "positions", "seq_lens", "bounds")
    for name, found, known in zip(names, evict.compact(*arguments), compact(*arguments), strict=True):
        require_equal(f"compact's {name}", found, known)
