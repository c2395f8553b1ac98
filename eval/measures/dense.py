"""The dense baseline of `latency`: a preallocated cache, and the fastest attention of a decode step on this device.

transformers' own cache copies all keys and values at every step, and its attention reads a KV head once for each of its
query heads where no kernel groups them. A comparison with those flatters every method that compresses.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, n tokens.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...hf.models import find_decoder
from ..checks import WrongResultError, require_near_logits
from ..methods import Full, Method

DENSE = "dense"
_NAME = "rocketkv_eval_dense"  # a name with "flash" in it would make transformers look for a package
_REPEATS = 3
# One step's attention of query [B, H, D] over keys and values [B, Hkv, n, D], with a factor of the logits: [B, H, D].
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
# Errors of a call that does not support a shape, a dtype or a device, or whose package is not installed.
_CANNOT = (ImportError, RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, OSError)


def _rows(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    batch, kv_heads = keys.shape[:2]
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])
    return F.scaled_dot_product_attention(grouped, keys, values, scale=scaling).flatten(1, 2)


def _heads(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(query[:, :, None], keys, values, scale=scaling, enable_gqa=True)[:, :, 0]


def _flash(package: str) -> Attend:
    def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        called: Any = importlib.import_module(package).flash_attn_with_kvcache
        lengths = torch.full(keys.shape[:1], keys.shape[2], dtype=torch.int32, device=keys.device)
        cached = (keys.transpose(1, 2), values.transpose(1, 2))
        out: Any = called(query[:, None], *cached, cache_seqlens=lengths, softmax_scale=scaling)
        attended: Tensor = out[0] if isinstance(out, tuple) else out
        return attended[:, 0]

    return attend


def _flashinfer(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    called: Any = importlib.import_module("flashinfer").single_decode_with_kv_cache
    if len(query) > 1:
        raise ValueError("flashinfer's decode over a contiguous cache takes one row")
    options = {"kv_layout": "HND", "use_tensor_cores": True, "sm_scale": scaling}
    attended: Tensor = called(query[0], keys[0], values[0], **options)[None]
    return attended


ATTENTIONS: Mapping[str, Attend] = MappingProxyType(
    {
        "SDPA group as rows": _rows,
        "SDPA enable_gqa": _heads,
        "flash-attn": _flash("flash_attn"),
        "flash-attn 3": _flash("flash_attn_interface"),
        "flashinfer": _flashinfer,
    }
)


def fastest(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[str, dict[str, Any]]:
    """Return the name of the fastest of `ATTENTIONS`, and of each its milliseconds or why it is left out.

    Args:
        query: [B, H, D].
        keys: [B, Hkv, n, D].
        values: likewise.
        scaling: factor of the logits.
    """
    given = (query, keys, values, scaling)
    expected = _heads(query.float(), keys.float(), values.float(), scaling).to(query.dtype)
    tried = {name: _tried(name, attend, given, expected) for name, attend in ATTENTIONS.items()}
    times = {name: found for name, found in tried.items() if isinstance(found, float)}
    return min(times, key=times.__getitem__), tried


def _tried(name: str, attend: Attend, given: tuple[Tensor, Tensor, Tensor, float], expected: Tensor) -> float | str:
    """Return the milliseconds of a call, or why it is left out."""
    try:
        require_near_logits(f"attention by {name}", attend(*given), expected)
        return min(_seconds(attend, given) for _ in range(_REPEATS)) * 1e3
    except torch.OutOfMemoryError:
        raise
    except (WrongResultError, *_CANNOT) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]


def _seconds(attend: Attend, given: tuple[Tensor, Tensor, Tensor, float]) -> float:
    _wait(given[0])
    start = time.perf_counter()
    attend(*given)
    _wait(given[0])
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class PreallocatedLayer(DynamicLayer):
    """A layer whose keys and values are views of buffers that never move.

    Args:
        capacity: tokens.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own is not typed
        self.capacity = capacity
        self.buffers: tuple[Tensor, Tensor] | None = None  # [B, Hkv, capacity, D]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, Hkv, n, D], and return all so far."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if self.buffers is None:
            first, second = (
                part.new_empty(*part.shape[:2], self.capacity, part.shape[3]) for part in (key_states, value_states)
            )
            self.buffers = first, second
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


@dataclass(eq=False, kw_only=True)
class Dense:
    """The stock model over a preallocated cache, its decode steps by the fastest attention of the device.

    Attributes:
        new_tokens: room after the prompt.
        baseline: the method that it must agree with.
        attention: the fastest attention, of `ATTENTIONS`; None before the first decode step.
        tried: see `fastest`.
    """

    new_tokens: int
    name: str = DENSE
    token_budget: int | None = None
    baseline: Method = field(default_factory=Full)
    attention: str | None = None
    tried: Mapping[str, Any] = field(default_factory=dict)
    _prompt_length: int | None = None

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the model's decode steps attend by this object inside the context.

        Raises:
            ValueError: the model's attention is not one that transformers registers, as eager is not.
        """
        decoder = find_decoder(model)[0]
        before: str = decoder.config._attn_implementation
        if before not in ALL_ATTENTION_FUNCTIONS or before not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise ValueError(f"{DENSE} takes its prompts from sdpa or flash attention, got {before!r}; set --attn sdpa")
        stock: Any = ALL_ATTENTION_FUNCTIONS[before]

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
            special = any(more.get(name) is not None for name in ("softcap", "s_aux", "sliding_window"))
            if query.shape[2] > 1 or mask is not None or special:
                return stock(module, query, key, value, mask, **more)
            return self._step(query[:, :, 0], key, value, more.get("scaling"))[:, None], None

        # Masks are made for registered names alone; this one is a function of transformers, and stays registered.
        AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[before])
        ALL_ATTENTION_FUNCTIONS[_NAME] = attend
        try:
            decoder.set_attn_implementation(_NAME)
            yield
        finally:
            decoder.set_attn_implementation(before)
            del ALL_ATTENTION_FUNCTIONS[_NAME]

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Return an empty cache with room for a prompt and the new tokens.

        Raises:
            ValueError: the prompt's length is not known.
        """
        if prompt_length is None:
            raise ValueError(f"{DENSE} needs the prompt's length to allocate its cache")
        if prompt_length != self._prompt_length:  # another attention may be the fastest
            self._prompt_length, self.attention = prompt_length, None
        cache = DynamicCache(config=find_decoder(model)[0].config)
        room = prompt_length + self.new_tokens
        cache.layers[:] = [PreallocatedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def _step(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.attention is None:
            self.attention, self.tried = fastest(query, keys, values, factor)
        return ATTENTIONS[self.attention](query, keys, values, factor)
