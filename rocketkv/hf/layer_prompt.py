"""A prompt of a layer: its tokens are stored and attended to densely, and stage 1 runs at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..backend import backend_name
from ..core.params import AttentionParams
from ..dispatch import eviction_ops
from ..state.compress import close_prompt_by
from ..state.fit import prompt_split
from ..state.protection import warn_unprotected
from .masks import LazyMask
from .prefill import FastAttention, attend_prompt
from .turns import check_queries

if TYPE_CHECKING:
    from .layer import RocketKVLayer


def prefill(
    layer: RocketKVLayer,
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
    layer.reopen(length)
    store.extend(key, value, valid, expected=layer.prompt_end or 0)
    outputs, window = store.prompt.outputs, layer.config.window_size
    store.prompt.remember(query, window)
    layer.prompt_tokens = store.seen if mask is None else mask.longest_row(store.seen)
    settings: dict[str, Any] = {"backend": layer.config.backend, "workspaces": layer.workspaces}
    out = attend_prompt(store, query, key, value, mask, fast, params, **settings)
    store.prompt.remember_outputs(outputs, out, window)
    return out


def end_prompt(layer: RocketKVLayer, params: AttentionParams) -> None:
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
