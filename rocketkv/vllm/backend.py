"""The attention backend: prompts by the parent backend, decode steps by the slab.

`backend_class` makes a subclass of one of vLLM's backends for the settings of an engine; `choice` returns it to vLLM.

Letters: H query heads, Hkv KV heads, D head dim, n tokens of a step.
"""

import dataclasses
import functools
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ..config import RocketKVConfig
from ..core.params import AttentionParams
from .blocks import BlockOrder, found_order, plain_order
from .builder import EngineFacts, RocketKVBuilder, RocketKVMetadata
from .refusals import by_layer, refuse
from .settings import VllmSettings, settings_of
from .sizes import LayerShape
from .slab import LayerSlab, decode_row
from .spec import RocketKVSpec

_LOWER = "lower max_sequences (or vLLM's --max-num-seqs), decode_capacity or token_budget"


def backend_for(parent: Any, vllm_config: Any, settings: VllmSettings) -> Any:
    """Return the subclass of one of vLLM's backends for an engine.

    Raises:
        ValueError: the plugin cannot serve the engine.
    """
    refuse(vllm_config, settings)
    rows = settings.rows(vllm_config.scheduler_config.max_num_seqs)
    return backend_class(parent, EngineFacts(settings, rows, vllm_config.model_config.max_model_len))


@functools.cache  # vLLM compares backend classes
def backend_class(parent: Any, facts: EngineFacts) -> Any:
    """Return the subclass of a backend that compresses prompts in such an engine."""
    impl = type("RocketKVImpl", (RocketKVImpl, parent.get_impl_cls()), {"facts": facts})
    builder = type("RocketKVBuilder", (RocketKVBuilder, parent.get_builder_cls()), {"facts": facts})
    fields = {
        "facts": facts,
        "get_impl_cls": staticmethod(lambda: impl),
        "get_builder_cls": staticmethod(lambda: builder),
        "__module__": __name__,
    }
    return type(f"RocketKV{parent.__name__}", (RocketKVBackend, parent), fields)


class RocketKVBackend:
    """A backend whose full attention layers have a `RocketKVSpec`; the base of `backend_class`."""

    facts: EngineFacts

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Return False: a connector would copy blocks that are freed."""
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Return the spec of a full attention layer whose prompts are compressed, or the spec of another layer."""
        parent: Any = super()
        spec = parent.customize_spec(spec)
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            return spec
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        window = cls.facts.settings.config.window_size
        return RocketKVSpec(**fields, rows=cls.facts.rows, window_size=window, max_model_len=cls.facts.max_model_len)


class RocketKVImpl:
    """The attention of a layer; the base of `backend_class`.

    Attributes:
        slab: the layer's rows, or None for a layer that is not compressed, such as one with a sliding window.
        config: the layer's settings; the builder sets it, since a layer learns its number from it.
    """

    facts: EngineFacts
    slab: LayerSlab | None
    config: RocketKVConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own: Any = self
        vllm_config = get_current_vllm_config()
        if settings_of(vllm_config) != self.facts.settings:
            raise ValueError("rocketkv: one process serves one configuration; start another process for another one")
        self.slab, self.config = None, self.facts.settings.config
        if own.attn_type != AttentionType.DECODER or _has_window(own.sliding_window):
            return
        for name in ("alibi_slopes", "kv_sharing_target_layer_name"):
            if getattr(own, name, None) is not None:
                raise ValueError(f"rocketkv does not support layers with {name}: serve the model without rocketkv")
        shape = LayerShape(
            own.num_heads, own.num_kv_heads, own.head_size, own.head_size, vllm_config.model_config.dtype
        )
        configs, rows = set(by_layer(vllm_config, self.facts.settings)), self.facts.rows
        sizes = {"rows": rows, "max_prompt": self.facts.max_model_len}
        try:
            self.slab = LayerSlab(configs, shape, **sizes, device=torch.get_default_device())
        except RuntimeError as error:  # torch.OutOfMemoryError, or that of the CPU's allocator
            raise ValueError(f"rocketkv: there is no memory for a slab of {rows} sequences; {_LOWER}") from error
        _take_from_space(vllm_config.cache_config, self.slab.nbytes)

    @property
    def params(self) -> AttentionParams:
        """The model's attention parameters of this layer."""
        own: Any = self
        softcap = getattr(own, "logits_soft_cap", None)
        return AttentionParams(own.scale, softcap or None, getattr(own, "sinks", None))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from a step's tokens, queries [n, H, D]: prompts by the parent, decode steps by the slab."""
        parent: Any = super()
        if not isinstance(attn_metadata, RocketKVMetadata):
            out: Tensor = parent.forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return out
        tokens, name = attn_metadata.tokens, layer.layer_name
        if attn_metadata.prompts is not None:
            part = [query[tokens], key[tokens], value[tokens]]
            read = output[tokens] if isinstance(tokens, slice) else torch.empty_like(output[tokens])
            parent.forward(layer, *part, kv_cache, attn_metadata.prompts, read, *args, **kwargs)
            if not isinstance(tokens, slice):
                output[tokens] = read
        for first, last, prompt in attn_metadata.plan.chunks:
            prompt.remember(name, query[first:last], self.config.window_size)
        if attn_metadata.keeps_queries and self.slab is not None:
            self.slab.newest[tokens].copy_(query[tokens])
        if attn_metadata.decodes is not None and self._decode(query, key, value, output, attn_metadata):
            return output
        params = self.params
        for token, sequence in attn_metadata.plan.decodes:
            step = slice(token, token + 1)
            store, shared = sequence.stores[name], attn_metadata.workspaces
            output[step] = decode_row(store, self.config, query[step], key[step], value[step], params, shared)
        return output

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, metadata: RocketKVMetadata) -> bool:
        """Run all decode steps at once; return whether the backend supports it, or else do nothing."""
        if metadata.decodes is None or self.slab is None:
            return False
        rows, tokens = metadata.decodes
        out = output[tokens]  # a view of a slice, or else a copy
        new = query[tokens], key[tokens], value[tokens]
        if not self.slab.decode(rows, self.config, *new, out, self.params, metadata.workspaces):
            return False
        if not isinstance(tokens, slice):
            output[tokens] = out
        return True

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the keys and values of prompts into their blocks; decoded tokens have none."""
        parent: Any = super()
        metadata = get_forward_context().attn_metadata
        own = metadata.get(layer.layer_name) if isinstance(metadata, dict) else metadata
        if not isinstance(own, RocketKVMetadata):
            parent.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        elif own.prompts is not None:
            tokens = own.tokens
            slots = slot_mapping[tokens] if own.slots is None else own.slots
            parent.do_kv_cache_update(layer, key[tokens], value[tokens], kv_cache, slots)

    def order(self, layer: Any, block_size: int) -> BlockOrder:
        """Return the order of keys and values in the layer's blocks."""
        own, parent = cast("Any", self), cast("Any", super())
        if not isinstance(self, CPUAttentionBackendImpl):
            return plain_order(block_size, own.slab.shape.head_dim)
        return found_order(functools.partial(parent.do_kv_cache_update, layer), block_size, own.slab.shape)


def _take_from_space(cache: Any, size: int) -> None:
    """Subtract a slab's bytes from the space for KV caches, if it is given; otherwise vLLM measures what is left.

    Raises:
        ValueError: there is no space left for blocks.
    """
    if cache.kv_cache_memory_bytes is None:
        return
    cache.kv_cache_memory_bytes -= size
    if cache.kv_cache_memory_bytes <= 0:
        raise ValueError(
            f"rocketkv: the slab takes all of the space for KV caches, and leaves none for prompts; {_LOWER}, or raise "
            "--kv-cache-memory-bytes (VLLM_CPU_KVCACHE_SPACE on a CPU)"
        )


def _has_window(window: Any) -> bool:
    """Whether a backend's `sliding_window` is one: None, -1 and (-1, -1) stand for none."""
    return window not in (None, -1, (-1, -1))
