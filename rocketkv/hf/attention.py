"""The attention function and the mask function that transformers calls under the name `rocketkv`.

Letters: B batch, H query heads, Hkv KV heads, D head dim, n queries, S keys.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..core.dense import VisibleBlock, dense_attention
from ..core.params import AttentionParams
from ..dispatch import Workspaces
from .layer import RocketKVLayer, layer_of
from .masks import LazyMask, MaskFunction
from .patch_state import PatchState
from .prefill import FastAttention, attend_causally

NAME = "rocketkv"
# Arguments that some models pass to their attention, that change its weights, and that are not supported here.
UNKNOWN = ("position_bias", "sinks", "indices", "block_indices")
_JUST_CAUSAL: Any = causal_mask_function  # declared for ints, called with tensors
IMPLEMENTATION = "_rocketkv_implementation"  # on each attention module of a patched model: its former implementation
PATCH = "_rocketkv_patch"  # on the same modules: the model's PatchState


class _Disguise:
    """A view of an object with former values of some attributes; flash attention reads its name from the config."""

    def __init__(self, target: Any, **before: Any) -> None:
        self.__dict__.update(before)
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def rocketkv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,  # the sixth, as in `sdpa_attention_forward`: wrappers pass it by position
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of a patched model, registered with transformers as `rocketkv`.

    Args:
        module: the model's attention module.
        query: [B, H, n, D], after rotary embedding.
        key: [B, Hkv, S, D], as the cache's `update` returned it.
        value: [B, Hkv, S, Dv].
        attention_mask: the mask from `rocketkv_mask`, or the caller's 4D mask.
        dropout: probability of dropping a weight, in training.
        scaling: factor of the logits; None for 1/sqrt(D).
        softcap: c of `c * tanh(logit / c)`, or None.
        s_aux: [H], learned sinks, or None.
        sliding_window: tokens that this layer sees, or None for all.
        **kwargs: other arguments of the model, passed to its own attention.

    Returns:
        The output [B, n, H, Dv], and None in place of a weight matrix.

    Raises:
        ValueError: a compressed layer got a 4D mask, the call comes from continuous batching, or the model passes an
            argument of `UNKNOWN`, which changes the weights.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(
            "continuous batching (generate_batch) keeps its own paged cache, which RocketKV does not compress; "
            "call rocketkv.unpatch(model) before it, or use model.generate"
        )
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} gives its attention {name!r}, with which RocketKV cannot decode; call "
                "rocketkv.unpatch(model)"
            )
    layer: RocketKVLayer | None = layer_of(key)
    params = AttentionParams(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    own: FastAttention = functools.partial(
        _model_attention,
        module,
        scaling=scaling,
        dropout=dropout,
        softcap=softcap,
        s_aux=s_aux,
        sliding_window=sliding_window,
        **kwargs,
    )
    if layer is None:
        return _uncompressed(module, query, key, value, attention_mask, own, params, dropout, sliding_window), None
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            f"RocketKV needs the 2D attention_mask [batch, tokens]; {type(module).__name__} got a mask of shape "
            f"{tuple(attention_mask.shape)}, which cannot be evaluated at the tokens that are kept. If you gave none, "
            "the model makes it itself: this version of transformers cannot compress it, call rocketkv.unpatch(model)"
        )
    out = layer.attend(query, attention_mask, params, fast=own)
    return out, None


def _model_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, **kwargs: Any
) -> Tensor | None:
    """Run the model's former attention on causal queries at the end of the keys, or return None.

    Args:
        module: the attention module.
        query: [B, H, n, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        padding: [B, S] bool, True at tokens, or None.
        **kwargs: the other arguments of the attention call.

    Returns:
        [B, n, H, Dv], or None if the implementation needs an S x S mask or is not exact.
    """
    implementation = getattr(module, IMPLEMENTATION, "sdpa")
    if "flash" in implementation:
        # Flash attention aligns queries to the end of the keys, and supports padding, soft-cap and learned sinks.
        config = _Disguise(module.config, _attn_implementation=implementation)
        disguised = _Disguise(module, config=config)
        mask = None if padding is None else padding[:, : key.shape[2]]
        out: Tensor = ALL_ATTENTION_FUNCTIONS[implementation](disguised, query, key, value, mask, **kwargs)[0]
        return out
    if padding is not None or query.shape[2] not in (1, key.shape[2]):
        return None
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return None
    # Eager attention would build the S x S matrix; SDPA computes the same without it.
    attended: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)[0]
    return attended


def _uncompressed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask | Tensor | None,
    own: FastAttention,
    params: AttentionParams,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """Attend as the stock model: sliding-window layers, caches of other kinds, and forwards without a cache."""
    if mask is None or (isinstance(mask, LazyMask) and mask.plain):
        out = own(query, key, value, None)
        if out is not None:
            return out
    if mask is None:
        return _attend_causally(module, query, key, value, params, dropout=dropout)
    size = key.shape[2]
    if (
        isinstance(mask, LazyMask)
        and mask.at_end
        and (mask.causal or (mask.window is not None and mask.window == sliding_window))
    ):
        padding = mask.key_padding()
        padding = None if padding is None else padding.to(query.device)
        if "flash" in getattr(module, IMPLEMENTATION, "sdpa"):
            out = own(query, key, value, padding)
            if out is not None:
                return out
        starts = None if padding is None else mask.row_starts()
        window = None if mask.causal else sliding_window
        valid = None if padding is None else padding[:, None]
        settings: dict[str, Any] = {"valid": valid, "starts": starts, "window": window, "dropout": dropout}
        return _attend_causally(module, query, key, value, params, **settings)

    def visible(start: int, stop: int) -> VisibleBlock:
        if isinstance(mask, LazyMask):
            return mask.block(start, stop, size, window=sliding_window)
        # The caller's 4D mask: a key is visible where it is True, or zero if it is additive.
        rows = mask[:, :, start:stop, :size]
        return VisibleBlock(0, size, rows if rows.dtype == torch.bool else rows >= 0)

    return dense_attention(query, key, value, params, visible, dropout=dropout)


def _attend_causally(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, **settings: Any
) -> Tensor:
    """Call `attend_causally` with the backend and the warnings of the module's patch."""
    patch: PatchState | None = module.__dict__.get(PATCH)
    if patch is not None:
        settings |= {"backend": patch.config.backend, "workspaces": Workspaces(warned=patch.warned)}
    return attend_causally(query, key, value, params, **settings)


def rocketkv_mask(
    batch_size: int,
    kv_length: int,
    mask_function: MaskFunction,
    attention_mask: Tensor | LazyMask | None = None,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    cache_position: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bool,
    **kwargs: Any,
) -> LazyMask:
    """Return a lazy mask in place of transformers' S x S mask; registered with transformers as `rocketkv`.

    Args:
        batch_size: rows.
        kv_length: keys of the layer.
        mask_function: maps index tensors to bool, True where a query sees a key.
        attention_mask: [B, tokens] bool, False at padding, or None; a `LazyMask` is returned unchanged.
        q_length: queries.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        cache_position: [n] positions of the queries, which transformers before 5.4 passes instead of `q_length` and
            `q_offset`.
        local_size: sliding window or chunk of the layer; with fewer keys, its mask is plain causal.
        allow_is_causal_skip: whether `mask_function` is plain causal up to `local_size`.
        device: device of the mask.
        dtype: dtype of the mask for eager attention; only reported.
        **kwargs: arguments of other mask functions, ignored.
    """
    if isinstance(attention_mask, LazyMask):
        return attention_mask
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
        if device.type == "cpu":
            q_offset = int(q_offset)
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache increments its clock in place before this mask is evaluated
    return LazyMask(
        mask_function=mask_function,
        padding=attention_mask,
        batch_size=batch_size,
        query_length=q_length,
        query_offset=q_offset,
        kv_length=kv_length,
        kv_offset=kv_offset,
        # Before transformers 5 a compileable cache gets full masks; a plain causal function is recognized by identity.
        causal=mask_function is _JUST_CAUSAL
        or (allow_is_causal_skip and (local_size is None or kv_length < local_size)),
        window=local_size if allow_is_causal_skip else None,
        device=torch.device("cpu" if device is None else device),
        dtype=dtype,
    )
