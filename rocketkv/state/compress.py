"""The end of a prompt (stage 1, compaction, index), and the re-eviction of generated tokens.

When static buffers are full, stage 1 ranks the generated tokens by the attention of the last W queries, and keeps
enough of them to fill half of their room. The prompt's tokens stay, and buffers do not move.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, W observation window.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..budget import BudgetSplit, with_protected
from ..config import RocketKVConfig
from ..core.calibration import fitted_bias
from ..core.decode import DecodeBuffers
from ..core.eviction import TORCH_OPS, EvictionOps, pooled, prompt_scores
from ..core.index import index_of
from ..core.pages import index_dtype_of
from ..core.params import AttentionParams
from ..core.residual import sum_values
from ..core.topk import full_precision, gather_tokens, recent_positions, select_top
from ..core.window_attention import window_attention
from .decoding import DecodeTokens, decode_room
from .prompt import PromptTokens
from .protection import RowMarks, message_numbers, protected_first, protected_slots, with_fair_shares
from .queries import QueryRing, make_ring

if TYPE_CHECKING:
    from .store import KVStore

# Share of the room for generated tokens that re-eviction keeps.
KEPT_SHARE = 0.5

# Largest width of the max-pooling of generated tokens. Of a few hundred generated tokens, the wider pools of a prompt
# would keep only one or two neighbourhoods.
WIDEST_POOL = 5


def close_prompt(
    store: "KVStore",
    split: BudgetSplit,
    params: AttentionParams,
    *,
    decode_reserve: int,
    kernel_size: int,
    decode_capacity: int | None = None,
    index_dtype: torch.dtype | None = None,
    ring_size: int = 0,
    ops: EvictionOps = TORCH_OPS,
) -> None:
    """End a store's prompt: evict by stage 1 if a row exceeds the tokens to keep, drop padding, build the index.

    Args:
        store: the layer's store, with an open prompt and its last queries.
        split: the tokens to keep, and how to index them.
        params: the model's attention parameters.
        decode_reserve: slots to allocate beyond the kept tokens.
        kernel_size: odd width of stage 1's max-pooling.
        decode_capacity: slots for generated tokens in static buffers, or None for buffers that grow.
        index_dtype: dtype of page bounds, or None for the dtype of the keys.
        ring_size: W, size of the query ring; 0 for none.
        ops: the backend's operations of stage 1.

    Raises:
        ValueError: there is no prompt, or the split keeps fewer tokens than the observation window has.
    """
    prompt, lens = store.prompt, store.lens
    if prompt.queries is None:
        raise ValueError("close_prompt ends a prompt: remember its queries first")
    stored, queries = lens.longest, prompt.queries.contiguous()
    keys, values, valid = prompt.keys[:, :, :stored], prompt.values[:, :, :stored], prompt.valid(stored)
    marked = None
    if store.marks is not None:
        places = prompt.slot_positions(stored)
        marked = _MarkedSlots(store.marks, places, protected_slots(store.marks, places))
    counts = _host_counts(stored, valid, marked)
    split = with_protected(split, counts.protected)
    longest, shortest = counts.longest, counts.shortest
    if valid is not None:
        _refuse_padded_ends(split, valid, counts.longest_padded_end)
        queries = queries.masked_fill(~valid[:, :1, -queries.shape[2] :, None], 0)
    calibrated = split.calibrated and longest > split.token_budget
    exact = window_outputs(prompt, queries, stored, params) if calibrated else None
    slots: Tensor | None = None
    restorable = store.restorable  # if this prompt evicts nothing, crops can return to the last eviction
    if split.kept_tokens is not None and longest > split.kept_tokens:
        slots = _kept_slots(queries, split, params, keys, values, valid, marked, kernel_size, ops)
        restorable = lens.seen - (queries.shape[2] if split.sinks is None else split.kept_tokens - split.sinks)
        longest, shortest = split.kept_tokens, min(shortest, split.kept_tokens)
        store.complete = False
    elif valid is not None:
        slots = _all_slots(keys)
    if marked is not None and counts.moved:
        slots = protected_first(_all_slots(keys) if slots is None else slots, marked.protected)
        # Up to the last protected token, slots are not in the order of the sequence: no crop can return there.
        restorable, store.complete = max(restorable, counts.last_protected + 1), False
    room = decode_room(split, decode_reserve) if decode_capacity is None else decode_capacity
    page_size = None if split.channels is None else split.page_size  # bounds are computed while keys are moved
    kept_keys, kept_values, positions, seq_lens, bounds = ops.compact(
        keys, values, slots, valid, prompt.positions, longest, longest + room, page_size, index_dtype
    )
    lens.longest, lens.shortest = longest, shortest
    lens.captured = lens.uncounted = False  # no graph writes into the new buffers
    ring_tensor, ring = None, None
    if ring_size:
        ring_tensor, ring = make_ring(queries, ring_size, lens.seen)
    buffers = DecodeBuffers(kept_keys, kept_values, positions, seq_lens, query_ring=ring_tensor)
    aligned = prompt.aligned and slots is None
    decoding = DecodeTokens(
        buffers=buffers if bounds is None else buffers._replace(index_tensors=(bounds,)),
        split=split,
        index=index_of(split),
        ring=ring,
        decode_capacity=decode_capacity,
        prompt_end=lens.seen,
        prompt_stored=longest,
        moved=counts.moved,
        aligned=aligned,
    )
    store.phase, store.restorable = decoding, restorable
    window = None if valid is None else valid[:, 0, -queries.shape[2] :]
    _derive(store, decoding, queries, exact, window, params, index_dtype, ops)
    if decode_capacity is not None:
        store.clock()


class _MarkedSlots(NamedTuple):
    """The marks of a prompt's tokens.

    Attributes:
        marks: of each of the B rows.
        positions: [B, 1 or Hkv, S] integers, each slot's position in the sequence, -1 for none.
        protected: [B, 1 or Hkv, S] bool, True at protected tokens.
    """

    marks: Sequence[RowMarks]
    positions: Tensor
    protected: Tensor


class _HostCounts(NamedTuple):
    """Token counts of a prompt that the host needs to allocate buffers.

    Attributes:
        longest: tokens of the longest row.
        shortest: tokens of the shortest row.
        longest_padded_end: tokens of the longest row that ends with padding, 0 if there is none.
        protected: protected tokens of the row that has most.
        last_protected: position of the last protected token, -1 if there is none.
        moved: whether other tokens come before protected ones.
    """

    longest: int
    shortest: int
    longest_padded_end: int = 0
    protected: int = 0
    last_protected: int = -1
    moved: bool = False


def _host_counts(stored: int, valid: Tensor | None, marked: _MarkedSlots | None) -> _HostCounts:
    """Return the counts of a prompt; the only wait for the device at its end, and none without padding and marks."""
    if valid is None and marked is None:
        return _HostCounts(stored, stored)
    found = {}
    if valid is not None:
        tokens = valid.sum(-1)
        found["shortest"], found["longest"] = tokens.aminmax()
        found["longest_padded_end"] = tokens.masked_fill(valid[..., -1], 0).amax()
    if marked is not None:
        protected, other = marked.protected, ~marked.protected
        found["protected"] = protected.sum(-1).amax()
        found["last_protected"] = marked.positions.masked_fill(other, -1).amax().long()
        other = other if valid is None else other & valid
        found["moved"] = (protected & (other.cumsum(-1) > 0)).any().long()
    counts = dict(zip(found, torch.stack(tuple(found.values())).tolist(), strict=True))
    moved = bool(counts.pop("moved", False))
    return _HostCounts(**{"longest": stored, "shortest": stored, **counts}, moved=moved)


def _all_slots(keys: Tensor) -> Tensor:
    return torch.arange(keys.shape[2], device=keys.device).expand(*keys.shape[:3])


def _kept_slots(
    queries: Tensor,
    split: BudgetSplit,
    params: AttentionParams,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    marked: _MarkedSlots | None,
    kernel_size: int,
    ops: EvictionOps,
) -> Tensor:
    """Return the slots [B, Hkv, kept] that stage 1 keeps, ascending."""
    kept = split.kept_tokens or 0
    if split.sinks is not None:
        real = torch.ones_like(keys[..., 0], dtype=torch.bool) if valid is None else valid.expand(keys.shape[:3])
        return recent_positions(real, kept, split.sinks)
    if kept < queries.shape[2]:
        raise ValueError(f"kept_tokens must be at least the window of {queries.shape[2]} tokens, got {kept}")
    scores = prompt_scores(
        queries,
        keys,
        params,
        value=values if split.value_aware else None,
        kernel_size=kernel_size,
        pool_offset=split.pool_offset,
        valid=valid,
        ops=ops,
    )
    if marked is not None:
        scores = scores.masked_fill_(marked.protected, torch.inf)
        count = 1 + max(len(mark.messages) for mark in marked.marks)
        if count > 1:
            scores = with_fair_shares(scores, message_numbers(marked.marks, marked.positions), count, kept)
    return ops.select_top(scores, kept)


def window_outputs(prompt: PromptTokens, queries: Tensor, stored: int, params: AttentionParams) -> Tensor:
    """Return the outputs [B, n, H, Dv] of an open prompt's last n <= W tokens, of attention to all tokens.

    Args:
        prompt: the prompt, which may know them.
        queries: [B, H, n, D], of these tokens.
        stored: tokens of the longest row.
        params: the model's attention parameters.
    """
    if prompt.outputs is not None:
        return prompt.outputs[:, :, prompt.outputs.shape[2] - queries.shape[2] :].transpose(1, 2)
    keys, values, valid = prompt.keys[:, :, :stored], prompt.values[:, :, :stored], prompt.valid(stored)
    with full_precision(keys.device):
        return window_attention(queries, keys, values, params, valid=valid)


@torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
@torch.no_grad()  # a model's learned sinks are parameters
def _derive(
    store: "KVStore",
    decoding: DecodeTokens,
    queries: Tensor,
    exact: Tensor | None,
    window: Tensor | None,
    params: AttentionParams,
    index_dtype: torch.dtype | None,
    ops: EvictionOps,
) -> None:
    """Build the sketch of the compacted tokens, the sum of their values, and the residual's calibration."""
    lens, split, index, buffers = store.lens, decoding.split, decoding.index, decoding.buffers
    lengths = None if lens.shortest == lens.longest else buffers.seq_lens
    if index is not None and not buffers.index_tensors:
        built = index.build(buffers.keys, queries, lens.longest, lengths, index_dtype, ops.write_sketch)
        buffers = buffers._replace(index_tensors=tuple(built))
    if split.residual:
        missed = torch.full(queries.shape[:2], torch.nan, dtype=torch.float32, device=queries.device)
        buffers = buffers._replace(value_sum=sum_values(buffers.values, lens.longest, lengths), missed=missed)
    if split.calibrated and index is not None:
        bias = torch.zeros(queries.shape[:2], dtype=torch.float32, device=queries.device)
        if exact is not None:
            bias = fitted_bias(
                queries,
                exact,
                buffers,
                index,
                params,
                split=split,
                stored=lens.longest,
                seen=lens.seen,
                valid=window,
                weigh=ops.weigh_chosen,
            )
        buffers = buffers._replace(residual_bias=bias)
    decoding.buffers = buffers


def _refuse_padded_ends(split: BudgetSplit, valid: Tensor, longest_padded_end: int) -> None:
    """Refuse a row whose prompt ends with padding: queries of padding would rank its tokens."""
    if split.kept_tokens is None or split.sinks is not None or longest_padded_end <= split.kept_tokens:
        return
    wrong = ((valid.sum(-1) > split.kept_tokens) & ~valid[..., -1]).any(-1)
    rows = ", ".join(map(str, wrong.nonzero().flatten().tolist()))
    raise ValueError(
        f"a prompt must end with a token in every row, since its last queries rank its tokens, but row {rows} "
        "ends with padding; pad on the left (tokenizer.padding_side = 'left')"
    )


def kept_of(decode_capacity: int, window_size: int) -> int | None:
    """Return how many of `decode_capacity` generated tokens re-eviction keeps, or None for a capacity under 2W."""
    return int(decode_capacity * KEPT_SHARE) if decode_capacity >= 2 * window_size else None


def kept_when_full(config: RocketKVConfig, split: BudgetSplit) -> int | None:
    """Return how many generated tokens re-eviction keeps, or None if full buffers are an error."""
    ranked = split.kept_tokens is not None and split.sinks is None
    if config.decode_capacity is None or config.when_full == "raise" or not ranked:
        return None
    return kept_of(config.decode_capacity, config.window_size)


def close_prompt_by(
    store: "KVStore", config: RocketKVConfig, split: BudgetSplit, params: AttentionParams, ops: EvictionOps = TORCH_OPS
) -> None:
    """End a store's prompt as `close_prompt`, by the settings of a config."""
    close_prompt(
        store,
        split,
        params,
        ops=ops,
        decode_reserve=config.decode_reserve,
        kernel_size=config.stage_1_kernel_size,
        decode_capacity=config.decode_capacity,
        ring_size=0 if kept_when_full(config, split) is None else config.window_size,
        index_dtype=index_dtype_of(config.index_dtype),
    )


@torch.inference_mode(False)  # buffers may be written in a later call that is not in inference mode
@torch.no_grad()
def evict_generated(
    store: "KVStore", kept: int, params: AttentionParams, *, kernel_size: int, ops: EvictionOps = TORCH_OPS
) -> None:
    """Re-evict generated tokens: keep the highest-ranked ones of every row, in place.

    Args:
        store: its prompt closed, with a query ring.
        kept: generated tokens to keep, those of the query ring included.
        params: the model's attention parameters.
        kernel_size: odd width of stage 1's max-pooling; at most `WIDEST_POOL` is used.
        ops: the backend's operations of stage 1.

    Raises:
        ValueError: there are no more generated tokens than are kept, or the store has no query ring.
    """
    count, decoding = store.generated, store.decoding
    stored, seen, buffers = store.lens.longest, store.lens.seen, decoding.buffers
    ring: QueryRing | None = decoding.ring
    if ring is None or buffers.query_ring is None:
        raise ValueError("evict_generated ranks by the query ring, and this store has none")
    query = ring.last(buffers.query_ring, seen)
    window, device = query.shape[2], buffers.keys.device
    if not window <= kept < count:
        raise ValueError(f"there must be more generated tokens than are kept; got {count} and {kept}")
    lengths = buffers.seq_lens.long()[..., None]
    # Rows of different lengths are aligned at their ends, as in a prompt.
    slot = torch.arange(stored, device=device) - (stored - lengths)
    valid = None if store.uniform else slot >= 0
    keys = buffers.keys[:, :, :stored] if valid is None else gather_tokens(slot.clamp(min=0), buffers.keys)[0]
    with full_precision(device):
        scores = ops.window_scores(query, keys, params, valid=valid)
    scores = pooled(scores[..., -(count - window) :].contiguous(), min(kernel_size, WIDEST_POOL))
    chosen = select_top(scores, kept - window) if kept > window else lengths.expand(-1, -1, 0)
    last = torch.arange(count - window, count, device=device).expand(*chosen.shape[:2], -1)
    _move(store, lengths - count, torch.cat((chosen, last), dim=-1), count)


def _move(store: "KVStore", first: Tensor, chosen: Tensor, count: int) -> None:
    """Move the `chosen` of each row's last `count` tokens to the front of these, and clear the slots behind."""
    decoding = store.decoding
    keys, values, positions, seq_lens = decoding.buffers[:4]
    kept = chosen.shape[-1]
    store.save_generated(count)
    source = first + chosen
    target = first + torch.arange(count, device=keys.device)
    moved = (*gather_tokens(source, keys, values), positions.gather(2, source))
    for buffer, tokens, empty in zip((keys, values, positions), moved, (0, 0, -1), strict=True):
        rest = tokens.new_full((*tokens.shape[:2], count - kept, *tokens.shape[3:]), empty)
        place = target.view(*target.shape, *[1] * (buffer.dim() - 3)).expand(*target.shape, *buffer.shape[3:])
        buffer.scatter_(2, place, torch.cat((tokens, rest), dim=2))
    seq_lens -= count - kept
    store.drop_generated(count - kept)
    decoding.rebuild_index(store.lens)
