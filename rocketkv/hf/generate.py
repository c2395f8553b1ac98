"""What happens while a patched model generates: its `generate`, told where the prompt ends, and what a call records.

Nothing here keeps state of a model, a sequence or a call: a patch lives on the model it patches.
"""

import functools
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import LogitsProcessorList, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..config import RocketKVConfig
from ..state.monitor import OnStep
from .cache import RocketKVCache, begin_prompt, cache_stats, compress_layers, make_croppable, rocketkv_layers
from .chat import ChatMarks
from .compiled import RoomCheck, many_forwards, say_uncompiled, uncompiled_reason
from .models import CACHE_ARGUMENT, find_decoder, given_cache

STATE = "_rocketkv"  # on the patched model: its PatchState


@dataclass(eq=False)
class PatchState:
    """What `patch` left on a model: enough to run it and to undo it. Copies and pickles with the model."""

    config: RocketKVConfig
    chat: ChatMarks | None = None
    former_configs: list[tuple[nn.Module, PretrainedConfig]] = field(default_factory=list)
    former_generate: Callable[..., Any] | None = None
    former_forward: Callable[..., Any] | None = None
    hook: RemovableHandle | None = None
    warned: set[str] = field(default_factory=set)
    on_step: OnStep | None = None
    recorded: threading.local = field(default_factory=threading.local)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process and its threads."""
        return {name: value for name, value in self.__dict__.items() if name not in ("recorded", "on_step")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing recorded, and report to nobody."""
        self.__dict__.update(state, recorded=threading.local(), on_step=None)

    @property
    def running(self) -> "Generation | None":
        """The generation that runs in this thread."""
        return getattr(self.recorded, "running", None)


def state_of(model: nn.Module) -> PatchState | None:
    """Return what `patch` left on a model, or None where it is not patched."""
    return model.__dict__.get(STATE)


def convertible(cache: Any) -> bool:
    """Whether a cache's empty layers can be replaced by ours."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def refuse_empty_rows(mask: Tensor) -> None:
    """Refuse a 2D attention mask with a row that has no token.

    Raises:
        ValueError: it has one.
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
    """One call of `generate`: where its prompt ends, and the cache that it uses once that is known."""

    def __init__(self, end: int | None, speculative: bool, drafts: bool) -> None:
        self.end = end
        self.speculative = speculative
        self.drafts = drafts
        self.cache: Any = None
        self.compiles = False  # whether transformers may compile the decode steps

    def begin(self, cache: Any) -> None:
        """Tell a cache of ours, before its first forward of this call, where the prompt ends."""
        self.cache = cache
        if self.end is not None:
            begin_prompt(cache, self.end, speculative=self.speculative, drafts=self.drafts)
        if self.speculative or self.drafts:
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
    state = state_of(model)
    own: Any = type(model)
    stock: Callable[..., Any] = functools.partial(own.generate, model)
    if state is None:
        return stock(*args, **kwargs)
    stock = state.former_generate or stock
    decoder, _ = find_decoder(model)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        refuse_empty_rows(mask)
    kwargs, cache = given_cache(kwargs)
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
    outer, state.recorded.running = state.running, running
    state.recorded.stats = None
    try:
        with many_forwards() if running.compiles else nullcontext():
            output = stock(*args, **kwargs)
    finally:
        state.recorded.running = outer
        running.end_prompt()
    state.recorded.stats = None if running.cache is None else cache_stats(running.cache)
    return output


def _watched(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], running: Generation, warned: set[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments so that `generate` compiles decode steps only where it can, and notices the end of a cache.

    Args:
        model: the model.
        args: the call's positional arguments.
        kwargs: the others.
        running: the generation, its cache one of ours.
        warned: reasons that were given before.
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
