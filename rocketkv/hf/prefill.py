"""A prompt of a layer: its tokens are stored and attend to the stored ones and, causally, to themselves; its end.

Letters: B batch, H query heads, Hkv KV heads, D head dim, n tokens of a forward, N stored tokens, S keys.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..backend import backend_name
from ..core.causal import causal_attention, fused
from ..core.dense import VisibleBlock, dense_attention
from ..core.params import AttentionParams
from ..dispatch import Workspaces, eviction_ops, prefill_attention
from ..state.compress import close_prompt_by
from ..state.fit import prompt_split
from ..state.protection import warn_unprotected
from ..state.store import KVStore
from .masks import LazyMask
from .turns import check_queries

if TYPE_CHECKING:
    from .layer import RocketKVLayer

# The model's own attention for causal queries at the end of the keys: maps (query, key, value, padding) to
# [B, n, H, Dv], or to None if it does not support the shapes.
FastAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor | None]


def attend_causally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    valid: Tensor | None = None,
    starts: Sequence[int] | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
    workspaces: Workspaces | None = None,
) -> Tensor:
    """Attend causally from n queries, the last of S tokens, without a mask in memory.

    One fused call, or one a padded row, wherever SDPA has one; else the kernel on a GPU; else blocks of rows.

    Args:
        query: [B, H, n, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        params: the model's attention parameters.
        valid: [B, 1 or Hkv, S] bool, False at padding, or None.
        starts: each row's first token if all padding lies before it; else None.
        window: keys that a query sees, itself included, or None for all.
        dropout: probability of dropping a weight, in training.
        backend: see `rocketkv.backend.backend_name`.
        workspaces: shared by the layers of a cache.

    Returns:
        [B, n, H, Dv]. A query that sees no key returns zeros.
    """
    out, known = None, valid is None or starts is not None
    if not dropout and not (known and fused(query, key, value, params, window=window)):
        settings: dict[str, Any] = {"backend": backend, "workspaces": workspaces}
        out = prefill_attention(query, key, value, params, window=window, valid=valid, **settings)
    if out is None:
        padding: dict[str, Any] = {"valid": valid, "starts": starts}
        out = causal_attention(query, key, value, params, window=window, dropout=dropout, **padding)
    return out


def attend_prompt(
    store: KVStore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask | None,
    fast: FastAttention,
    params: AttentionParams,
    *,
    backend: str = "auto",
    workspaces: Workspaces | None = None,
) -> Tensor:
    """Attend from the last n tokens of a prompt, which are already in the store.

    Args:
        store: the layer's store, with an open prompt.
        query: [B, H, n, D], after rotary embedding.
        key: [B, Hkv, n, D], keys of the same tokens.
        value: [B, Hkv, n, Dv].
        mask: the model's mask, or None for a causal one.
        fast: the model's own attention for plain causal prompts.
        params: the model's attention parameters.
        backend: see `rocketkv.backend.backend_name`.
        workspaces: shared by the layers of a cache.

    Returns:
        [B, n, H, Dv].

    Raises:
        ValueError: the store has no prompt, or there is padding and no mask.
    """
    prompt, length, stored = store.prompt, query.shape[2], store.stored
    keys, values = prompt.keys[:, :, :stored], prompt.values[:, :, :stored]
    if mask is None and prompt.valid(stored) is not None:
        raise ValueError("a batch with padding needs its attention_mask in every prompt")
    if stored == length:
        keys, values = key, value  # gradients flow through them, not through stored copies
    valid, starts = prompt.valid(stored), None
    if mask is None or mask.causal:
        padding = mask.key_padding() if mask is not None and prompt.aligned else None
        if mask is not None and padding is not None:
            padding = padding.to(key.device)
            valid, starts = padding[:, None], mask.row_starts()
        out = fast(query, keys, values, padding) if prompt.aligned and (valid is None or padding is not None) else None
        if out is not None:
            return out
        settings: dict[str, Any] = {"backend": backend, "workspaces": workspaces}
        return attend_causally(query, keys, values, params, valid=valid, starts=starts, **settings)
    if prompt.aligned:
        return dense_attention(query, keys, values, params, lambda i, j: mask.block(i, j, stored))
    positions = prompt.slot_positions(stored)

    def visible(first: int, last: int) -> VisibleBlock:
        return VisibleBlock(0, stored, mask.block_at(first, last, positions))

    return dense_attention(query, keys, values, params, visible, mask_heads=keys.shape[1])


def prefill(
    layer: "RocketKVLayer",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask | None,
    fast: FastAttention,
    params: AttentionParams,
) -> Tensor:
    """Append a prompt's tokens and attend from them to all stored tokens and, causally, to themselves."""
    store = layer.store
    start, length = store.seen, query.shape[2]
    valid = None if mask is None else mask.valid_tokens(start, start + length)
    valid = None if valid is None else valid.to(key.device)
    reopen(layer, length)
    store.extend(key, value, valid, expected=layer.prompt_end or 0)
    outputs, window = store.prompt.outputs, layer.config.window_size
    store.prompt.remember(query, window)
    layer.prompt_tokens = store.seen if mask is None else mask.longest_row(store.seen)
    settings: dict[str, Any] = {"backend": layer.config.backend, "workspaces": layer.workspaces}
    out = attend_prompt(store, query, key, value, mask, fast, params, **settings)
    store.prompt.remember_outputs(outputs, out, window)
    return out


def end_prompt(layer: "RocketKVLayer", params: AttentionParams) -> None:
    """Run stage 1 at the end of a prompt, as `RocketKVLayer.end_prompt`."""
    store, config = layer.store, layer.config
    prompt = store.prompt
    ops = eviction_ops(prompt.keys, backend=config.backend, workspaces=layer.workspaces)
    split, expected_error = prompt_split(store, config, layer.prompt_tokens, params, layer.workspaces.warn, ops)
    queries = 0 if prompt.queries is None else prompt.queries.shape[2]
    if split.ranks(layer.prompt_tokens):
        check_queries(queries, min(config.window_size, store.open_tokens))
    layer.backend = backend_name(prompt.keys.device, config.backend)
    if layer.history is not None:
        layer.history.keep(store)
    close_prompt_by(store, config, split, params, ops)
    store.decoding.expected_error = expected_error
    if layer.history is not None:
        store.allow_crops()
    whole = layer.prompt_ids is not None and layer.prompt_ids.shape[1] == store.seen  # the first prompt's
    if whole and config.protect == "system" and store.marks is not None:
        warn_unprotected(store.marks)
    layer.prompt_end = layer.prompt_ids = None
    if layer.monitor is not None:
        layer.monitor.begin(layer.number)


def settle(layer: "RocketKVLayer") -> None:
    """Append the pending tokens of an interrupted forward."""
    if layer.pending is None:
        return
    key, value = layer.pending
    layer.pending = None
    if layer.store.closed and key.shape[2] == 1:
        layer.store.append(key[:, :, 0], value[:, :, 0])
    else:
        reopen(layer, key.shape[2])
        layer.store.extend(key, value)


def reopen(layer: "RocketKVLayer", given: int) -> None:
    """Prepare for a prompt, or a chunk of one, of `given` tokens."""
    layer.step, layer.turn_begins = None, False
    if layer.history is not None and layer.store.closed:
        rest = 0 if layer.prompt_end is None else layer.prompt_end - layer.store.seen
        layer.history.resume(layer.store, max(given, rest))
