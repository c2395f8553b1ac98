"""A patched decoder's forward under the user's own `torch.compile`: static steps are traced, all else runs eagerly.

A cache that grows changes counts of the host with every token; dynamo would compile anew for each of them.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .cache import rocketkv_layers
from .compiled import say_uncompiled, uncompiled_reason
from .layer import RocketKVLayer
from .models import given_cache, given_inputs


def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function eagerly, also where `torch.compile` traces the caller or has given up tracing it."""
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
    """Stands in the place of a patched decoder's `forward`.

    Args:
        decoder: the decoder.
        former: what stood in that place before, on the decoder itself, or None for its class's `forward`.
        warned: reasons that were given before.
    """

    def __init__(self, decoder: nn.Module, former: Callable[..., Any] | None, warned: set[str]) -> None:
        self.decoder = decoder
        self.former = former
        self.warned = warned

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the decoder's own."""
        own = type(self.decoder).forward.__get__(self.decoder) if self.former is None else self.former
        return inspect.signature(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder's own forward.

        Raises:
            ValueError: a layer's new keys reached no attention.
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
        """Run a forward and see to it that the attention has taken every layer's new keys."""
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
