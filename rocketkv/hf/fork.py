"""One prefill for several caches: read a prompt once, and begin a cache of any settings after it.

Every method of the library attends densely to a prompt, and compresses when it ends. So a prompt that is still open
(all keys and values, the last queries and their outputs) determines the state of every method after it.

Letters: B batch, H query heads, Hkv KV heads, D head dim, S tokens of the prompt, W observation window.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..config import RocketKVConfig
from ..core.params import AttentionParams
from ..dispatch import warm_up
from ..state.prompt import PromptTokens
from ..static_step import static_step
from .cache import RocketKVCache
from .layer import RocketKVLayer, rocketkv_layers
from .masks import LazyMask
from .prefill import FastAttention

# Copies of a prompt that must fit into the device's free memory for the prompt to stay there: a full cache that grows
# exists twice while it is copied, and its answers need some room.
_COPIES = 4


class _OpenLayer(RocketKVLayer):
    """A layer of an open prompt, which moves its keys and values to the host where the device has little memory.

    Attributes:
        alike: number of such layers in the cache.
    """

    alike = 1

    def attend(self, query: Tensor, mask: LazyMask | None, params: AttentionParams, *, fast: FastAttention) -> Tensor:
        """Attend as any layer, and leave the prompt open."""
        out = super().attend(query, mask, params, fast=fast)
        prompt = self.store.prompt
        if not _fits(prompt.keys.device, self.alike * (prompt.keys.nbytes + prompt.values.nbytes)):
            prompt.keys, prompt.values = prompt.keys.cpu(), prompt.values.cpu()
        return out


def _fits(device: torch.device, size: int) -> bool:
    """Whether `_COPIES` copies of `size` bytes fit into a device's free memory."""
    if device.type != "cuda":
        return True
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused >= _COPIES * size


def open_cache(model_config: PretrainedConfig, *, window_size: int) -> RocketKVCache:
    """Return an empty cache for one forward of a patched model, which reads a prompt whose end does not come.

    It keeps all keys and values of compressed layers, on the host where the device has little memory, and the last
    queries. `begin_after` begins other caches after the prompt.

    Args:
        model_config: the model's configuration.
        window_size: queries to keep, at least the W of every cache that begins after the prompt.

    Raises:
        ValueError: `window_size` is impossible.
    """
    cache = RocketKVCache(model_config, RocketKVConfig(method="full", window_size=window_size))
    layers = rocketkv_layers(cache)
    for layer in layers:
        opened = _OpenLayer(layer.config, layer.workspaces, number=layer.number)
        opened.alike = len(layers)
        cache.layers[layer.number] = opened
    return cache


def can_begin_after(cache: Any, read: RocketKVCache, attention: str) -> bool:
    """Whether an empty cache would compute from a prompt exactly what `read` has of it.

    A layer that the cache leaves as it is must have been read as the stock model reads it: without padding, soft-cap
    and learned sinks, by an attention that compressed layers use too. Marks of a prompt's tokens are not shared.

    Args:
        cache: an empty cache.
        read: from `open_cache`, after its forward.
        attention: the implementation of the model that will use the cache: `rocketkv`, or the stock model's.
    """
    if len(getattr(cache, "layers", ())) != len(read.layers):
        return False
    stock = attention != "rocketkv"
    for layer, source in zip(cache.layers, read.layers, strict=True):
        if isinstance(layer, RocketKVLayer):
            known = isinstance(source, RocketKVLayer) and _has_queries(layer.config, source)
            if not known or layer.config.marks_prompts or layer.is_initialized:
                return False
        elif isinstance(source, RocketKVLayer):
            if type(layer) is not DynamicLayer or not _plain(source):
                return False
        elif stock or type(layer) is not type(source):
            return False
    return not stock or attention == "sdpa" or "flash" in attention


def _has_queries(config: RocketKVConfig, source: RocketKVLayer) -> bool:
    """Whether a prompt has the queries of an observation window."""
    queries = source.store.prompt.queries
    return queries is not None and queries.shape[2] >= min(config.window_size, source.store.open_tokens)


def _plain(source: RocketKVLayer) -> bool:
    """Whether a layer's prompt was read without padding, soft-cap and learned sinks."""
    params = source.params
    return not source.store.prompt.holes and params is not None and params.softcap is None and params.sinks is None


@torch.inference_mode()
def begin_after(cache: Any, read: RocketKVCache) -> None:
    """Let an empty cache begin after a prompt, in the state that reading the prompt itself would leave it in.

    Args:
        cache: an empty cache, for which `can_begin_after` is true.
        read: from `open_cache`, after its forward; it stays unchanged.
    """
    for number, source in enumerate(read.layers):
        layer: Any = cache.layers[number]
        if not isinstance(source, RocketKVLayer):
            cache.layers[number] = copy_layer(source)
        elif isinstance(layer, RocketKVLayer):
            _begin(layer, source)
        else:
            prompt = _on_device(source.store.prompt)
            layer.update(prompt.keys, prompt.values)


def _begin(layer: RocketKVLayer, source: RocketKVLayer) -> None:
    """Give a layer the open prompt of another, and end it."""
    prompt, params = _on_device(source.store.prompt), source.params
    if prompt.queries is None or params is None:
        raise ValueError("the prompt to begin after has not been read: run a forward over its cache first")
    window = layer.config.window_size
    prompt.queries = prompt.queries[:, :, -window:]
    prompt.outputs = None if prompt.outputs is None else prompt.outputs[:, :, -window:]
    layer.store.phase, layer.store.lens = prompt, source.store.lens.copy()
    if layer.history is not None:
        prompt.copy_buffers()  # a history writes into them
    layer.prompt_tokens, layer.params = source.prompt_tokens, params
    query = prompt.queries[:, :, -1]
    layer.end_prompt(params)
    warm_up(query, layer.store, params, backend=layer.backend, workspaces=layer.workspaces)
    if layer.config.decode_capacity is not None:
        layer.step = static_step(query, layer.store, backend=layer.backend, workspaces=layer.workspaces)


def _on_device(prompt: PromptTokens) -> PromptTokens:
    """Return a copy of a prompt that refers to its tensors, on the device where it was read."""
    if prompt.queries is None:
        return replace(prompt)
    device = prompt.queries.device
    return replace(prompt, keys=prompt.keys.to(device), values=prompt.values.to(device))


def copy_layer(layer: Any) -> Any:
    """Return an independent copy of a stock layer of a cache, without its tensors where it only replaces them."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return copy.copy(layer)
    with torch.inference_mode(False):  # the copy may be written outside of inference mode
        return copy.deepcopy(layer)
