"""A patched decoder's forward: the hook that prepares its cache, and the part that `torch.compile` traces.

Static decode steps are traced; everything else runs eagerly. A cache that grows changes counts on the host with every
token, and dynamo would recompile for each of them.
"""

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..state.history import History
from ..state.monitor import OnStep, refuse_static
from .attention import NAME
from .cache import RocketKVCache, add_monitor, compress_layers, convertible, mark_prompt
from .compiled import say_uncompiled, uncompiled_reason
from .layer import RocketKVLayer, rocketkv_layers
from .models import CACHE_ARGUMENT, given_cache, given_inputs, refuse_empty_rows
from .patch_state import PatchState


def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function eagerly, also if `torch.compile` traces the caller or has given up tracing it."""
    if torch.compiler.is_dynamo_compiling() or "torch._dynamo" in sys.modules:
        from .untraced import call_untraced

        return call_untraced(function, *args)
    return function(*args)


def step_statically(layers: list[RocketKVLayer], inputs: Tensor | None) -> bool:
    """Whether a forward of these ids or embeddings is a static step of a cache's layers."""
    if inputs is None:
        return False
    for layer in layers:
        if not layer.steps_statically(inputs.shape[1]):
            return False
    return len(layers) > 0


class DecoderForward:
    """Replaces a patched decoder's `forward`.

    Args:
        decoder: the decoder.
        former: the `forward` in the decoder's `__dict__` before the patch, or None for its class's `forward`.
        warned: reasons already warned of.
    """

    def __init__(self, decoder: nn.Module, former: Callable[..., Any] | None, warned: set[str]) -> None:
        self.decoder = decoder
        self.former = former
        self.warned = warned

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the decoder's own `forward`."""
        own = type(self.decoder).forward.__get__(self.decoder) if self.former is None else self.former
        return inspect.signature(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder's own forward.

        Raises:
            ValueError: no attention function has read a layer's new keys.
        """
        cache = given_cache(kwargs)[1]
        layers = rocketkv_layers(cache)
        if not layers:
            return self._forward(args, kwargs)
        traced = torch.compiler.is_dynamo_compiling()
        if traced and step_statically(layers, given_inputs(args, kwargs)):
            return self._checked(layers, args, kwargs)
        return eagerly(self._run, cache, layers, args, kwargs, traced)

    def _run(
        self, cache: Any, layers: list[RocketKVLayer], args: tuple[Any, ...], kwargs: dict[str, Any], traced: bool
    ) -> Any:
        """Run a forward that is not traced, though parts of the model may be compiled each for itself."""
        reason = uncompiled_reason(cache) if traced else None
        if reason is not None:
            say_uncompiled(reason, self.warned)
        return self._checked(layers, args, kwargs)

    def _checked(self, layers: list[RocketKVLayer], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward, and check that the attention function has read every layer's new keys."""
        out = self._forward(args, kwargs)
        for layer in layers:
            if layer.pending is not None:
                raise ValueError(
                    "a layer of this model gave its new keys to the RocketKV cache, but its attention did not read the "
                    "cache: its logits would be wrong. Either it changes keys between its cache and its attention, "
                    "as models with latent or shared KV do: call rocketkv.unpatch(model). Or torch.compile separated "
                    "the two: use handle.compile_step() and a cache with decode_capacity"
                )
        return out

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.former is not None:
            return self.former(*args, **kwargs)
        return type(self.decoder).forward(self.decoder, *args, **kwargs)


def arm(layers: list[RocketKVLayer], on_step: OnStep | None = None) -> None:
    """Prepare the layers of a cache for a patched model's forward, whose decode steps are reported to `on_step`.

    Raises:
        ValueError: `on_step` is given for a static cache.
    """
    if on_step is not None and layers:
        refuse_static(layers[0].config)
        if layers[0].monitor is None:
            add_monitor(layers)
    if layers and layers[0].monitor is not None:
        layers[0].monitor.on_step = on_step
    following: History | None = None
    for layer in reversed(layers):
        layer.armed = True
        if layer.history is not None:
            layer.history.following, following = following, layer.history


class ForwardHook:
    """Runs before each forward of a patched decoder, and makes its cache a compressed one."""

    def __init__(self, state: PatchState) -> None:
        self.state = state

    def __call__(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the forward's arguments, with a prepared cache.

        Raises:
            ValueError: the model is a shallow copy, its attention was changed, or the forward asks for attentions.
        """
        forward = decoder.__dict__.get("forward")
        if isinstance(forward, DecoderForward) and forward.decoder is not decoder:
            raise ValueError(
                f"this {type(decoder).__name__} is a shallow copy (as nn.DataParallel makes) of a patched model, and "
                f"would run that one's weights: copy the model before rocketkv.patch, or use copy.deepcopy"
            )
        if decoder.config._attn_implementation != NAME:
            raise ValueError(
                f"the attention implementation of this patched {type(decoder).__name__} was set to "
                f"{decoder.config._attn_implementation!r}; call rocketkv.unpatch(model) before changing it"
            )
        kwargs, cache = given_cache(kwargs)
        if torch.compiler.is_dynamo_compiling():
            if _arm_static_step(cache, given_inputs(args, kwargs)):
                return args, kwargs  # the rest is for prompts and for forwards that create a cache
            if not (_makes_cache(decoder, cache, kwargs) or convertible(cache) or rocketkv_layers(cache)):
                return self._begin(decoder, cache, args, kwargs)
        return eagerly(self._begin, decoder, cache, args, kwargs)  # type: ignore[no-any-return]  # untyped

    def _begin(
        self, decoder: PreTrainedModel, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Prepare the forward's cache, or create one; return the forward's arguments."""
        inputs = given_inputs(args, kwargs)
        layers = rocketkv_layers(cache)
        _refuse_inputs(decoder, layers, inputs, kwargs)
        if layers and inputs is not None and inputs.shape[1] == 1 and layers[0].decodes(1):
            arm(layers, self.state.on_step)
            return args, kwargs
        running = self.state.running
        if _makes_cache(decoder, cache, kwargs):
            cache = kwargs[CACHE_ARGUMENT] = RocketKVCache(decoder.config, self.state.config)
            if running is not None and inputs is not None:
                running.begin_anew(cache, inputs.shape[1])
        if cache is not None:
            self._prepare(decoder, cache)
            mark_prompt(cache, inputs, kwargs.get("attention_mask"), self.state.chat)
            if running is not None and running.cache is None and rocketkv_layers(cache):
                running.begin(cache)
        return args, kwargs

    def _prepare(self, decoder: PreTrainedModel, cache: Any) -> None:
        """Compress an empty dynamic cache in place, warn of caches that stay uncompressed, and arm the layers."""
        if convertible(cache) and not decoder.training:
            compress_layers(cache, self.state.config, decoder.config)
        layers = rocketkv_layers(cache)
        arm(layers, self.state.on_step)
        kind = type(cache).__name__
        unwarned = not layers and not isinstance(cache, RocketKVCache) and kind not in self.state.warned
        if unwarned and rocketkv_layers(RocketKVCache(decoder.config)):
            self.state.warned.add(kind)
            warnings.warn(
                f"RocketKV leaves a {kind} as it is: it was filled before, or is static, quantized or "
                "offloaded. This forward runs exactly, without compression. Pass no cache, or an empty DynamicCache.",
                stacklevel=2,
            )


def _makes_cache(decoder: PreTrainedModel, cache: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this forward creates a cache."""
    use_cache = kwargs.get("use_cache")
    return cache is None and not decoder.training and bool(decoder.config.use_cache if use_cache is None else use_cache)


def _arm_static_step(cache: Any, inputs: Tensor | None) -> bool:
    """Arm the layers of a cache whose next forward is a static step; return whether it is."""
    layers = rocketkv_layers(cache)
    if not step_statically(layers, inputs):
        return False
    for layer in layers:
        layer.armed = True
    return True


def _refuse_inputs(
    decoder: PreTrainedModel, layers: list[RocketKVLayer], inputs: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Refuse inputs that a compressed forward does not support, before anything is computed."""
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True asks for attention weights over all tokens, and RocketKV evicts tokens and forms "
            "no weight matrix; call rocketkv.unpatch(model) first"
        )
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or inputs is None or inputs.shape[1] < 2:
        return
    if any(layer.prompt_end is not None and layer.prompt_end > mask.shape[1] for layer in layers):
        return  # a chunk of a prompt, whose rows may begin later
    refuse_empty_rows(mask)
