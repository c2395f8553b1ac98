"""`generate` of a patched model: it sets where the prompt ends, and records the finished generation.

All state of a patch is stored on the patched model.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NoReturn

from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from .cache import RocketKVCache, begin_prompt, cache_stats, compress_layers, convertible, make_croppable
from .compiled import RoomCheck, many_forwards, say_uncompiled, uncompiled_reason
from .layer import rocketkv_layers
from .models import CACHE_ARGUMENT, find_decoder, given_cache, refuse_empty_rows
from .patch_state import Finished, PatchState, no_cache, state_of


class Generation:
    """One call of `generate`: the end of its prompt, and its cache once it exists.

    Args:
        end: tokens of the sequence when the prompt ends, or None if there is no prompt.
        speculative: whether forwards of several tokens verify drafts.
        drafts: whether the model is the assistant that writes the drafts.
    """

    def __init__(self, end: int | None, speculative: bool, drafts: bool) -> None:
        self.end = end
        self.speculative = speculative
        self.drafts = drafts
        self.cache: Any = None
        self.compiles = False  # whether transformers may compile the decode steps

    def begin(self, cache: Any) -> None:
        """Set where a compressed cache's prompt ends, before its first forward of this call."""
        self.cache = cache
        if self.end is not None:
            begin_prompt(cache, self.end, speculative=self.speculative, drafts=self.drafts)
        if self.speculative or self.drafts:
            make_croppable(cache)

    def begin_anew(self, cache: Any, given: int) -> None:
        """Switch to another cache if its first forward, of `given` tokens, has the whole prompt.

        LongRoPE models drop their cache at the first prompt beyond their short range, or when a generation grows beyond
        it.
        """
        if self.end is not None and given >= self.end:
            self.end_prompt()
            self.end = given
            self.begin(cache)

    def end_prompt(self) -> None:
        """Prepare the cache for a custom loop after this call."""
        for layer in rocketkv_layers(self.cache):
            layer.speculative = False
            layer.prompt_end = None


def generate(model: PreTrainedModel, state: PatchState, /, *args: Any, **kwargs: Any) -> Any:
    """Run the model's own `generate` with a compressed cache; installed in its place on a patched model.

    It creates the cache, so that every layer evicts inside its own prefill call, and records its statistics at the end.
    After `unpatch`, a wrapper may still call this function: then it only runs the model's own `generate`.
    """
    own: Any = type(model)
    stock: Callable[..., Any] = state.former.get("generate") or own.generate.__get__(model)
    if state_of(model) is not state:
        return stock(*args, **kwargs)
    decoder, _ = find_decoder(model)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        refuse_empty_rows(mask)
    kwargs, cache = given_cache(kwargs)
    held = cache is None or _held(state, cache)
    if state.running is None:
        state.release()
    if cache is None and _uses_dynamic_cache(model, args, kwargs):
        cache = kwargs[CACHE_ARGUMENT] = RocketKVCache(decoder.config, state.config)
    elif cache is not None and convertible(cache):
        compress_layers(cache, state.config, decoder.config)
    speculative = _speculative(model, args, kwargs)
    drafts = bool(_setting(model, args, kwargs, "is_assistant"))
    running = Generation(_prompt_end(args, kwargs), speculative, drafts)
    if isinstance(cache, RocketKVCache) or rocketkv_layers(cache):
        running.begin(cache)
        args, kwargs = _watched(model, args, kwargs, running, state.warned)
    # An assistant that is the model itself generates within this call.
    outer, state.thread.running = state.running, running
    try:
        with many_forwards() if running.compiles else nullcontext():
            output = stock(*args, **kwargs)
    finally:
        state.thread.running = outer
        running.end_prompt()
    finished = _finished(running.cache, held and not _returned(output, running.cache))
    with state.lock:
        state.finished = finished
    return output


def _finished(cache: Any, held: bool) -> Finished:
    """Return the record of a generation; `held` keeps its cache alive."""
    if cache is None:
        return Finished(None, no_cache, held=False)
    return Finished(cache_stats(cache), (lambda: cache) if held else weakref.ref(cache), held)


def _held(state: PatchState, cache: Any) -> bool:
    """Whether the patch keeps this cache alive as the cache of the last generation."""
    return state.finished is not None and state.finished.held and state.finished.cache() is cache


def _returned(output: Any, cache: Any) -> bool:
    """Whether the caller of `generate` gets the cache with the output."""
    return isinstance(output, Mapping) and any(value is cache for value in output.values())


def _watched(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], running: Generation, warned: set[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with which `generate` compiles decode steps only if possible, and checks for a full buffer.

    Args:
        model: the model.
        args: the call's positional arguments.
        kwargs: its keyword arguments.
        running: the generation, with a compressed cache.
        warned: reasons already warned of, which are not repeated.
    """
    if all(layer.config.decode_capacity is None for layer in rocketkv_layers(running.cache)):
        return args, kwargs
    reason = uncompiled_reason(running.cache)
    if _speculative(model, args, kwargs):
        reason = "drafts are verified, several tokens in one forward"
    elif _setting(model, args, kwargs, "prefill_chunk_size") is not None:
        reason = "prefill_chunk_size would have the chunks of the prompt compiled too"
    if reason is not None:
        say_uncompiled(reason, warned)
        return args, kwargs | {"disable_compile": True}
    running.compiles = True
    given = kwargs.get("logits_processor", args[2] if len(args) > 2 else None)
    processors = LogitsProcessorList([*(given or ()), RoomCheck(running)])
    if len(args) > 2:
        return (*args[:2], processors, *args[3:]), kwargs
    return args, kwargs | {"logits_processor": processors}


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """Replace `generate_batch` of a patched model.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "continuous batching (generate_batch) keeps a paged cache of its own, which RocketKV does not compress; call "
        "rocketkv.unpatch(model) before it, or use model.generate"
    )


def _setting(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Return a generation setting in the order of `generate`: argument, its config, the model's config."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    found = getattr(given, name, None)
    return getattr(model.generation_config, name, None) if found is None else found


def _uses_dynamic_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether to create the cache here; `generate` creates a kind that is requested by name."""
    use_cache = _setting(model, args, kwargs, "use_cache")
    return use_cache is not False and _setting(model, args, kwargs, "cache_implementation") is None


def _speculative(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `generate` will verify drafts (assisted decoding, prompt lookup, early exit)."""
    names = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
    return kwargs.get("assistant_model") is not None or any(_setting(model, args, kwargs, name) for name in names)


def _prompt_end(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the tokens of the sequence when the prompt ends, or None if there is no prompt."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[1]  # includes earlier turns, even if only the new tokens are passed
    for inputs in (
        kwargs.get("inputs_embeds"),
        kwargs.get("input_ids"),
        kwargs.get("inputs"),
        args[0] if args else None,
    ):
        if isinstance(inputs, Tensor):
            return inputs.shape[1]
    return None
