"""The way into transformers: one hook, a `generate` that knows where the prompt ends, and `patch` / `unpatch`.

Nothing here keeps state of a model, a sequence or a call: a patch lives on the model it patches.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache

from .cache import (
    RocketKVCache,
    begin_prompt,
    cache_stats,
    compress_layers,
    forget_hand_over,
    rocketkv_layers,
)
from .config import RocketKVConfig
from .interface import IMPLEMENTATION, NAME, rocketkv_attention, rocketkv_mask
from .models import find_decoder, refuse_unsupported
from .stats import CacheStats

_STATE = "_rocketkv"  # on the patched model: its PatchState


@dataclass(eq=False)
class PatchState:
    """What `patch` left on a model: enough to run it and to undo it. Copies and pickles with the model."""

    config: RocketKVConfig
    implementation: str
    hook: RemovableHandle | None = None
    warned: set[str] = field(default_factory=set)
    recorded: threading.local = field(default_factory=threading.local)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process's threads."""
        return {name: value for name, value in self.__dict__.items() if name != "recorded"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing recorded."""
        self.__dict__.update(state, recorded=threading.local())

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, unless this kind of warning was given before."""
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, stacklevel=2)


class PatchHandle:
    """A patched model: what it was patched with, what its last generation saved, and a context manager that undoes it.

    Attributes:
        model: the patched model.
    """

    def __init__(self, model: nn.Module, state: PatchState) -> None:
        self.model = model
        self._state = state

    @property
    def config(self) -> RocketKVConfig:
        """The settings in force."""
        return self._state.config

    def stats(self) -> CacheStats:
        """Return tokens and bytes of the last `generate` that ended in this thread; its cache may be gone.

        Raises:
            ValueError: none has.
        """
        stats: CacheStats | None = getattr(self._state.recorded, "stats", None)
        if stats is None:
            raise ValueError(
                "no generate of this model has ended in this thread; in a loop of your own ask cache.stats()"
            )
        return stats

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unpatch(self.model)

    def __repr__(self) -> str:
        return f"PatchHandle({type(self.model).__name__}, {self.config})"


def patch(model: nn.Module, config: RocketKVConfig | None = None, /, **fields: Any) -> PatchHandle:
    """Compress a model's KV cache from now on: `model.generate(...)`, pipelines and loops work as before.

    Patching again changes the settings. Only full-attention layers are compressed; sliding-window and linear layers of
    hybrid models stay as they are. Caches that are not dynamic run exactly as without the patch, with a warning.

    Args:
        model: a causal language model of transformers, bare or wrapped (PEFT).
        config: the settings; None for `RocketKVConfig(**fields)`.
        **fields: fields of `RocketKVConfig`; with `config`, they replace its own.

    Returns:
        A handle; `with rocketkv.patch(model, ...):` unpatches at the end.

    Raises:
        TypeError: `model` is not a transformers model, or a field has the wrong type.
        ValueError: a field has an impossible value, or the model cannot be compressed; the message says why.
    """
    if not isinstance(config, (RocketKVConfig, type(None))):
        raise TypeError(f"config must be a RocketKVConfig or None, got {type(config).__name__}")
    settings = RocketKVConfig(**fields) if config is None else replace(config, **fields)
    outer = _outermost(model)
    state = _state_of(outer)
    if state is not None:
        state.config = settings
        return PatchHandle(model, state)
    decoder, attentions = find_decoder(outer)
    refuse_unsupported(outer, decoder, attentions)
    AttentionInterface.register(NAME, rocketkv_attention)
    AttentionMaskInterface.register(NAME, rocketkv_mask)
    before = decoder.config._attn_implementation
    state = PatchState(settings, before)
    decoder.set_attn_implementation(NAME)
    if decoder.config._attn_implementation != NAME:
        raise ValueError(
            f"{type(outer).__name__} cannot be patched: it does not use transformers' attention interface, so RocketKV "
            "cannot reach its attention"
        )
    for module in attentions:
        setattr(module, IMPLEMENTATION, before)
    state.hook = decoder.register_forward_pre_hook(_ForwardHook(state), with_kwargs=True)
    if hasattr(outer, "generate"):
        outer.__dict__["generate"] = functools.partial(generate, outer)
    outer.__dict__[_STATE] = state
    return PatchHandle(model, state)


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the model is as it was, bit for bit. Does nothing to a model that is not patched."""
    outer = _outermost(model)
    state = _state_of(outer)
    if state is None:
        return
    decoder, attentions = find_decoder(outer)
    decoder.set_attn_implementation(state.implementation)
    for module in attentions:
        if IMPLEMENTATION in module.__dict__:
            delattr(module, IMPLEMENTATION)
    if state.hook is not None:
        state.hook.remove()
    outer.__dict__.pop("generate", None)
    del outer.__dict__[_STATE]


def _outermost(model: Any) -> PreTrainedModel:
    """Return the first transformers model in a module, which may be a wrapper of it."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise TypeError(f"model must be a transformers model or hold one, got {type(model).__name__}")


def _state_of(model: nn.Module) -> PatchState | None:
    return model.__dict__.get(_STATE)


class _ForwardHook:
    """Runs before each forward of a patched decoder and sees to it that its cache is one that compresses."""

    def __init__(self, state: PatchState) -> None:
        self.state = state

    def __call__(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        forget_hand_over()
        cache = kwargs.get("past_key_values")
        _refuse_inputs(decoder, cache, args, kwargs)
        use_cache = kwargs.get("use_cache")
        if cache is None and not decoder.training and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = RocketKVCache(decoder.config, self.state.config)
            kwargs = {**kwargs, "past_key_values": cache}
        if cache is not None:
            self._prepare(decoder, cache)
        return args, kwargs

    def _prepare(self, decoder: PreTrainedModel, cache: Any) -> None:
        """Compress an empty dynamic cache in place, warn of caches that stay as they are, and arm our layers."""
        if _convertible(cache) and not decoder.training:
            compress_layers(cache, self.state.config, decoder.config)
        layers = rocketkv_layers(cache)
        for layer in layers:
            layer.armed = True
        if not layers and not isinstance(cache, RocketKVCache) and _holds_full_attention(decoder):
            self.state.warn_once(
                type(cache).__name__,
                f"RocketKV leaves a {type(cache).__name__} as it is: it was filled before, or is static, quantized or "
                "offloaded. This forward runs exactly, without compression. Pass no cache, or an empty DynamicCache.",
            )


def _convertible(cache: Any) -> bool:
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def _holds_full_attention(decoder: PreTrainedModel) -> bool:
    return bool(rocketkv_layers(RocketKVCache(decoder.config)))


def _refuse_inputs(decoder: PreTrainedModel, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what a compressed forward cannot give, before anything is computed."""
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True asks for attention weights over all tokens, and RocketKV evicts tokens and forms "
            "no weight matrix; call rocketkv.unpatch(model) first"
        )
    mask = kwargs.get("attention_mask")
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    if inputs is None and args:
        inputs = args[0]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not isinstance(inputs, Tensor) or inputs.shape[1] < 2:
        return
    if any(layer.prompt_end is not None and layer.prompt_end > mask.shape[1] for layer in rocketkv_layers(cache)):
        return  # a chunk of a prompt, whose rows may begin later
    empty = (mask == 0).all(-1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask must leave every row at least one token, but row {', '.join(map(str, rows))} is only "
            "padding; drop it from the batch or give it a token. If this is the first chunk of a longer prompt, pass a "
            "RocketKVCache with its prompt_length"
        )


def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Run the model's own `generate`, told where the prompt ends; stands in its place on a patched model.

    The cache is made here, so that every layer evicts inside its own prefill call, and counted at the end.
    """
    state = _state_of(model)
    stock: Callable[..., Any] = type(model).generate  # type: ignore[attr-defined]  # patch looked for it
    if state is None:
        return stock(model, *args, **kwargs)
    decoder, _ = find_decoder(model)
    cache = kwargs.get("past_key_values")
    if cache is None and _uses_dynamic_cache(model, args, kwargs):
        cache = kwargs["past_key_values"] = RocketKVCache(decoder.config, state.config)
    elif cache is not None and _convertible(cache):
        compress_layers(cache, state.config, decoder.config)
    layers = rocketkv_layers(cache)
    end = _prompt_end(args, kwargs)
    if end is not None:
        begin_prompt(cache, end, speculative=_speculative(model, args, kwargs))
    try:
        output = stock(model, *args, **kwargs)
    finally:
        for layer in layers:
            layer.speculative = False
    if layers:
        state.recorded.stats = cache_stats(cache)
    return output


def _setting(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Return a generation setting as `generate` will find it: argument, then its config, then the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    found = getattr(given, name, None)
    return getattr(model.generation_config, name, None) if found is None else found


def _uses_dynamic_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `generate` would make a plain dynamic cache of its own."""
    use_cache = _setting(model, args, kwargs, "use_cache")
    return use_cache is not False and _setting(model, args, kwargs, "cache_implementation") is None


def _speculative(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `generate` will verify drafts (assisted decoding, prompt lookup, early exit)."""
    names = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    return kwargs.get("assistant_model") is not None or any(_setting(model, args, kwargs, name) for name in names)


def _prompt_end(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the tokens of the sequence when the prompt ends, or None where there is no prompt."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[1]  # spans earlier turns too, also where only the new tokens are given
    for inputs in (
        kwargs.get("inputs_embeds"),
        kwargs.get("input_ids"),
        kwargs.get("inputs"),
        args[0] if args else None,
    ):
        if isinstance(inputs, Tensor):
            return inputs.shape[1]
    return None
