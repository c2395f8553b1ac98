"""The metadata of a step, and the work between steps: stage 1 of ended prompts, and re-eviction in full rows.

Letters: H query heads, D head dim, n tokens of a step, B rows that decode.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport

from ..backend import backend_name
from ..dispatch import Workspaces
from .blocks import BlockOrder, read_packed
from .graphs import GraphBuffers
from .metadata import Closing, DecodingSequence, OpenPrompt, RequestTable, StepPlan, StepRow
from .metrics import MISSED_EVERY, metrics
from .refusals import by_layer
from .settings import VllmSettings
from .slab import make_room
from .spec import RocketKVSpec
from .steps import flat_tokens, prompts_of, step_rows

logger = init_logger(__name__)


class DecodeRows(NamedTuple):
    """The tokens that the kernels, or the CPU step, decode in one step.

    Attributes:
        rows: [B] int32, their rows of the slab, -1 for none.
        tokens: their places among the batch's flat tokens: a slice, or [B] integers.
    """

    rows: Tensor
    tokens: slice | Tensor


@dataclass
class RocketKVMetadata:
    """Metadata of a step for all layers of a group.

    Attributes:
        plan: what the step does with each request.
        prompts: the parent's metadata of the prompts' chunks, or None if there are none.
        tokens: the chunks' tokens among the batch's flat tokens: a slice, or [n] integers.
        num_actual_tokens: tokens of the step.
        workspaces: shared by the layers.
        decodes: the tokens that decode; None if there are none, or on PyTorch, where each row has a step.
        slots: slots to write the chunks' keys and values to, or None for vLLM's.
        keeps_queries: whether queries are copied to `LayerSlab.newest`; see `graphs`.
    """

    plan: StepPlan
    prompts: Any
    tokens: slice | Tensor
    num_actual_tokens: int
    workspaces: Workspaces
    decodes: DecodeRows | None = None
    slots: Tensor | None = None
    keeps_queries: bool = False


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
        self.by_rows = backend_name(device, self.facts.settings.config.backend) != "torch"
        self.graph = GraphBuffers(vllm_config.scheduler_config.max_num_seqs, device)
        self.captured = False
        self.pending: list[tuple[int, OpenPrompt]] = []  # prompts' tokens of the last step, whose queries were copied

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Return whose attention CUDA graphs may capture: steps of one token a request, where the kernels decode.

        Not on model runner V1, which is deprecated on GPUs.
        """
        parent: Any = super()
        support: AttentionCGSupport = parent.get_cudagraph_support(vllm_config, kv_cache_spec)
        if not isinstance(kv_cache_spec, RocketKVSpec):
            return support
        layers = vllm_config.compilation_config.static_forward_context.values()
        impls = [layer.impl for layer in layers if getattr(getattr(layer, "impl", None), "slab", None)]
        if not vllm_config.use_v2_model_runner or not all(
            backend_name(impl.slab.keys.device, impl.config.backend) == "triton"
            and impl.slab.workspace(impl.config, 1, Workspaces()) is not None
            for impl in impls
        ):
            return AttentionCGSupport.NEVER
        return min(support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda found: found.value)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Return the metadata of a step.

        Before it, run stage 1 on the prompts whose first decode step it is, and on generated tokens of full rows.
        """
        parent: Any = super()
        common, count = common_attn_metadata, common_attn_metadata.num_actual_tokens
        if not self.compresses:
            return parent.build(common_prefix_len, common, fast_build)
        self._take_queries()
        rows = step_rows(common, self.block_size, self.facts.max_model_len)
        plan = self.table.plan(rows)
        for closing in plan.closings:
            self._close(closing, common.block_table_tensor)
        for _, sequence in plan.decodes:
            self._make_room(sequence)
        self.steps += 1
        if self.steps % MISSED_EVERY == 0:
            self._sample(plan)
        prompts = [row for row in rows if row.prefilling]
        if self.captured and common.num_reqs == count and all(row.stop - row.start == 1 for row in rows):
            return self._graph_step(plan, common, common_prefix_len, fast_build)
        tokens: slice | Tensor = slice(0, count)
        metadata = None
        if len(prompts) == common.num_reqs:
            metadata = parent.build(common_prefix_len, common, fast_build)
        elif prompts:
            tokens = flat_tokens(prompts, common.query_start_loc.device)
            metadata = parent.build(common_prefix_len, prompts_of(common, prompts, tokens), fast_build)
        decodes = self._decode_rows(plan, [row for row in rows if not row.prefilling])
        return RocketKVMetadata(plan, metadata, tokens, count, self.workspaces, decodes)

    def _decode_rows(self, plan: StepPlan, rows: list[StepRow]) -> DecodeRows | None:
        if not self.by_rows or not plan.decodes:
            return None
        own = self.graph.set_rows(enumerate(sequence.row for _, sequence in plan.decodes), len(plan.decodes))
        return DecodeRows(own, flat_tokens(rows, own.device))

    def _graph_step(self, plan: StepPlan, common: Any, *build_args: Any) -> RocketKVMetadata:
        """Return the metadata of a step that a graph may run, whose buffers are written."""
        parent: Any = super()
        prefix_len, fast_build = build_args
        tokens = slice(0, common.num_actual_tokens)
        rows = self.graph.set_rows(((token, sequence.row) for token, sequence in plan.decodes), tokens.stop)
        # Also where there are no prompts: the parent may write buffers that the graph reads.
        metadata = parent.build(prefix_len, self.graph.without_decodes(common), fast_build)
        self.pending = [(chunk.first, chunk.prompt) for chunk in plan.chunks]
        plan.chunks.clear()
        return RocketKVMetadata(
            plan,
            metadata if self.pending else None,
            tokens,
            tokens.stop,
            self.workspaces,
            DecodeRows(rows, tokens) if plan.decodes else None,
            self.graph.slots[tokens],
            bool(self.pending),
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Return the metadata of a step whose requests are made up: none of them has a row."""
        parent: Any = super()
        if not self.compresses:
            return parent.build_for_cudagraph_capture(common_attn_metadata)
        self.captured, tokens = True, slice(0, common_attn_metadata.num_actual_tokens)
        rows = self.graph.set_rows((), tokens.stop)
        common = self.graph.without_decodes(common_attn_metadata, made_up=True)
        metadata = parent.build_for_cudagraph_capture(common)
        decodes = DecodeRows(rows, tokens)
        slots = self.graph.slots[tokens]
        return RocketKVMetadata(StepPlan(), metadata, tokens, tokens.stop, self.workspaces, decodes, slots, True)

    def _take_queries(self) -> None:
        """Remember the queries of prompts' tokens that the last step copied."""
        for token, prompt in self.pending:
            for name, layer in self.layers.items():
                query = layer.impl.slab.newest[token : token + 1].clone()
                prompt.remember(name, query, self.facts.settings.config.window_size)
        self.pending = []

    def _make_room(self, sequence: DecodingSequence) -> None:
        """Count a decode step; before it, re-evict generated tokens if the sequence's row is full."""
        if sequence.room == 0:
            sequence.room = min(
                make_room(
                    sequence.stores[name], layer.impl.config, sequence.seen - 1, layer.impl.params, self.workspaces
                )
                for name, layer in self.layers.items()
            )
        sequence.room -= 1

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
        stores = closing.sequence.stores.values()
        closing.sequence.room = min(store.capacity - store.stored for store in stores)
        stored = [store.stored for store in stores]
        metrics().prompt_tokens.inc(closing.tokens)
        metrics().kept_tokens.inc(sum(stored) / len(stored))
