"""The way into transformers: one hook, a `generate` that knows where the prompt ends, and `patch` / `unpatch`.

Nothing here keeps state of a model, a sequence or a call: a patch lives on the model it patches.
"""

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from .cache import (
    RocketKVCache,
    begin_prompt,
    cache_stats,
    compress_layers,
    forget_hand_over,
    make_croppable,
    rocketkv_layers,
)
from .config import RocketKVConfig
from .interface import IMPLEMENTATION, NAME, rocketkv_attention, rocketkv_mask
from .models import CACHE_ARGUMENT, find_decoder, refuse_unsupported
from .stats import CacheStats

_STATE = "_rocketkv"  # on the patched model: its PatchState
_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching")


@dataclass(eq=False)
class PatchState:
    """What `patch` left on a model: enough to run it and to undo it. Copies and pickles with the model."""

    config: RocketKVConfig
    former_configs: list[tuple[nn.Module, PretrainedConfig]] = field(default_factory=list)
    former_generate: Callable[..., Any] | None = None
    hook: RemovableHandle | None = None
    warned: set[str] = field(default_factory=set)
    recorded: threading.local = field(default_factory=threading.local)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process's threads."""
        return {name: value for name, value in self.__dict__.items() if name != "recorded"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing recorded."""
        self.__dict__.update(state, recorded=threading.local())

    @property
    def running(self) -> "_Generation | None":
        """The generation that runs in this thread."""
        return getattr(self.recorded, "running", None)


class PatchHandle:
    """A patched model: what it was patched with, what its last generation saved, and a context manager that undoes it.

    Attributes:
        model: the patched model.
    """

    def __init__(self, model: nn.Module, state: PatchState, before: RocketKVConfig | None = None) -> None:
        self.model = model
        self._state = state
        self._before = before

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
        if self._before is None:
            unpatch(self.model)
        else:
            self._state.config = self._before

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
        A handle; `with rocketkv.patch(model, ...):` ends with what was before: no patch, or the earlier settings.

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
        before = state.config
        state.config = settings
        return PatchHandle(model, state, before)
    decoder, attentions = find_decoder(outer)
    if any(IMPLEMENTATION in module.__dict__ for module in attentions):
        raise ValueError(
            f"{type(outer).__name__} holds, or is part of, a model that is patched already; call rocketkv.unpatch on "
            "that one first"
        )
    refuse_unsupported(outer, decoder, attentions)
    AttentionInterface.register(NAME, rocketkv_attention)
    AttentionMaskInterface.register(NAME, rocketkv_mask)
    before = decoder.config._attn_implementation
    state = PatchState(settings, _take_configs(outer), outer.__dict__.get("generate"))
    try:
        decoder.set_attn_implementation(NAME)
        if decoder.config._attn_implementation != NAME:
            raise ValueError(
                f"{type(outer).__name__} cannot be patched: it does not use transformers' attention interface, so "
                "RocketKV cannot reach its attention"
            )
    except BaseException:
        _give_configs_back(state.former_configs)
        raise
    for module in attentions:
        setattr(module, IMPLEMENTATION, before)
    state.hook = decoder.register_forward_pre_hook(_ForwardHook(state), with_kwargs=True)
    if hasattr(outer, "generate"):
        outer.__dict__["generate"] = functools.partial(generate, outer)
    for name in _CONTINUOUS_BATCHING:
        if hasattr(outer, name):
            outer.__dict__[name] = refuse_continuous_batching
    outer.__dict__[_STATE] = state
    return PatchHandle(model, state)


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the model is as it was, bit for bit. Does nothing to a model that is not patched."""
    outer = _outermost(model)
    state = _state_of(outer)
    if state is None:
        return
    _, attentions = find_decoder(outer)
    _give_configs_back(state.former_configs)
    for module in attentions:
        if IMPLEMENTATION in module.__dict__:
            delattr(module, IMPLEMENTATION)
    if state.hook is not None:
        state.hook.remove()
    for name in ("generate", *_CONTINUOUS_BATCHING):
        outer.__dict__.pop(name, None)
    if state.former_generate is not None:
        outer.__dict__["generate"] = state.former_generate
    del outer.__dict__[_STATE]


def _take_configs(model: PreTrainedModel) -> list[tuple[nn.Module, PretrainedConfig]]:
    """Give a model configurations of its own, since others may share them, and return those that its modules had."""
    found = ((module, module.__dict__.get("config")) for module in model.modules())
    former = [(module, config) for module, config in found if isinstance(config, PretrainedConfig)]
    copies: dict[int, Any] = {}  # modules that shared a configuration share its copy
    for module, config in former:
        module.__dict__["config"] = copy.deepcopy(config, copies)
    return former


def _give_configs_back(former: list[tuple[nn.Module, PretrainedConfig]]) -> None:
    """Undo `_take_configs`, but keep what was set in the meantime."""
    for module, config in former:
        for name, value in module.__dict__["config"].__dict__.items():
            kept = name.startswith("_attn_implementation") or isinstance(value, PretrainedConfig)
            if not kept and (name not in config.__dict__ or config.__dict__[name] != value):
                config.__dict__[name] = value
    for module, config in former:
        module.__dict__["config"] = config


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
        if decoder.config._attn_implementation != NAME:
            raise ValueError(
                f"the attention implementation of this patched {type(decoder).__name__} was set to "
                f"{decoder.config._attn_implementation!r}; call rocketkv.unpatch(model) before changing it"
            )
        kwargs, cache = _given_cache(kwargs)
        inputs = _inputs(args, kwargs)
        _refuse_inputs(decoder, cache, inputs, kwargs)
        use_cache = kwargs.get("use_cache")
        if cache is None and not decoder.training and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = RocketKVCache(decoder.config, self.state.config)
            kwargs[CACHE_ARGUMENT] = cache
            if self.state.running is not None and inputs is not None:
                self.state.running.begin_anew(cache, inputs.shape[1])
        if cache is not None:
            self._prepare(decoder, cache)
            running = self.state.running
            if running is not None and running.cache is None and rocketkv_layers(cache):
                running.begin(cache)
        return args, kwargs

    def _prepare(self, decoder: PreTrainedModel, cache: Any) -> None:
        """Compress an empty dynamic cache in place, warn of caches that stay as they are, and arm our layers."""
        if _convertible(cache) and not decoder.training:
            compress_layers(cache, self.state.config, decoder.config)
        layers = rocketkv_layers(cache)
        for layer in layers:
            layer.armed = True
        kind = type(cache).__name__
        unwarned = not layers and not isinstance(cache, RocketKVCache) and kind not in self.state.warned
        if unwarned and _holds_full_attention(decoder):
            self.state.warned.add(kind)
            warnings.warn(
                f"RocketKV leaves a {kind} as it is: it was filled before, or is static, quantized or "
                "offloaded. This forward runs exactly, without compression. Pass no cache, or an empty DynamicCache.",
                stacklevel=2,
            )


def _convertible(cache: Any) -> bool:
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def _holds_full_attention(decoder: PreTrainedModel) -> bool:
    return bool(rocketkv_layers(RocketKVCache(decoder.config)))


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the ids or embeddings that a forward gets."""
    for inputs in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(inputs, Tensor):
            return inputs
    return None


def _refuse_inputs(decoder: PreTrainedModel, cache: Any, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse what a compressed forward cannot give, before anything is computed."""
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True asks for attention weights over all tokens, and RocketKV evicts tokens and forms "
            "no weight matrix; call rocketkv.unpatch(model) first"
        )
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or inputs is None or inputs.shape[1] < 2:
        return
    if any(layer.prompt_end is not None and layer.prompt_end > mask.shape[1] for layer in rocketkv_layers(cache)):
        return  # a chunk of a prompt, whose rows may begin later
    _refuse_empty_rows(mask)


def _refuse_empty_rows(mask: Tensor) -> None:
    empty = (mask == 0).all(-1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask must leave every row at least one token, but row {', '.join(map(str, rows))} is only "
            "padding; drop it from the batch or give it a token. If this is the first chunk of a longer prompt, pass a "
            "RocketKVCache with its prompt_length"
        )


class _Generation:
    """One call of `generate`: where its prompt ends, and the cache that it uses once that is known."""

    def __init__(self, end: int | None, speculative: bool, croppable: bool) -> None:
        self.end = end
        self.speculative = speculative
        self.croppable = croppable
        self.cache: Any = None

    def begin(self, cache: Any) -> None:
        """Tell a cache of ours, before its first forward of this call, where the prompt ends."""
        self.cache = cache
        if self.end is not None:
            begin_prompt(cache, self.end, speculative=self.speculative)
        if self.croppable:
            make_croppable(cache)

    def begin_anew(self, cache: Any, given: int) -> None:
        """Go over to a cache in the place of the first one, if its first forward, of `given` tokens, holds the prompt.

        LongRoPE models drop their cache at the first prompt beyond their short range, and where they outgrow it later.
        """
        if self.end is not None and given >= self.end:
            self.end_prompt()
            self.end = given
            self.begin(cache)

    def end_prompt(self) -> None:
        """Leave the cache to loops of the user's own."""
        for layer in rocketkv_layers(self.cache):
            layer.speculative = False
            layer.prompt_end = None


def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Run the model's own `generate`, told where the prompt ends; stands in its place on a patched model.

    The cache is made here, so that every layer evicts inside its own prefill call, and counted at the end.
    """
    state = _state_of(model)
    own: Any = type(model)
    stock: Callable[..., Any] = functools.partial(own.generate, model)
    if state is None:
        return stock(*args, **kwargs)
    stock = state.former_generate or stock
    decoder, _ = find_decoder(model)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        _refuse_empty_rows(mask)
    kwargs, cache = _given_cache(kwargs)
    if cache is None and _uses_dynamic_cache(model, args, kwargs):
        cache = kwargs[CACHE_ARGUMENT] = RocketKVCache(decoder.config, state.config)
    elif cache is not None and _convertible(cache):
        compress_layers(cache, state.config, decoder.config)
    speculative = _speculative(model, args, kwargs)
    croppable = speculative or bool(_setting(model, args, kwargs, "is_assistant"))
    running = _Generation(_prompt_end(args, kwargs), speculative, croppable)
    if isinstance(cache, RocketKVCache) or rocketkv_layers(cache):
        running.begin(cache)
    # An assistant that is the model itself generates within this call.
    outer, state.recorded.running = state.running, running
    state.recorded.stats = None
    try:
        output = stock(*args, **kwargs)
    finally:
        state.recorded.running = outer
        running.end_prompt()
    state.recorded.stats = None if running.cache is None else cache_stats(running.cache)
    return output


def _given_cache(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return a copy of the arguments, in which `cache` has the name that this transformers knows, and the cache.

    The old name is left to transformers, which takes it too and says that it will not for ever.
    """
    given = {name: kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None}
    kwargs = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
    if CACHE_ARGUMENT != "cache" and "cache" in given:
        given = {CACHE_ARGUMENT: given["cache"]}
    return kwargs | given, next(iter(given.values()), None)


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in the place of a patched model's `generate_batch`.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "continuous batching (generate_batch) keeps a paged cache of its own, which RocketKV does not compress; call "
        "rocketkv.unpatch(model) before it, or use model.generate"
    )


def _setting(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Return a generation setting as `generate` will find it: argument, then its config, then the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    found = getattr(given, name, None)
    return getattr(model.generation_config, name, None) if found is None else found


def _uses_dynamic_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether to make the cache here; where `generate` is asked for a kind by name it makes its own."""
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
