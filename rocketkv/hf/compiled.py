"""Decode steps of a static cache under `torch.compile`: when they can be compiled, and checks for a full buffer.

A compiled forward neither reads nor updates the host's counts, so the room is checked outside of it.
"""

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from .layer import RocketKVLayer, rocketkv_layers
from .models import given_cache

# Dynamo compiles a forward for each budget split. Prompts of many lengths have more splits than its limit of eight.
COMPILED_FORWARDS = 1024
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def many_forwards() -> AbstractContextManager[None]:
    """Return a context in which dynamo may compile one model's decode step for many splits."""
    if TORCH < (2, 7):
        return nullcontext()
    import torch._dynamo  # imported where something is compiled: it takes seconds

    limits = {"recompile_limit": COMPILED_FORWARDS, "accumulated_recompile_limit": COMPILED_FORWARDS}
    context: AbstractContextManager[None] = torch._dynamo.config.patch(limits)
    return context


def uncompiled_reason(cache: Any) -> str | None:
    """Return why the decode steps of a cache cannot be compiled after any prompt, or None if they can."""
    if TORCH < (2, 7):
        return f"PyTorch {torch.__version__} does not trace the models that it should compile; 2.7 is the first to try"
    layers = rocketkv_layers(cache)
    if not layers:
        return "the cache holds no layer that RocketKV compresses"
    if any(layer.config.decode_capacity is None for layer in layers):
        return "the cache grows; set decode_capacity"
    others = (layer for layer in cache.layers if not isinstance(layer, RocketKVLayer))
    growing = sorted({type(layer).__name__ for layer in others if not layer.is_compileable})
    if growing:
        return f"the model's other layers have caches of changing shapes ({', '.join(growing)})"
    return None


def say_uncompiled(reason: str, warned: set[str]) -> None:
    """Warn that decode steps run eagerly, once for each reason."""
    if reason not in warned:
        warned.add(reason)
        warnings.warn(f"RocketKV runs these decode steps eagerly, not compiled: {reason}", stacklevel=3)


class RoomCheck(LogitsProcessor):
    """Re-evicts, or ends a compiled `generate` with an error, if its static cache is full; logits do not change.

    Args:
        running: the generation; its `cache` may be replaced.
    """

    def __init__(self, running: Any) -> None:
        self.running = running
        self.layer: RocketKVLayer | None = None
        self.last = 0  # length of the sequence up to which its store has room

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores.

        Raises:
            ValueError: the forward of these scores had no room for its token.
        """
        layers = rocketkv_layers(self.running.cache)
        layer, length = layers[0], input_ids.shape[1]
        if layer is not self.layer or length > self.last or (length == self.last and layer.re_evicts):
            for each in layers:
                if each.re_evicts:
                    each.ensure_room()
            # Reading `stored` counts the device's steps, and raises if the buffer had no room for them.
            self.layer, self.last = layer, length + layer.store.capacity - layer.store.stored
        return scores


def _alone(value: Any) -> Any:
    """Return a contiguous copy of a tensor: the strides of a slice depend on its base."""
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


class CompiledStep:
    """A model's forward for a custom loop: compiled for decode steps of a static cache, eager otherwise.

    Steps under `torch.compile` neither check the cache's room nor update the host's counts; this object does both.

    Args:
        model: the patched model.
        warned: reasons already warned of.
        **options: options of `torch.compile`; by default `mode="reduce-overhead"` (CUDA graphs) and `fullgraph=True`.
    """

    def __init__(self, model: nn.Module, warned: set[str], **options: Any) -> None:
        self.model = model
        self._warned = warned
        named = "backend" in options or "options" in options  # with these, torch.compile accepts no mode
        defaults: dict[str, Any] = {"fullgraph": True} if named else {"fullgraph": True, "mode": "reduce-overhead"}
        self._compiled: Callable[..., Any] = torch.compile(model.__call__, **(defaults | options))
        self._takes_positions = "cache_position" in inspect.signature(model.forward).parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward, with the arguments of the model.

        Raises:
            ValueError: the cache has no room for the token.
        """
        kwargs, cache = given_cache(kwargs)
        layers = rocketkv_layers(cache)
        ids = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        given = ids.shape[1] if isinstance(ids, Tensor) else 0
        if not layers or not all(layer.steps_statically(given) for layer in layers):
            return self.model(*args, **kwargs)
        reason = uncompiled_reason(cache)
        if reason is None and torch.is_grad_enabled():
            reason = "gradients are enabled; run them under torch.inference_mode()"
        if reason is not None:
            say_uncompiled(reason, self._warned)
            return self.model(*args, **kwargs)
        for layer in layers:
            layer.ensure_room()
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            del kwargs["attention_mask"]  # it grows with every step, and compacted rows have no padding
        if self._takes_positions and kwargs.get("cache_position") is None:
            kwargs["cache_position"] = layers[0].static_clock()  # transformers before 5 would wait for the device
        if isinstance(ids, Tensor) and ids.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # PyTorch's own is not typed
        with many_forwards():
            out = self._compiled(*map(_alone, args), **{name: _alone(value) for name, value in kwargs.items()})
        for layer in layers:
            layer.store.lens.uncounted = False
            layer.store.lens.advance()
        return out
