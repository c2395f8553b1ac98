"""The cache class for transformers: full-attention layers are compressed, all others are stock.

Letters: B batch, H query heads, Hkv KV heads, D head dim, n tokens of a forward, W observation window.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..config import RocketKVConfig, make_config
from ..dispatch import Workspaces
from ..state.missed import last_missed
from ..state.monitor import Monitor
from ..state.snapshot import object_state, set_object_state
from ..state.stats import CacheStats, LayerStats, live_bytes
from .chat import ChatMarks, row_marks
from .layer import RocketKVLayer, rocketkv_layers
from .layer_state import LayerSnapshot
from .masks import LazyMask
from .turns import check_prompt_length


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a cache at one time, from `RocketKVCache.snapshot`, for `RocketKVCache.rollback`.

    Attributes:
        cache: weak reference to the cache.
        life: identifies the cache's life, from one `reset` to the next.
        layers: each layer of the cache, with its state.
    """

    cache: "weakref.ref[RocketKVCache]"
    life: object
    layers: tuple[tuple[Any, Any], ...]

    def tensors(self) -> Iterator[Tensor]:
        """Iterate over the tensors that the snapshot keeps alive; some may share a storage."""
        for _, state in self.layers:
            yield from state.tensors() if isinstance(state, LayerSnapshot) else _tensors_in(state)


def _tensors_in(state: dict[str, Any]) -> Iterator[Tensor]:
    """Iterate over the tensors in the state of a stock layer."""
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors_in(value)


class RocketKVCache(DynamicCache):
    """A cache for one batch of sequences: full-attention layers are compressed, all others are stock.

    A patched model's `generate` creates one per call. Pass your own as `cache` to keep it over turns, or to set the
    prompt's length in a custom loop, so that stage 1 runs inside the prefill.

    Args:
        model_config: the model's configuration (`model.config`).
        config: the compression's settings, or None for the defaults.
        prompt_length: tokens of the first prompt, padding included; None runs stage 1 at the first decoded token.
        **fields: fields of `RocketKVConfig` that replace those of `config`.

    Attributes:
        config: the compression's settings.

    Raises:
        TypeError: `config` is not a RocketKVConfig, there is no such field, or `prompt_length` is not an int.
        ValueError: a field, or `prompt_length`, has an impossible value, or the settings name a layer that the model
            does not have.

    Examples:
        >>> import rocketkv, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2))
        >>> context, question = torch.randint(3, 1000, (1, 900)), torch.randint(3, 1000, (1, 20))
        >>> with rocketkv.patch(model), torch.inference_mode():
        ...     cache = rocketkv.RocketKVCache(model.config, token_budget=128, prompt_length=900)
        ...     _ = model(context, cache=cache)
        ...     after_context = cache.snapshot()
        ...     cache.begin_turn()
        ...     answer = model(question, cache=cache).logits[:, -1].argmax(-1)
        ...     cache.rollback(after_context)  # ask something else
        >>> cache.get_seq_length()
        900
        >>> cache.stats().layers[0].tokens_stored < 900
        True
    """

    def __init__(
        self,
        model_config: PretrainedConfig,
        config: RocketKVConfig | None = None,
        *,
        prompt_length: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(config=model_config)
        self._life = object()
        self.config = make_config(config, fields)
        compress_layers(self, self.config)
        if prompt_length is not None:
            check_prompt_length(prompt_length)
            begin_prompt(self, prompt_length)

    def stats(self) -> CacheStats:
        """Return the tokens and bytes of every layer."""
        return cache_stats(self)

    def positions(self) -> dict[int, Tensor]:
        """Return where in the sequence the stored tokens of compressed layers are.

        Returns:
            [B, Hkv, N] int32 by layer number, -1 for none; a copy.

        Raises:
            ValueError: a prompt is open.
        """
        stores = {layer.number: layer.store for layer in rocketkv_layers(self)}
        return {number: store.decoding.positions[:, :, : store.stored].clone() for number, store in stores.items()}

    def begin_turn(self, prompt_length: int | None = None) -> None:
        """Begin a turn: the next forward starts a prompt, and stage 1 runs again at the prompt's end.

        Without it, a forward of several tokens after the prompt's end verifies a draft and evicts nothing.
        `model.generate` begins turns by itself.

        Args:
            prompt_length: tokens of the prompt, padding included, if it spans several forwards; None for the tokens of
                the next forward.

        Raises:
            TypeError: `prompt_length` is not an int.
            ValueError: it is less than 1.
        """
        for layer in rocketkv_layers(self):
            layer.begin_turn(prompt_length)

    def snapshot(self) -> Snapshot:
        """Return the present state, for `rollback`; possible between any two forwards.

        Use it for many questions on one context, or for drafts that may be rejected. It copies no keys and values of
        compressed or sliding-window layers. While the snapshot lives, slots are copied before they are overwritten.
        """
        states = tuple((layer, _state(layer)) for layer in self.layers)
        return Snapshot(weakref.ref(self), self._life, states)

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to a snapshot exactly and without a forward, any number of times and in any order.

        It restores tokens that stage 1 has evicted since then. A static cache returns to the buffers of the snapshot,
        at the same addresses.

        Raises:
            TypeError: `snapshot` is not a `Snapshot`.
            ValueError: the snapshot is of another cache, or was taken before this one was reset.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"rollback goes back to what snapshot() returned, got {type(snapshot).__name__}")
        if snapshot.cache() is not self:
            raise ValueError(
                "this snapshot is of another cache (a copy of a cache is another one): give rollback() one that this "
                "cache's own snapshot() returned"
            )
        if snapshot.life is not self._life:
            raise ValueError("this snapshot was taken before the cache was reset: take one after it")
        self.layers[:] = [layer for layer, _ in snapshot.layers]
        for layer, state in snapshot.layers:
            if isinstance(layer, RocketKVLayer):
                layer.restore(state)
            else:
                set_object_state(layer, state, written=_writes(layer))

    def reset(self) -> None:
        """Drop everything; snapshots become invalid."""
        super().reset()  # type: ignore[no-untyped-call]  # transformers does not say that it returns nothing
        self._life = object()


def _state(layer: Any) -> Any:
    """Return the state of one layer, for the cache's snapshot."""
    return layer.snapshot() if isinstance(layer, RocketKVLayer) else object_state(layer, written=_writes(layer))


def _writes(layer: Any) -> bool:
    """Whether a stock layer writes into its tensors; layers of only keys and values replace them."""
    return type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)


def convertible(cache: Any) -> bool:
    """Whether compressed layers can replace a cache's empty layers."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def compress_layers(cache: DynamicCache, config: RocketKVConfig, model_config: PretrainedConfig | None = None) -> None:
    """Replace the empty full-attention layers of a DynamicCache by compressed ones, in place; leave all others.

    Args:
        cache: the cache.
        config: the compression's settings, with their exceptions by layer.
        model_config: the model's configuration, for a cache that creates its layers lazily; such a cache keeps all
            tokens of sliding-window layers too.

    Raises:
        ValueError: the settings name a layer that the model does not have or that cannot be compressed, or leave no
            layer to compress.
    """
    if rocketkv_layers(cache):
        return  # already done: the layers that are plain now stay plain
    lazy = not cache.layers and model_config is not None
    if lazy:
        cache.layers.extend(DynamicCache(config=model_config).layers)
    settings = config.by_layer(len(cache.layers))
    workspaces: dict[RocketKVConfig, Workspaces] = {}  # layers with the same settings share one
    empty = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer and not layer.is_initialized]
    for i in empty:
        own = settings[i]
        if own is not None:
            cache.layers[i] = RocketKVLayer(own, workspaces.setdefault(own, Workspaces()), number=i)
    if empty:
        _check_exceptions(cache, config)
    if config.watched:
        add_monitor(rocketkv_layers(cache))
    if lazy:
        keep_whole(cache)


def _check_exceptions(cache: DynamicCache, config: RocketKVConfig) -> None:
    """Refuse budgets of layers that are not compressed, and exceptions that leave no layer to compress."""
    for layer, _ in config.layer_budgets:  # type: ignore[misc]  # stored as pairs
        if not isinstance(cache.layers[layer], RocketKVLayer):
            kind = type(cache.layers[layer]).__name__
            raise ValueError(f"layer_budgets names layer {layer}, a {kind} that is not compressed: leave it out")
    if config.skip_layers and not rocketkv_layers(cache):
        raise ValueError("skip_layers leaves no layer to compress: name fewer, or do not patch the model")


def add_monitor(layers: list[RocketKVLayer]) -> None:
    """Give the layers of a cache a monitor."""
    if layers:
        monitor = Monitor(layers[0].config, [layer.number for layer in layers])
        for layer in layers:
            layer.monitor = monitor


def begin_prompt(cache: Any, end: int, *, speculative: bool = False, drafts: bool = False) -> None:
    """Set where the next prompt of a cache ends, and whether forwards verify drafts.

    A single token after decoded ones is no prompt: `generate` continues from the last token that it returned.

    Args:
        cache: the cache.
        end: tokens of the sequence when the prompt ends.
        speculative: whether forwards of several tokens verify a draft.
        drafts: whether it is an assistant's cache, which after its prompt reads the model's corrections of its drafts.
    """
    for layer in rocketkv_layers(cache):
        seen = layer.tokens_seen
        catches_up = drafts and layer.store.closed
        begins = end > seen + 1 or not layer.store.closed  # an open prompt continues, even with a single token
        layer.prompt_end = end if begins and not catches_up else None
        layer.speculative = speculative or catches_up


def mark_prompt(cache: Any, ids: Tensor | None, mask: Any, chat: ChatMarks | None) -> None:
    """Mark the tokens of a prompt, or of a chunk of one, in the layers of a cache before their forward.

    Args:
        cache: the cache.
        ids: [B, n] token ids of the forward, or its embeddings [B, n, hidden], or None.
        mask: the forward's attention mask [B, tokens], a tensor, a `LazyMask`, or a dict of them; or None.
        chat: marks of the tokenizer's chat template, or None.

    Raises:
        ValueError: the settings need the messages, and there is no chat template or no token ids to find them.
    """
    layers = rocketkv_layers(cache)
    if not layers or not layers[0].config.marks_prompts or ids is None or not layers[0].prompt_part(ids.shape[1]):
        return
    config = layers[0].config
    by_chat = config.protect == "system" or config.fair_shares
    if by_chat and chat is None:
        raise ValueError(
            "protect='system' and fair_shares find messages by a chat template: rocketkv.patch(model, ..., "
            "tokenizer=tokenizer)"
        )
    if ids.is_floating_point():
        if by_chat:
            raise ValueError("messages cannot be found in inputs_embeds; give token ids, or ranges to protect")
        ids = ids.new_zeros(ids.shape[:2], dtype=torch.long)
    first, store = layers[0], layers[0].store
    earlier = None if first.prompt_ids is None else first.prompt_ids
    first.prompt_ids = ids if earlier is None else torch.cat((earlier, ids), dim=1)
    start = store.seen - (0 if earlier is None else earlier.shape[1])
    padding = _padding_before(mask if start == 0 else None, ids.shape[0])
    before = None if start == 0 else store.marks
    settings: dict[str, Any] = {"protect": config.protect, "fair_shares": config.fair_shares, "chat": chat}
    marks = tuple(
        row_marks(row[skipped:], None if before is None else before[i], start + skipped, **settings)
        for i, (row, skipped) in enumerate(zip(first.prompt_ids.tolist(), padding, strict=True))
    )
    for layer in layers:
        layer.store.marks = marks


def _padding_before(mask: Any, rows: int) -> list[int]:
    """Return the number of padding slots before each row's first token, from a forward's mask."""
    # For a static cache, masks are created before the forward, in hybrid models one for each kind of layer.
    masks = mask.values() if isinstance(mask, dict) else (mask,)
    for each in masks:
        held = each.padding if isinstance(each, LazyMask) else each
        if isinstance(held, Tensor) and held.dim() == 2:
            found: list[int] = held.to(torch.int).argmax(-1).tolist()
            return found
    return [0] * rows


def make_croppable(cache: Any) -> None:
    """Prepare an empty cache for drafts, whose rejected tokens are cropped.

    Before transformers 5.16 a full sliding-window layer cannot be cropped, so it must not slide.
    """
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    else:
        keep_whole(cache)


def keep_whole(cache: Any) -> None:
    """Let the empty sliding-window layers of a cache keep all tokens; masks hide tokens outside of the window."""
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            cache.layers[i] = DynamicLayer()


def cache_stats(cache: Any) -> CacheStats:
    """Return the tokens and bytes of every layer of a cache; layers that are not compressed count as stock."""
    layers = []
    workspaces = {id(space): space for layer in rocketkv_layers(cache) for space in layer.workspaces.buffers.values()}
    for layer in cache.layers:
        if isinstance(layer, RocketKVLayer):
            layers.append(layer.stats())
        else:
            layers.append(_stock_stats(layer))
    buffers = [tensor for space in workspaces.values() for tensor in space.tensors().values()]
    monitor = next((layer.monitor for layer in rocketkv_layers(cache) if layer.monitor is not None), None)
    return CacheStats(
        tuple(layers),
        sum(live_bytes(tensor) for tensor in buffers),
        missed=tuple(last_missed(layer.store) if isinstance(layer, RocketKVLayer) else None for layer in cache.layers),
        audits=() if monitor is None else tuple(monitor.audits),
    )


def _stock_stats(layer: Any) -> LayerStats:
    """Return the tokens and bytes of a stock layer; linear-attention layers have states, not keys and values."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    others = [value for name, value in vars(layer).items() if name not in ("keys", "values")]
    states = [state for value in others for state in (value.values() if isinstance(value, dict) else [value])]
    other_bytes = sum(live_bytes(state) for state in states if isinstance(state, Tensor))
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
        device = next((str(state.device) for state in states if isinstance(state, Tensor)), None)
        return LayerStats(compressed=False, other_bytes=other_bytes, device=device)
    size = keys.numel() * keys.itemsize + values.numel() * values.itemsize
    nominal = 2 * (keys.numel() + values.numel())
    return LayerStats(
        compressed=False,
        tokens_seen=layer.get_seq_length(),
        tokens_stored=keys.shape[2],
        key_bytes=live_bytes(keys),
        value_bytes=live_bytes(values),
        other_bytes=other_bytes,
        device=str(keys.device),
        full_bytes=size,
        step_bytes=size,
        dense_step_bytes=size,
        nominal_step_bytes=nominal,
        nominal_dense_step_bytes=nominal,
    )
