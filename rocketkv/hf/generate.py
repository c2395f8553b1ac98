"""`generate` of a patched model: it tells the cache where the prompt ends, and records the finished generation.

All state of a patch lives on the model that it patches.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LogitsProcessorList, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..config import RocketKVConfig
from ..state.monitor import OnStep
from ..state.stats import CacheStats
from .cache import RocketKVCache, begin_prompt, cache_stats, compress_layers, make_croppable, rocketkv_layers
from .chat import ChatMarks
from .compiled import RoomCheck, many_forwards, say_uncompiled, uncompiled_reason
from .models import CACHE_ARGUMENT, find_decoder, given_cache

STATE = "_rocketkv"  # attribute of a patched model that holds its PatchState


@dataclass(frozen=True, eq=False)
class Finished:
    """A generation that has ended.

    Attributes:
        stats: of its cache, or None if it had none.
        cache: returns the cache, or None once it is gone.
        held: whether `cache` keeps it alive.
    """

    stats: CacheStats | None
    cache: Callable[[], Any]
    held: bool


@dataclass(eq=False)
class PatchState:
    """The patch of a model: enough to run it and to undo it. It is copied and pickled with the model.

    Attributes:
        config: the settings in force.
        chat: the chat template's marks, or None where no tokenizer was given.
        former_configs: modules and the configurations that they had.
        former: methods that the model had in its own `__dict__`, by name.
        installed: methods that the patch put there, by name.
        former_forward: the decoder's own `forward` in its `__dict__`, or None.
        hook: the decoder's forward pre-hook.
        warned: warnings that were given.
        on_step: callback for reports of decode steps, or None.
        finished: the last generation that ended, in any thread.
        thread: the running generation of each thread.
        lock: of `finished`, which threads replace.
    """

    config: RocketKVConfig
    chat: ChatMarks | None = None
    former_configs: list[tuple[nn.Module, PretrainedConfig]] = field(default_factory=list)
    former: dict[str, Any] = field(default_factory=dict)
    installed: dict[str, Any] = field(default_factory=dict)
    former_forward: Callable[..., Any] | None = None
    hook: RemovableHandle | None = None
    warned: set[str] = field(default_factory=set)
    on_step: OnStep | None = None
    finished: Finished | None = None
    thread: threading.local = field(default_factory=threading.local)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process and its threads."""
        return self.__dict__ | {"thread": None, "lock": None, "on_step": None, "finished": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with no generation and no callback."""
        self.__dict__.update(state, thread=threading.local(), lock=threading.Lock())

    @property
    def running(self) -> "Generation | None":
        """The generation that runs in this thread."""
        return getattr(self.thread, "running", None)

    def release(self) -> None:
        """Drop the reference to the last generation's cache; its stats stay."""
        with self.lock:
            if self.finished is not None and self.finished.held:
                self.finished = Finished(self.finished.stats, _gone, held=False)


def _gone() -> None:
    return None


def state_of(model: nn.Module) -> PatchState | None:
    """Return the patch of a model, or None if it is not patched."""
    return model.__dict__.get(STATE)


def convertible(cache: Any) -> bool:
    """Whether a cache's empty layers can be replaced by compressed ones."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def refuse_empty_rows(mask: Tensor) -> None:
    """Refuse a 2D attention mask [B, tokens] with a row that has no token.

    Raises:
        ValueError: a row is only padding.
    """
    empty = (mask == 0).all(-1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask must leave every row at least one token, but row {', '.join(map(str, rows))} is only "
            "padding; drop it from the batch or give it a token. If this is the first chunk of a longer prompt, pass a "
            "RocketKVCache with its prompt_length"
        )


class Generation:
    """One call of `generate`: the end of its prompt, and its cache once that is known.

    Args:
        end: tokens of the sequence when the prompt ends, or None if there is no prompt.
        speculative: whether forwards of several tokens verify drafts.
        drafts: whether the model is the assistant that makes the drafts.
    """

    def __init__(self, end: int | None, speculative: bool, drafts: bool) -> None:
        self.end = end
        self.speculative = speculative
        self.drafts = drafts
        self.cache: Any = None
        self.compiles = False  # whether transformers may compile the decode steps

    def begin(self, cache: Any) -> None:
        """Tell a compressed cache where the prompt ends, before its first forward of this call."""
        self.cache = cache
        if self.end is not None:
            begin_prompt(cache, self.end, speculative=self.speculative, drafts=self.drafts)
        if self.speculative or self.drafts:
            make_croppable(cache)

    def begin_anew(self, cache: Any, given: int) -> None:
        """Switch to another cache, if its first forward, of `given` tokens, holds the whole prompt.

        LongRoPE models drop their cache at the first prompt beyond their short range, and when they outgrow it later.
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

    It makes the cache, so that every layer evicts inside its own prefill call, and counts it at the end. After
    `unpatch`, a wrapper around it may still call it: then it is the model's own `generate` alone.
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
        return Finished(None, _gone, held=False)
    return Finished(cache_stats(cache), (lambda: cache) if held else weakref.ref(cache), held)


def _held(state: PatchState, cache: Any) -> bool:
    """Whether the patch keeps this cache alive, as the last generation's."""
    return state.finished is not None and state.finished.held and state.finished.cache() is cache


def _returned(output: Any, cache: Any) -> bool:
    """Whether the caller of `generate` gets the cache with the output."""
    return isinstance(output, Mapping) and any(value is cache for value in output.values())


def _watched(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], running: Generation, warned: set[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments with which `generate` compiles decode steps only if it can, and notices a full static buffer.

    Args:
        model: the model.
        args: the call's positional arguments.
        kwargs: its keyword arguments.
        running: the generation, with a compressed cache.
        warned: reasons already given, which are not repeated.
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
    """Return a generation setting as `generate` looks it up: argument, then its config, then the model's config."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    found = getattr(given, name, None)
    return getattr(model.generation_config, name, None) if found is None else found


def _uses_dynamic_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether to make the cache here; if a kind is asked for by name, `generate` makes it."""
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
