"""`patch` and `unpatch` of a transformers model.

All state of a patch is stored on the patched model; with transformers, only the name `rocketkv` is registered.
"""

import copy
import functools
import os
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from ..config import RocketKVConfig, make_config
from ..state.monitor import OnStep, refuse_static
from ..state.stats import CacheStats
from .attention import IMPLEMENTATION, NAME, PATCH, rocketkv_attention, rocketkv_mask
from .cache import RocketKVCache
from .chat import ChatMarks, chat_marks
from .compiled import CompiledStep
from .forward import DecoderForward, ForwardHook
from .generate import generate, refuse_continuous_batching
from .models import CACHE_ARGUMENT, find_decoder, refuse_unsupported
from .patch_state import STATE, PatchState, state_of
from .tuned import read_settings
from .turns import check_prompt_length

_CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching")


class PatchHandle:
    """A patched model: its settings and its last generation. As a context manager it undoes the patch.

    Attributes:
        model: the patched model.
    """

    def __init__(
        self,
        model: nn.Module,
        state: PatchState,
        before: tuple[RocketKVConfig, ChatMarks | None, OnStep | None] | None = None,
    ) -> None:
        self.model = model
        self._state = state
        self._before = before

    @property
    def config(self) -> RocketKVConfig:
        """The settings in force."""
        return self._state.config

    def stats(self) -> CacheStats:
        """Return tokens and bytes of the last finished `generate` of any thread; its cache may be gone.

        If several threads generate at once, use `cache.stats()` of each thread's cache.

        Raises:
            ValueError: no `generate` has ended, or the last one had no RocketKVCache.
        """
        if self._state.finished is None:
            raise ValueError("no generate of this model has ended; in a custom loop ask cache.stats()")
        if self._state.finished.stats is None:
            raise ValueError(
                "the last generate of this model had no RocketKVCache: use_cache=False, or a cache of another kind"
            )
        return self._state.finished.stats

    @property
    def cache(self) -> Any:
        """The cache of the last finished `generate` of any thread, to continue from or to snapshot.

        It has all tokens of the sequence except for the last generated one. The patch keeps it alive until the next
        `generate`, `release()` or `unpatch`. It does not keep a cache alive that the caller has: one passed to
        `generate`, or returned by it (`return_dict_in_generate=True`).

        Raises:
            ValueError: no `generate` has ended, or its cache is gone.
        """
        finished = self._state.finished
        cache = None if finished is None else finished.cache()
        if cache is None:
            raise ValueError(
                "there is no cache: no generate of this model has ended, it had none, it was released, or it was "
                "yours and you have dropped it"
            )
        return cache

    def release(self) -> None:
        """Free the cache of the last `generate`, unless there are other references to it."""
        self._state.release()

    @torch.inference_mode()
    def warm_up(self, prompt_length: int, batch_size: int = 1) -> None:
        """Run a prompt of arbitrary tokens and a decode step, so that no user's first token waits for a compilation.

        The kernels are compiled for the budget's split, not for lengths. Triton keeps them on the disk.

        Args:
            prompt_length: tokens of a usual prompt.
            batch_size: rows of a usual batch.

        Raises:
            TypeError: `prompt_length` is not an int.
            ValueError: it is less than 1.
        """
        check_prompt_length(prompt_length)
        model = _outermost(self.model)
        decoder, _ = find_decoder(model)
        embeddings: Any = decoder.get_input_embeddings()
        token = torch.arange(prompt_length, device=embeddings.weight.device) % embeddings.num_embeddings
        prompt = token.repeat(batch_size, 1)
        cache = RocketKVCache(model.config, self.config, prompt_length=prompt_length)
        for ids in (prompt, prompt[:, :1]):
            decoder(ids, use_cache=True, **{CACHE_ARGUMENT: cache})

    def compile_step(self, **options: Any) -> CompiledStep:
        """Return the model's forward, compiled for the decode steps of a custom loop with a static cache.

        Call it in place of the model, from the prompt on: forwards other than decode steps of a static cache run
        eagerly. Use a `RocketKVCache` with a `decode_capacity` and preferably its `prompt_length`; rows of different
        lengths need their `position_ids`. With CUDA graphs, a step overwrites the previous step's output.

        Args:
            **options: options of `torch.compile`; by default `mode="reduce-overhead"` (CUDA graphs) and
                `fullgraph=True`.
        """
        return CompiledStep(self.model, self._state.warned, **options)

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is None:
            unpatch(self.model)
        else:
            self._state.config, self._state.chat, self._state.on_step = self._before

    def __repr__(self) -> str:
        return f"PatchHandle({type(self.model).__name__}, {self.config})"


def patch(
    model: nn.Module,
    config: RocketKVConfig | str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    on_step: OnStep | None = None,
    **fields: Any,
) -> PatchHandle:
    """Compress a model's KV cache from now on: `model.generate(...)`, pipelines and loops work as before.

    Patching again changes the settings. Only full-attention layers are compressed; sliding-window and linear layers of
    hybrid models do not change. Caches that are not dynamic run exactly as without the patch, with a warning. Under
    your own `torch.compile`, decode steps with `decode_capacity` are compiled, but do not check for a full buffer
    (`handle.compile_step()` does); a cache that grows runs eagerly.

    Args:
        model: a causal language model of transformers, bare or wrapped (PEFT).
        config: the settings; the path of a file of `rocketkv tune`, made for this model; or None for the defaults.
        tokenizer: the model's tokenizer; its chat template finds messages for `protect="system"` and `fair_shares`.
        on_step: called with a `rocketkv.StepReport`, the missed mass of every head, after each decode
            step, inside the forward. It waits for the device only if the callback does. Copies of the model have no
            callback. A `rocketkv.Trace` records the tokens kept and read.
        **fields: fields of `RocketKVConfig` that replace those of `config` or of the file.

    Returns:
        A handle. The end of `with rocketkv.patch(model, ...):` restores the former state: no patch, or the earlier
        settings.

    Raises:
        TypeError: `model` is not a transformers model, `on_step` cannot be called, there is no such field, or a field
            has the wrong type.
        ValueError: a field has an impossible value, the model cannot be compressed, messages cannot be found in its
            prompts, `on_step` is for a static cache, or the file is damaged or was made for another model; the message
            says why.
        FileNotFoundError: there is no such file.

    Examples:
        >>> import rocketkv, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2))
        >>> prompt = torch.randint(3, 1000, (1, 2000))
        >>> handle = rocketkv.patch(model, token_budget=256)
        >>> model.generate(prompt, max_new_tokens=5).shape
        torch.Size([1, 2005])
        >>> handle.stats().layers[0].tokens_seen
        2004
        >>> handle.stats().layers[0].tokens_stored < 1500
        True
        >>> rocketkv.unpatch(model)

        For a while, with other settings:

        >>> with rocketkv.patch(model, token_budget=128) as handle:
        ...     tokens = model.generate(prompt, max_new_tokens=5)
    """
    outer = _outermost(model)
    settings = make_config(read_settings(config, outer) if isinstance(config, (str, os.PathLike)) else config, fields)
    if on_step is not None:
        if not callable(on_step):
            raise TypeError(f"on_step must be a function of a StepReport, or None; got {type(on_step).__name__}")
        refuse_static(settings)
    chat = _chat_marks(settings, tokenizer)
    state = state_of(outer)
    if state is not None:
        former = state.config, state.chat, state.on_step
        state.config, state.chat, state.on_step = settings, chat, on_step
        return PatchHandle(model, state, former)
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
    state = PatchState(settings, chat, _take_configs(outer), on_step=on_step)
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
        module.__dict__[PATCH] = state
    state.hook = decoder.register_forward_pre_hook(ForwardHook(state), with_kwargs=True)
    state.former_forward = decoder.__dict__.get("forward")
    decoder.__dict__["forward"] = DecoderForward(decoder, state.former_forward, state.warned)
    replaced: dict[str, Any] = {"generate": functools.partial(generate, outer, state)}
    replaced |= dict.fromkeys(_CONTINUOUS_BATCHING, refuse_continuous_batching)
    state.installed = {name: method for name, method in replaced.items() if hasattr(outer, name)}
    state.former = {name: outer.__dict__[name] for name in state.installed if name in outer.__dict__}
    outer.__dict__.update(state.installed)
    outer.__dict__[STATE] = state
    return PatchHandle(model, state)


def _chat_marks(config: RocketKVConfig, tokenizer: Any) -> ChatMarks | None:
    """Return the marks of the tokenizer's chat template, or None if there is no tokenizer and none is needed."""
    if tokenizer is not None:
        return chat_marks(tokenizer)  # also for caches with other settings
    if config.protect == "system" or config.fair_shares:
        wanted = "protect='system'" if config.protect == "system" else "fair_shares=True"
        raise ValueError(f"{wanted} finds messages by the chat template: give patch(..., tokenizer=...), or ranges")
    return None


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the model's outputs are as before, bit for bit. Does nothing to a model that is not patched.

    Values of its config that were set meanwhile stay. A wrapper installed on `generate` or on the decoder's `forward`
    after `patch` stays, and calls the model's own method.
    """
    outer = _outermost(model)
    state = state_of(outer)
    if state is None:
        return
    decoder, attentions = find_decoder(outer)
    _give_configs_back(state.former_configs)
    for module in attentions:
        if IMPLEMENTATION in module.__dict__:
            delattr(module, IMPLEMENTATION)
            del module.__dict__[PATCH]
    if state.hook is not None:
        state.hook.remove()
    if isinstance(decoder.__dict__.get("forward"), DecoderForward):  # if wrapped since, it stays and works
        del decoder.__dict__["forward"]
        if state.former_forward is not None:
            decoder.__dict__["forward"] = state.former_forward
    for name, method in state.installed.items():
        if outer.__dict__.get(name) is method:  # not if wrapped or replaced since
            del outer.__dict__[name]
            outer.__dict__.update({name: state.former[name]} if name in state.former else {})
    del outer.__dict__[STATE]
    state.release()


def _take_configs(model: PreTrainedModel) -> list[tuple[nn.Module, PretrainedConfig]]:
    """Replace a model's configurations by copies, since other models may share them, and return the former ones."""
    found = ((module, module.__dict__.get("config")) for module in model.modules())
    former = [(module, config) for module, config in found if isinstance(config, PretrainedConfig)]
    copies: dict[int, Any] = {}  # modules that shared a configuration share its copy
    for module, config in former:
        module.__dict__["config"] = copy.deepcopy(config, copies)
    return former


def _give_configs_back(former: list[tuple[nn.Module, PretrainedConfig]]) -> None:
    """Undo `_take_configs`, but keep values that were set in the meantime."""
    for module, config in former:
        for name, value in module.__dict__["config"].__dict__.items():
            kept = name.startswith("_attn_implementation") or isinstance(value, PretrainedConfig)
            if not kept and (name not in config.__dict__ or config.__dict__[name] != value):
                config.__dict__[name] = value
    for module, config in former:
        module.__dict__["config"] = config


def _outermost(model: Any) -> PreTrainedModel:
    """Return the outermost transformers model in a module, which may wrap it."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise TypeError(f"model must be a transformers model or hold one, got {type(model).__name__}")
