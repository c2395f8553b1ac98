"""The attention backend: prompts by the parent backend, decode steps by the slab.

`backend_class` makes a subclass of one of vLLM's backends for the settings of an engine; this module's attributes `CPU`
and `GPU` are what vLLM resolves, while a model is built. Without settings, they are vLLM's own classes.

Letters: H query heads, Hkv KV heads, D head dim, n tokens of a step.
"""

import dataclasses
import functools
import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ..config import RocketKVConfig
from ..core.params import AttentionParams
from ..dispatch import Workspaces
from .blocks import BlockOrder, found_order, plain_order, read_packed
from .metadata import Closing, RequestTable, StepPlan
from .metrics import MISSED_EVERY, metrics
from .refusals import by_layer, refuse
from .settings import VllmSettings, settings_of
from .slab import LayerShape, LayerSlab, decode_row
from .spec import RocketKVSpec
from .steps import flat_tokens, prompts_of, step_rows

logger = init_logger(__name__)

# Without settings, these names stand for vLLM's own classes. With settings, the backends of MLA are refused.
_PARENTS = {
    "CPU": "cpu_attn.CPUAttentionBackend",
    "CPU_MLA": "mla.cpu_mla.CPUMLABackend",
    "AMX_MLA": "mla.amx_mla.AMXMLABackend",
    "FLASH": "flash_attn.FlashAttentionBackend",
    "TRITON": "triton_attn.TritonAttentionBackend",
}


_LOWER = "lower max_sequences (or vLLM's --max-num-seqs), decode_capacity or token_budget"


@dataclass
class RocketKVMetadata:
    """Metadata of a step for all layers of a group.

    Attributes:
        plan: what the step does with each request.
        prompts: the parent's metadata of the prompts' chunks, or None if there are none.
        tokens: the chunks' tokens among the batch's flat tokens: a slice, or [n] integers.
        num_actual_tokens: tokens of the step.
        workspaces: shared by the layers.
    """

    plan: StepPlan
    prompts: Any
    tokens: slice | Tensor
    num_actual_tokens: int
    workspaces: Workspaces


class EngineFacts(NamedTuple):
    """Facts of an engine that its backend depends on.

    Attributes:
        settings: the plugin's settings.
        rows: rows of the slab.
        max_model_len: most tokens of a request.
    """

    settings: VllmSettings
    rows: int
    max_model_len: int


def __getattr__(name: str) -> Any:
    """Return the backend class that a name stands for under the current vLLM config."""
    if name not in _PARENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, parent = _PARENTS[name].rsplit(".", 1)
    parent_class = getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), parent)
    vllm_config = get_current_vllm_config_or_none()
    settings = None if vllm_config is None else settings_of(vllm_config)
    if vllm_config is None or settings is None:
        return parent_class
    refuse(vllm_config, settings)
    rows = settings.rows(vllm_config.scheduler_config.max_num_seqs)
    return backend_class(parent_class, EngineFacts(settings, rows, vllm_config.model_config.max_model_len))


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
        params = self.params
        for token, sequence in attn_metadata.plan.decodes:
            step = slice(token, token + 1)
            store, shared = sequence.stores[name], attn_metadata.workspaces
            output[step] = decode_row(store, self.config, query[step], key[step], value[step], params, shared)
        return output

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
            parent.do_kv_cache_update(layer, key[tokens], value[tokens], kv_cache, slot_mapping[tokens])

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


def _check_full_attention(vllm_config: Any) -> None:
    """Refuse a model without full attention.

    Raises:
        ValueError: no layer of the model is compressed.
    """
    layers = vllm_config.compilation_config.static_forward_context.values()
    if not any(getattr(getattr(layer, "impl", None), "slab", None) for layer in layers):
        raise ValueError("rocketkv does not support models without full attention: serve the model without rocketkv")


class RocketKVBuilder:
    """Builds the metadata of a step, and ends the prompts that have been read; the base of `backend_class`."""

    facts: EngineFacts

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        parent: Any = super()
        parent.__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layers = {name: vllm_config.compilation_config.static_forward_context[name] for name in layer_names}
        self.compresses = isinstance(kv_cache_spec, RocketKVSpec)
        slabs = [layer.impl.slab for layer in self.layers.values() if getattr(layer.impl, "slab", None)]
        if not self.compresses:
            _check_full_attention(vllm_config)
            return
        total = sum(slab.nbytes for slab in slabs)
        logger.info("rocketkv: a slab of %.2f GiB for %d sequences", total / 2**30, self.facts.rows)
        metrics().slab_bytes.inc(total)
        self.steps = 0
        self.block_size = kv_cache_spec.block_size
        configs = by_layer(vllm_config, self.facts.settings)
        for name, layer in self.layers.items():
            layer.impl.config = configs[extract_layer_index(name)]
        self.table, self.workspaces = RequestTable(self.facts.rows), Workspaces()
        self.orders: dict[str, BlockOrder] = {}

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Return NEVER: a step's plan is made on the host, so attention runs outside of CUDA graphs."""
        return AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Return the metadata of a step; before it, run stage 1 on the prompts whose first decode step it is."""
        parent: Any = super()
        common = common_attn_metadata
        if not self.compresses:
            return parent.build(common_prefix_len, common, fast_build)
        rows = step_rows(common, self.block_size, self.facts.max_model_len)
        plan = self.table.plan(rows)
        for closing in plan.closings:
            self._close(closing, common.block_table_tensor)
        self.steps += 1
        if self.steps % MISSED_EVERY == 0:
            self._sample(plan)
        prompts = [row for row in rows if row.prefilling]
        tokens: slice | Tensor = slice(0, common.num_actual_tokens)
        metadata = None
        if len(prompts) == common.num_reqs:
            metadata = parent.build(common_prefix_len, common, fast_build)
        elif prompts:
            tokens = flat_tokens(prompts, common.query_start_loc.device)
            metadata = parent.build(common_prefix_len, prompts_of(common, prompts, tokens), fast_build)
        return RocketKVMetadata(plan, metadata, tokens, common.num_actual_tokens, self.workspaces)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Return the parent's metadata: nothing is captured, but vLLM may warm up with made-up requests."""
        parent: Any = super()
        return parent.build(0, common_attn_metadata)

    def _sample(self, plan: StepPlan) -> None:
        """Report the missed mass of the last steps of the sequences that go on decoding."""
        stores = [store for _, sequence in plan.decodes for store in sequence.stores.values()]
        missed = [found for store in stores if (found := store.decoding.buffers.missed) is not None]
        mean = torch.stack(missed).nanmean() if missed else torch.tensor(torch.nan)
        if not mean.isnan():
            metrics().missed_mass.set(float(mean))

    def _close(self, closing: Closing, block_table: Tensor) -> None:
        """Run stage 1 on a prompt in all layers, out of its blocks."""
        count = -(-closing.tokens // self.block_size)
        blocks, window = block_table[closing.place, :count], self.facts.settings.config.window_size
        for name, layer in self.layers.items():
            impl, queries = layer.impl, closing.prompt.queries.pop(name, None)
            if queries is None or queries.shape[2] < min(window, closing.tokens):
                raise RuntimeError(
                    f"rocketkv: the queries of the last {window} tokens of a prompt of {closing.tokens} are missing"
                )
            if name not in self.orders:
                self.orders[name] = impl.order(layer, self.block_size)
            keys, values = read_packed(layer.kv_cache, blocks, closing.tokens, self.orders[name])
            closing.sequence.stores[name] = impl.slab.close(
                closing.sequence.row, impl.config, keys, values, queries, impl.params, self.workspaces
            )
        stored = [store.stored for store in closing.sequence.stores.values()]
        metrics().prompt_tokens.inc(closing.tokens)
        metrics().kept_tokens.inc(sum(stored) / len(stored))
