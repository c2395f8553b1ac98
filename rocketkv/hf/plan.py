"""The memory and the bytes read per decode step of a model at a token budget, from its configuration alone.

Bytes are counted at the end of the prompt and for the decode step after it. No weights are loaded: the model is built
on the meta device, where tensors have shapes and no storage.

Letters: B batch, H query heads, Hkv KV heads, D head dim of keys, Dv of values, S tokens of the prompt.
"""

import copy
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..budget import BudgetSplit
from ..config import RocketKVConfig
from ..core.index import index_of
from ..core.pages import index_dtype_of
from ..options import DTYPES
from ..state.decoding import decode_room
from ..state.stats import NOMINAL_ITEMSIZE, CacheStats, LayerStats, budget_of, step_bytes
from .models import find_decoder, refuse_unsupported

INTEGER = torch.int32.itemsize  # bytes of a position or a length
CEILINGS = "Ceilings assume that memory bandwidth alone bounds a step; they are not measurements."
MEMORY = ("full_bytes", "key_bytes", "value_bytes", "index_bytes", "other_bytes")
# Names in configurations of the number of experts that a layer's router chooses from.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Split, memory, bytes read per step and ceilings on the speed-up of a model at a token budget.

    Attributes:
        model: class of the model.
        config: the compression's settings.
        context: S, tokens of each row's prompt.
        batch: B, rows.
        dtype: dtype of keys, values and weights.
        split: budget split of the first compressed layer; None if no layer is compressed.
        cache: tokens and bytes of every layer at the end of the prompt.
        weight_bytes: bytes of weights that one decode step reads, for all rows together.
        notes: assumptions of these numbers, and costs that they exclude.
    """

    model: str
    config: RocketKVConfig
    context: int
    batch: int
    dtype: str
    split: BudgetSplit | None
    cache: CacheStats
    weight_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def attention_ceiling(self) -> float:
        """Bytes of K and V that a dense step reads, over those that a compressed step reads, index included."""
        return _ratio(self.cache.total("dense_step_bytes"), self.cache.total("step_bytes"))

    @property
    def end_to_end_ceiling(self) -> float:
        """The same ratio, including the weights, which both steps read."""
        dense, compressed = self.cache.total("dense_step_bytes"), self.cache.total("step_bytes")
        return _ratio(self.weight_bytes + dense, self.weight_bytes + compressed)

    @property
    def layer_kinds(self) -> dict[str, int]:
        """Number of layers that are compressed, kept as they are, and without keys and values."""
        kinds = Counter(_kind(layer) for layer in self.cache.layers)
        return {kind: kinds[kind] for kind in ("compressed", "kept", "without_kv")}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and strings, for JSON."""
        total = self.cache.total
        return {
            "model": self.model,
            "method": self.config.method,
            "token_budget": self.config.token_budget,
            "decode_reserve": self.config.decode_reserve,
            "context": self.context,
            "batch": self.batch,
            "dtype": self.dtype,
            "index_dtype": self.config.index_dtype,
            "layers": self.layer_kinds,
            "split": None if self.split is None else asdict(self.split),
            "memory": {
                **{name: total(name) for name in MEMORY},
                "total_bytes": self.cache.total_bytes,
                "ratio": self.cache.memory_ratio,
            },
            "step": {
                "dense_bytes": total("dense_step_bytes"),
                "compressed_bytes": total("step_bytes"),
                "nominal_dense_bytes": total("nominal_dense_step_bytes"),
                "nominal_compressed_bytes": total("nominal_step_bytes"),
                "weight_bytes": self.weight_bytes,
            },
            "ceilings": {"attention": self.attention_ceiling, "end_to_end": self.end_to_end_ceiling},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        total, kinds = self.cache.total, self.layer_kinds
        layers = f"{kinds['compressed']} layers compressed"
        layers += f", {kinds['kept']} kept as they are" if kinds["kept"] else ""
        layers += f", {kinds['without_kv']} without keys and values" if kinds["without_kv"] else ""
        full, live = _size(total("full_bytes")), _size(self.cache.total_bytes)
        kv, index = _size(total("key_bytes") + total("value_bytes")), _size(total("index_bytes"))
        dense, compressed = _size(total("dense_step_bytes")), _size(total("step_bytes"))
        attention, end_to_end = _times(self.attention_ceiling), _times(self.end_to_end_ceiling)
        own = "" if self.config.index_dtype == "keys" else f", index {self.config.index_dtype}"
        rows = (
            ("model", f"{self.model}, {layers}"),
            ("input", f"batch {self.batch}, prompts of {self.context} tokens, {self.dtype}{own}"),
            ("method", f"{self.config.method}, token budget {self.config.token_budget}"),
            ("split", _split_text(self.split, self.context)),
            ("memory", f"full cache {full}; compressed {live}, {self.cache.memory_ratio:.3f} of it"),
            ("", f"keys and values {kv}, index {index}, positions and other state {_size(total('other_bytes'))}"),
            ("step", f"reads {dense} of a full cache, {compressed} of the compressed one"),
            ("", f"and {_size(self.weight_bytes)} of weights"),
            ("ceilings", f"attention {attention}; end to end, weights included, {end_to_end}"),
        )
        lines = [f"{label:10}{text}" for label, text in rows]
        return "\n".join([*lines, "", CEILINGS, *self.notes])


def plan(
    config: PretrainedConfig,
    *,
    context: int,
    batch: int = 1,
    token_budget: int = RocketKVConfig.token_budget,
    method: str = RocketKVConfig.method,
    decode_reserve: int = RocketKVConfig.decode_reserve,
    dtype: str = "bfloat16",
    index_dtype: str = RocketKVConfig.index_dtype,
) -> Plan:
    """Return the memory and the bytes read per decode step of a model at a token budget; loads no weights.

    Args:
        config: the model's configuration, such as `model.config`.
        context: S, tokens of each row's prompt.
        batch: B, rows.
        token_budget: t, tokens of K and V that a decode step may read.
        method: one of `rocketkv.METHODS`.
        decode_reserve: generated tokens that the sequence length of the split includes and the cache has room for.
        dtype: dtype of keys, values and weights: float32, bfloat16 or float16.
        index_dtype: see `RocketKVConfig`.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count or name is impossible, or the model cannot be compressed; the message says why.

    Examples:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=8, max_position_embeddings=131072)
        >>> made = plan(config, context=32768, token_budget=512)
        >>> made.split.kept_tokens, made.split.top_k
        (3719, 255)
        >>> f"{made.cache.memory_ratio:.3f} of the memory, {made.attention_ceiling:.0f} times fewer bytes a step"
        '0.126 of the memory, 65 times fewer bytes a step'
    """
    counts: dict[str, Any] = {"context": context, "batch": batch}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name} must be an int, got {count!r} of type {type(count).__name__}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    settings = RocketKVConfig(
        method=method, token_budget=token_budget, decode_reserve=decode_reserve, index_dtype=index_dtype
    )
    model_dtype: torch.dtype = getattr(torch, dtype)
    sizes = (model_dtype.itemsize, (index_dtype_of(index_dtype) or model_dtype).itemsize)
    model = _on_meta(config)
    decoder, attentions = find_decoder(model)
    refuse_unsupported(model, decoder, attentions)
    modules: dict[Any, nn.Module] = {module.layer_idx: module for module in attentions}
    layers, splits = [], []
    for i, kind in enumerate(DynamicCache(config=decoder.config).layers):
        if not isinstance(kind, DynamicLayer):
            layers.append(LayerStats(compressed=False))
            continue
        kv_heads, head_dim, value_dim = _kv_shape(modules.get(i), decoder.config)
        split, stored, room = None, context, 0
        if type(kind) is DynamicLayer:
            split = settings.split_for(context, head_dim)
            splits.append(split)
            stored, room = _stored(split, context), decode_room(split, decode_reserve)
        elif isinstance(kind, DynamicSlidingWindowLayer):
            stored = min(context, kind.sliding_window - 1)  # the sliding window without the token that attends
        shape = (batch * kv_heads, head_dim, value_dim)
        counted = _count_layer(split, context, stored, room, shape, sizes, batch * decoder.config.num_attention_heads)
        if split is not None and settings.keeps_history:
            counted = replace(counted, history_bytes=counted.full_bytes)
        layers.append(counted)
    weight_bytes, notes = _step_weights(model, decoder, batch, model_dtype.itemsize)
    longest = getattr(decoder.config, "max_position_embeddings", None)
    if isinstance(longest, int) and context > longest:
        notes.append(f"The configuration gives the model {longest} positions, fewer than the prompt has tokens.")
    return Plan(
        model=type(model).__name__,
        config=settings,
        context=context,
        batch=batch,
        dtype=dtype,
        split=splits[0] if splits else None,
        cache=CacheStats(tuple(layers)),
        weight_bytes=weight_bytes,
        notes=tuple(notes),
    )


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration on the meta device."""
    kinds: tuple[tuple[Any, Any], ...] = (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    )
    for kind, known in kinds:
        if type(config) in known:
            with torch.device("meta"):
                model: PreTrainedModel = kind.from_config(copy.deepcopy(config))
            return model
    raise ValueError(f"{type(config).__name__} is not the configuration of a causal language model in transformers")


def _kv_shape(module: nn.Module | None, config: PretrainedConfig) -> tuple[int, int, int]:
    """Return Hkv, D and Dv of an attention layer, from its projections if it has them, else from the config."""
    heads: int = config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    value_dim = head_dim
    keys, values = getattr(module, "k_proj", None), getattr(module, "v_proj", None)
    if isinstance(keys, nn.Linear):
        kv_heads = keys.out_features // head_dim
    if isinstance(values, nn.Linear):
        value_dim = values.out_features // kv_heads
    return kv_heads, head_dim, value_dim


def _count_layer(
    split: BudgetSplit | None,
    context: int,
    stored: int,
    room: int,
    shape: tuple[int, int, int],
    sizes: tuple[int, int],
    query_rows: int,
) -> LayerStats:
    """Count the tokens and bytes of a layer's cache at the end of the prompt.

    Args:
        split: the layer's split; None for a layer that is not compressed.
        context: S.
        stored: tokens that stage 1 keeps.
        room: free slots after these.
        shape: B * Hkv, D and Dv.
        sizes: bytes of an element of K and V, and of a page bound.
        query_rows: B * H.
    """
    (rows, head_dim, value_dim), (size, index_size) = shape, sizes
    capacity, dense = stored + room, stored if split is None else context
    index = index_of(split)
    index_bytes = 0 if index is None else index.row_bytes(capacity, head_dim, index_size)
    if split is not None and split.residual:
        index_bytes += value_dim * torch.float64.itemsize
    scalar_bytes = query_rows * torch.float32.itemsize
    bias_bytes = scalar_bytes if split is not None and split.calibrated else 0
    missed_bytes = scalar_bytes if split is not None and split.residual else 0
    dims, token = (head_dim, value_dim), head_dim + value_dim
    appended = 0 if split is None else 1  # the next step appends its token before it reads
    read, dense_read = stored + appended, dense + appended
    return LayerStats(
        compressed=split is not None,
        tokens_seen=context,
        tokens_stored=stored,
        key_bytes=rows * capacity * head_dim * size,
        value_bytes=rows * capacity * value_dim * size,
        index_bytes=rows * index_bytes + bias_bytes,
        token_budget=budget_of(split),
        other_bytes=0 if split is None else rows * (capacity + 1) * INTEGER + missed_bytes,
        full_bytes=rows * dense * token * size,
        step_bytes=rows * step_bytes(split, read, dims, sizes),
        dense_step_bytes=rows * dense_read * token * size,
        nominal_step_bytes=rows * step_bytes(split, read, dims, sizes, nominal=True),
        nominal_dense_step_bytes=rows * dense_read * token * NOMINAL_ITEMSIZE,
    )


def _step_weights(model: PreTrainedModel, decoder: PreTrainedModel, batch: int, itemsize: int) -> tuple[int, list[str]]:
    """Return the bytes of weights that a decode step reads, and notes on the assumptions.

    Embeddings do not count, since a token reads one row, unless the output layer shares their weight.
    """
    config: Any = decoder.config
    lookups = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    read = {name: p.numel() for name, p in decoder.named_parameters() if id(p) not in lookups}
    head = model.get_output_embeddings()
    total = sum(read.values()) + (sum(p.numel() for p in head.parameters()) if head is not None else 0)
    notes = []
    experts = next((n for name in EXPERT_COUNTS if isinstance(n := getattr(config, name, None), int)), 0)
    chosen = getattr(config, "num_experts_per_tok", None)
    routed = sum(numel for name, numel in read.items() if ".experts." in name)
    if routed and experts and isinstance(chosen, int):
        active = min(experts, batch * chosen)
        total -= routed - routed * active // experts
        notes.append(
            f"Weights count {active} of {experts} experts a layer: each row chooses {chosen}, at worst distinct ones."
        )
    elif routed or experts > 1:
        notes.append("Weights count all experts, although a step reads only those that its rows choose.")
    if getattr(model.config, "quantization_config", None) is not None:
        notes.append("Weights count in the dtype above; the quantization in the configuration is ignored.")
    return total * itemsize, notes


def _kind(layer: LayerStats) -> str:
    if layer.compressed:
        return "compressed"
    return "kept" if layer.tokens_stored else "without_kv"


def _ratio(dense: int, compressed: int) -> float:
    return dense / compressed if compressed else 1.0


def _stored(split: BudgetSplit, context: int) -> int:
    """Return how many of a prompt's S tokens stage 1 keeps."""
    return context if split.kept_tokens is None else min(context, split.kept_tokens)


def _split_text(split: BudgetSplit | None, context: int) -> str:
    if split is None:
        return "nothing to compress"
    stored = _stored(split, context)
    if split.top_k is None or stored <= split.token_budget:
        return f"{stored} of {context} tokens are kept per KV head, and a step reads all of them"
    scored = f"pages of {split.page_size} tokens on {split.channels} channels"
    if split.sketch_bits is not None:
        scored = f"a sketch of every key, {split.sketch_bits} bits a channel"
    attended = f"{split.top_k} tokens" + (" and the mean of the others" if split.residual else "")
    return f"{stored} of {context} tokens are kept per KV head; a step scores {scored} and attends to {attended}"


def _size(count: int) -> str:
    """Format bytes in the largest unit that keeps the number at 1 or more."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.2f}x"


def load_config(name: str) -> PretrainedConfig:
    """Load a model's configuration from a config.json, its folder, or the hub.

    Raises:
        ValueError: there is none, or transformers cannot read it.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"no model configuration in {name!r}; give a config.json, its folder, or a hub name ({reason})"
        ) from error
    return config
