"""A compressed layer of a cache: its store, and the path of new keys and values to the attention function.

`update` marks the key tensor that it returns with its layer, and the attention function reads the mark (`layer_of`). So
a call keeps no state of a process or thread, also under `torch.compile`.

Letters: B batch, H query heads, Hkv KV heads, D head dim, n tokens of a forward, W observation window.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..config import RocketKVConfig
from ..core.params import AttentionParams
from ..dispatch import Workspaces, decode_step, eviction_ops, warm_up
from ..state.compress import evict_generated
from ..state.history import History
from ..state.monitor import Monitor
from ..state.stats import LayerStats
from ..state.store import KVStore
from ..static_step import StaticStep, static_step
from ..verify import verify_step
from .layer_state import LayerSnapshot, crop_layer, layer_stats, map_rows, restore_layer, snapshot_of
from .layer_static import ensure_room, step_statically
from .masks import LazyMask
from .prefill import FastAttention, end_prompt, prefill, settle
from .turns import VERIFIES, check_prompt_length, prompt_part

# Attribute of a key tensor that refers to its layer.
_MARK = "rocketkv_layer"


def layer_of(key: Tensor) -> "RocketKVLayer | None":
    """Return the layer whose `update` returned this key tensor, or None for keys of other cache layers."""
    layer: RocketKVLayer | None = getattr(key, _MARK, None)
    if layer is not None:
        setattr(key, _MARK, None)  # a key that outlives the call must not keep the cache alive
    return layer


class RocketKVLayer(CacheLayerMixin):
    """One compressed layer of a cache: transformers calls `update`, and the attention function calls `attend`.

    Lengths reported to transformers count the whole sequence, evicted tokens included, so that positions stay correct.

    Attributes:
        config: the compression's settings.
        number: number of the layer in the model.
        monitor: the monitor of the cache's decode steps, or None.
        store: keys, values and index.
        history: all tokens of the sequence, for multi-turn methods, whose store has one turn's selection; or None.
        prompt_end: tokens of the sequence when the present prompt ends, or None if unknown.
        prompt_tokens: tokens of the longest row up to the last prompt's end, evicted ones included, padding excluded.
        prompt_ids: token ids [B, n] of the present prompt so far, in the cache's first compressed layer; or None.
        turn_begins: whether the next forward begins a turn, even with a single token.
        speculative: whether forwards of several tokens verify a draft; `generate` sets it for assisted decoding.
        armed: whether a patched model's forward is about to use this layer.
        pending: key and value [B, Hkv, n, D] that `update` received and the store does not have yet.
        step: the decode step of a static store, or None in prompts and in stores that grow.
        backend: the backend of decode steps, chosen at the end of each prompt.
        params: the model's attention parameters, from the first forward on; None before.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, config: RocketKVConfig, workspaces: Workspaces | None = None, *, number: int = 0) -> None:
        self.config = config
        self.number = number
        self.monitor: Monitor | None = None
        self.workspaces = workspaces or Workspaces()
        self.store = KVStore()
        self.history = History(config.history_device) if config.keeps_history else None
        self.turn_begins = False
        self.prompt_end: int | None = None
        self.prompt_tokens = 0
        self.prompt_ids: Tensor | None = None
        self.speculative = False
        self.armed = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self.step: StaticStep | None = None
        self.backend = config.backend
        self.params: AttentionParams | None = None

    def __repr__(self) -> str:
        return f"RocketKVLayer(method={self.config.method!r}, seen={self.store.seen}, stored={self.store.stored})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "RocketKVLayer":
        """Copy into tensors that are no inference tensors, so that the copy can be written in any mode."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        with torch.inference_mode(False):
            for name, value in self.__dict__.items():
                setattr(other, name, copy.deepcopy(value, memo))
        return other

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]  # derived from the store
        """The stored keys [B, Hkv, N, D]."""
        return None if self.store.keys is None else self.store.keys[:, :, : self.store.stored]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]  # derived from the store
        """The stored values [B, Hkv, N, Dv]."""
        return None if self.store.values is None else self.store.values[:, :, : self.store.stored]

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]  # derived from the store
        """Whether the layer has any token."""
        return self.store.keys is not None or self.pending is not None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # it depends on the settings, and on the prompt
        """Whether the next forward of one token after the prompt is a static step, which can be compiled."""
        if self.config.decode_capacity is None or self.speculative:
            return False
        return self.step is not None or self.prompt_end is not None

    def steps_statically(self, given: int) -> bool:
        """Whether a forward of `given` tokens is a static step."""
        return given == 1 and self.step is not None and self.prompt_end is None and not self.turn_begins

    def static_clock(self) -> Tensor:
        """Return [1] int64, the tokens of the sequence so far, as counted on the device.

        Raises:
            ValueError: no static step is ready.
        """
        if self.step is None:
            raise ValueError("only a static cache whose prompt is closed has a clock")
        return self.step.clock.long()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Do nothing: shape, dtype and device come from the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the new key and value [B, Hkv, n, D] for the attention function, which appends them.

        Raises:
            ValueError: the model is not patched, or uses the layer twice in one forward.
        """
        if torch.compiler.is_dynamo_compiling() and not self.steps_statically(key_states.shape[2]):
            from .untraced import call_untraced

            return call_untraced(self.update, key_states, value_states)  # type: ignore[no-any-return]  # untyped
        if not self.armed:
            raise ValueError(
                "this RocketKV cache was given to a model that is not patched, or a layer of the model uses it twice "
                "in one forward; call rocketkv.patch(model) before passing a RocketKVCache to it"
            )
        self.armed = False
        if self.pending is not None:
            settle(self)
        self.pending = (key_states, value_states)
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def prompt_part(self, given: int) -> int:
        """Return how many of the next forward's `given` tokens belong to a prompt."""
        seen = self.store.seen
        phase = {"closed": self.store.closed, "begins": self.turn_begins, "verifies": self.speculative}
        return prompt_part(seen, given, self.prompt_end, **phase)

    def begin_turn(self, prompt_length: int | None = None) -> None:
        """Let the next forward begin a turn; for None, its prompt has all tokens of that forward.

        Raises:
            TypeError: `prompt_length` is not an int.
            ValueError: it is less than 1.
        """
        if prompt_length is not None:
            check_prompt_length(prompt_length)
        settle(self)
        self.turn_begins = True
        self.prompt_end = None if prompt_length is None else self.store.seen + prompt_length

    def attend(self, query: Tensor, mask: LazyMask | None, params: AttentionParams, *, fast: FastAttention) -> Tensor:
        """Append the pending tokens and attend: a prompt densely, with stage 1 at its end; decoded tokens by stage 2.

        Args:
            query: [B, H, n, D], after rotary embedding.
            mask: the model's mask, or None for a causal one.
            params: the model's attention parameters.
            fast: the model's own attention for plain causal prompts.

        Returns:
            [B, n, H, Dv].

        Raises:
            ValueError: nothing is pending.
        """
        if torch.compiler.is_dynamo_compiling() and not self.steps_statically(query.shape[2]):
            from .untraced import call_untraced

            return call_untraced(self.attend, query, mask, params, fast=fast)  # type: ignore[no-any-return]  # untyped
        if self.pending is None:
            raise ValueError("attend follows update, which hands the keys and values over")
        key, value = self.pending
        self.pending = None
        given = query.shape[2]
        if self.decodes(given) and (self.step is not None or self.config.decode_capacity is None):
            return self.decode(query, key, value, params)
        prompt = self.prompt_part(given)
        if self.params is None:
            # Re-eviction may run outside of a forward. Learned sinks are parameters: detach them from the autograd
            # graph.
            self.params = params._replace(sinks=None if params.sinks is None else params.sinks.detach())
        parts = []
        if prompt:
            query_part, key_part, value_part = (tensor[:, :, :prompt] for tensor in (query, key, value))
            parts.append(prefill(self, query_part, key_part, value_part, mask, fast, params))
            if self.prompt_end is not None and self.store.seen >= self.prompt_end:
                self.end_prompt(params)
        elif not self.store.closed:
            self.end_prompt(params)
        if self.store.closed:
            settings: dict[str, Any] = {"backend": self.backend, "workspaces": self.workspaces}
            warm_up(query[:, :, 0], self.store, params, drafts=self.speculative, **settings)
        if self.store.closed and self.step is None and self.config.decode_capacity is not None:
            self.step = static_step(query[:, :, 0], self.store, backend=self.backend, workspaces=self.workspaces)
        if prompt == 0 and given > 1 and not self.speculative:
            self.workspaces.warn(VERIFIES)
        if prompt < given:
            query, key, value = (tensor[:, :, prompt:] for tensor in (query, key, value))
            one = given - prompt == 1
            out = self.decode(query, key, value, params) if one else self._verify(query, key, value, params)
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def decodes(self, given: int) -> bool:
        """Whether a forward of `given` tokens is a decode step, of a static or a growing cache."""
        return given == 1 and self.prompt_end is None and not self.turn_begins and self.store.closed

    def decode(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Run one decode step for queries [B, H, 1, D] and return [B, 1, H, Dv]."""
        if self.step is not None:
            if torch.compiler.is_dynamo_compiling() or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
                return step_statically(self, self.step, query, key, value, params)
            if self.store.lens.uncounted or self.store.lens.longest >= self.step.capacity:
                self.ensure_room()
        store, monitor = self.store, self.monitor
        watched = monitor is not None and monitor.asks(self.number, store)
        new, backend, workspaces = query[:, :, 0], self.backend, self.workspaces
        step = decode_step(new, key[:, :, 0], value[:, :, 0], store, params, backend=backend, workspaces=workspaces)
        if monitor is not None and watched:
            step = monitor.watch(self.number, store, self.history, new, step, params)
        return step[:, None]

    def _verify(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Run a verify step for queries [B, H, n, D] and return [B, n, H, Dv]."""
        store, monitor, count = self.store, self.monitor, query.shape[2]
        # Room is made first, so that none of the draft's tokens is evicted and a crop can remove them.
        self.ensure_room(count)
        ring, tensor = store.decoding.ring, store.decoding.buffers.query_ring
        if ring is not None and tensor is not None:
            ring.save(tensor, query, store.lens.seen)
        if self.captured() or (monitor is not None and monitor.asks(self.number, store, count)):
            each = [slice(i, i + 1) for i in range(count)]
            singles = [self.decode(query[:, :, i], key[:, :, i], value[:, :, i], params) for i in each]
            return torch.cat(singles, dim=1)
        backend, shared, room = self.backend, self.workspaces, self.ensure_room
        return verify_step(query, key, value, store, params, backend=backend, workspaces=shared, make_room=room)

    def end_prompt(self, params: AttentionParams) -> None:
        """Run stage 1 at the end of a prompt.

        Raises:
            ValueError: there is no prompt, or a crop has removed all queries of its observation window.
        """
        end_prompt(self, params)

    def ensure_room(self, count: int = 1) -> None:
        """Make room for the next tokens: re-evict generated tokens if the buffer is full and the settings allow it.

        Args:
            count: tokens to make room for; if re-eviction frees fewer slots, there is room for at least one token.

        Raises:
            ValueError: there is no room for a single token, and the settings do not allow re-eviction.
        """
        ensure_room(self, count)

    def evict_generated(self, kept: int, params: AttentionParams) -> None:
        """Re-evict generated tokens in place, down to `kept`."""
        ops = eviction_ops(self.store.decoding.keys, backend=self.backend, workspaces=self.workspaces)
        evict_generated(self.store, kept, params, kernel_size=self.config.stage_1_kernel_size, ops=ops)

    @property
    def re_evicts(self) -> bool:
        """Whether generated tokens are re-evicted when the static buffer is full."""
        return self.store.closed and self.store.decoding.ring is not None

    @property
    def tokens_seen(self) -> int:
        """The tokens of the sequence so far, evicted ones included."""
        return self.store.seen + (0 if self.pending is None else self.pending[0].shape[2])

    def get_seq_length(self) -> int:
        """Return the tokens of the sequence so far, evicted ones included.

        While a forward is compiled or captured, and after steps that the host did not count, it is a 0-dimensional
        tensor, as in transformers' static cache.
        """
        if self.step is not None and (
            torch.compiler.is_dynamo_compiling() or self.store.lens.uncounted or self.captured()
        ):
            seen: Any = self.static_clock()[0]
            return seen  # type: ignore[no-any-return]  # transformers itself declares an int
        return self.tokens_seen

    def captured(self) -> bool:
        """Whether a CUDA graph of this forward is being captured."""
        return self.step is not None and self.step.out.is_cuda and torch.cuda.is_current_stream_capturing()

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return (keys of the sequence, 0) for a forward of `query_length` tokens (before 5.4: a tensor of positions).

        A static step needs no mask, but constant sizes: the sizes of its buffers.
        """
        given = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        if self.step is not None and self.steps_statically(given):
            return self.step.capacity, 0
        return self.tokens_seen + given, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no maximum (the name before transformers 5.16)."""
        return -1

    def crop(self, max_length: int) -> None:
        """Remove tokens at the end.

        Args:
            max_length: if positive, the tokens of the sequence to keep; if negative, minus the tokens to remove.

        Raises:
            ValueError: the crop needs tokens that stage 1 evicted, or removes more tokens than the sequence has.
        """
        settle(self)
        crop_layer(self, max_length)

    def snapshot(self) -> LayerSnapshot:
        """Return the present state, for `restore`."""
        settle(self)
        return snapshot_of(self)

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Return to a snapshot.

        Raises:
            ValueError: it is of another layer, or was taken before this one was reset.
        """
        restore_layer(self, snapshot)

    def reset(self) -> None:
        """Drop everything."""
        self.store.clear()
        if self.history is not None:
            self.history.clear()
        self.pending = self.prompt_end = self.prompt_ids = self.step = None
        self.turn_begins = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search by `beam_idx` [rows], integers; a row may occur several times."""
        settle(self)
        map_rows(self, lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        settle(self)
        self.step = None
        map_rows(self, lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows of `indices` [rows], integers or a mask."""
        settle(self)
        self.step = None
        map_rows(self, lambda tensor: tensor[indices.to(tensor.device)])

    def stats(self) -> LayerStats:
        """Return the tokens and bytes of this layer."""
        return layer_stats(self)


def rocketkv_layers(cache: Any) -> list[RocketKVLayer]:
    """Return the compressed layers of a cache of any kind."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, RocketKVLayer)]
