"""Run the oracles over a model and texts, one layer at a time.

A text is read by one forward of the unpatched model, which equals teacher forcing. The queries, keys and values of each
full-attention layer are recorded in float32. Bounds are computed from them directly; the method's outputs come from a
cache layer of the library that reads the same tokens: the prompt, then one token at a time.

Sliding-window layers and others that no method compresses are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import NamedTuple, TypedDict

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..._version import __version__
from ...budget import BudgetSplit
from ...config import RocketKVConfig
from ...core.attention import attend
from ...core.params import AttentionParams
from ...core.topk import select
from ...hf.cache import RocketKVCache
from ...hf.layer import RocketKVLayer
from ...hf.masks import LazyMask
from ...hf.models import CACHE_ARGUMENT, find_decoder
from ...hf.patch import patch
from ...hf.prefill import FastAttention
from ..journal import Journal
from ..measures.kl import Window
from ..progress import Progress
from ..records import digest
from .bounds import decompose, group_weights, smallest_prefixes, union

VERSION = 2
NOMINAL_ITEMSIZE = 2  # bytes of a 16-bit element


class LayerTensors(NamedTuple):
    """The tensors of one layer in a forward over a text.

    Attributes:
        number: of the layer in the model.
        query: [1, H, S, D] float32, after rotary embedding.
        key: [1, Hkv, S, D] float32, after rotary embedding.
        value: [1, Hkv, S, Dv] float32.
        out: [1, S, H, Dv] float32, the model's attention output.
        params: the model's attention parameters.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    params: AttentionParams


class HeadDict(TypedDict):
    """One KV head's figures on one text; tokens, and relative L2 errors."""

    stored: int  # storage oracle: union of the steps' prefixes
    stored_prompt: int  # those of the prompt among them
    needed: list[int]  # compute oracle: each step's prefix
    evicted_error: float  # dense attention over the tokens that stage 1 keeps
    selected_error: float  # exact top-k of the stored tokens, at the method's k: the selection oracle
    indexed_error: float  # the method without its residual; the method itself if it has none
    method_error: float
    square: float  # see `bounds.Parts`
    products: list[float]
    gap: float


class LayerDict(TypedDict):
    """One layer's figures on one text."""

    layer: int
    heads: list[HeadDict]
    token_bytes: int  # K and V of one token and KV head, in 16 bits
    method_bytes: float  # read per step by the method (16-bit), all KV heads, mean over steps
    dense_bytes: float  # read per step by dense attention
    method_stored: int  # tokens the longest KV head of the method stores at the end
    capture_gap: float  # relative distance between attention recomputed here and the model's output


class _Recorder(RocketKVLayer):
    """A layer that attends densely, passes its tensors to `visit`, and drops them."""

    def __init__(self, config: RocketKVConfig, number: int, visit: Callable[[LayerTensors], None]) -> None:
        super().__init__(config)
        self._number, self._visit = number, visit

    def attend(self, query: Tensor, mask: LazyMask | None, params: AttentionParams, *, fast: FastAttention) -> Tensor:
        """Attend densely and pass the tensors on."""
        if self.pending is None:
            raise ValueError("attend must follow update, which passes the keys and values")
        key, value = (tensor.detach().float() for tensor in self.pending)
        out = super().attend(query, mask, params, fast=fast)
        self._visit(LayerTensors(self._number, query.detach().float(), key, value, out.detach().float(), params))
        self.reset()
        return out


@torch.inference_mode()
def each_layer(model: PreTrainedModel, ids: Sequence[int], visit: Callable[[LayerTensors], None]) -> None:
    """Run a model over a text and pass on the tensors of every full-attention layer, in order.

    Args:
        model: an unpatched model; it is unpatched afterwards.
        ids: the text.
        visit: called with a layer's tensors before the next layer runs.
    """
    config = RocketKVConfig(method="full", token_budget=len(ids))
    decoder = find_decoder(model)[0]
    cache = RocketKVCache(decoder.config, config)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, RocketKVLayer):
            cache.layers[number] = _Recorder(config, number, visit)
    with patch(model, config):
        decoder(torch.tensor([list(ids)], device=model.device), **{CACHE_ARGUMENT: cache}, use_cache=True)


def layer_numbers(model: PreTrainedModel) -> list[int]:
    """Return the numbers of the layers that `each_layer` visits."""
    config = RocketKVConfig(method="full", token_budget=1)
    layers = RocketKVCache(find_decoder(model)[0].config, config).layers
    return [number for number, layer in enumerate(layers) if isinstance(layer, RocketKVLayer)]


def feed(layer: RocketKVLayer, tensors: LayerTensors, start: int, stop: int) -> Tensor:
    """Pass tokens `start` to `stop` to a layer as a model does; return [1, n, H, Dv], of a prompt the model's own."""

    def known(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        return tensors.out[:, start:stop]

    key = tensors.key[:, :, start:stop]
    layer.armed = True
    layer.update(key, tensors.value[:, :, start:stop])
    return layer.attend(tensors.query[:, :, start:stop], None, tensors.params, fast=known)


class Stages(NamedTuple):
    """The outputs of the steps, and the method's bytes and tokens.

    Attributes:
        outputs: [m, H, Dv] each, of: full attention, dense attention over the stored tokens, exact top-k of these, the
            method without its residual, and the method.
        step_bytes: read per step by the method (16-bit), all KV heads, mean over steps.
        dense_bytes: read per step by dense attention.
        stored: tokens of the method's longest KV head at the end.
    """

    outputs: list[Tensor]
    step_bytes: float
    dense_bytes: float
    stored: int


@torch.inference_mode()
def stages(tensors: LayerTensors, config: RocketKVConfig, prompt: int) -> Stages:
    """Run a method over a layer's tensors, adding its parts one after the other.

    Args:
        tensors: of the layer.
        config: the method.
        prompt: tokens of the prompt; the others are decoded.
    """
    size = tensors.key.shape[2]
    layer = RocketKVLayer(config)
    layer.prompt_end = prompt
    feed(layer, tensors, 0, prompt)
    split = layer.store.split
    if split is None:
        raise ValueError("the prompt is not closed")
    bare: RocketKVLayer | None = None
    if split.residual:
        bare = RocketKVLayer(replace(config, split=replace(split, residual=False, calibrated=False)))
        bare.prompt_end = prompt
        feed(bare, tensors, 0, prompt)
    steps: list[list[Tensor]] = []
    read: list[int] = []
    dense: list[int] = []
    for token in range(prompt, size):
        stats = layer.stats()  # of the next step
        read.append(stats.nominal_step_bytes)
        dense.append(stats.nominal_dense_step_bytes)
        query = tensors.query[:, :, token]
        own = feed(layer, tensors, token, token + 1)[:, 0]
        # Without a residual these are one stage.
        without = own if bare is None else feed(bare, tensors, token, token + 1)[:, 0]
        keys, values = tensors.key[:, :, : token + 1], tensors.value[:, :, : token + 1]
        full = attend(query, keys, values, tensors.params)
        steps.append([full, *_stored_attention(layer, query, split, tensors.params), without, own])
    outputs = [torch.cat(stage) for stage in zip(*steps, strict=True)]
    return Stages(outputs, fmean(read), fmean(dense), layer.store.stored)


def _stored_attention(
    layer: RocketKVLayer, query: Tensor, split: BudgetSplit, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """Return attention [1, H, Dv] to all stored tokens, and to the k of them with the largest true weight."""
    store = layer.store
    if store.keys is None or store.values is None:
        raise ValueError("there are no tokens")
    stored = store.stored
    keys, values = store.keys[:, :, :stored], store.values[:, :, :stored]
    lengths = None if store.uniform else store.decoding.buffers.seq_lens
    mask = None if lengths is None else torch.arange(stored, device=keys.device) < lengths[..., None]
    dense = attend(query, keys, values, params, mask=mask)
    if split.top_k is None or stored <= split.token_budget:  # every step attends to all tokens
        return dense, dense
    grouped = query.view(1, keys.shape[1], -1, query.shape[-1])
    logits = torch.matmul(grouped * params.scaling, keys.transpose(-1, -2)).flatten(1, 2)
    if params.softcap is not None:
        logits = torch.tanh(logits / params.softcap) * params.softcap
    positions, _ = select(
        logits,
        min(split.top_k, stored),
        stored=stored,
        lengths=lengths,
        kv_heads=keys.shape[1],
        unit_size=1,
        sinks=params.sinks,
        protected=split.protected,
        by_largest=split.by_largest,
    )
    real = None if lengths is None else positions < lengths[..., None]
    return dense, attend(query, keys, values, params, positions, mask=real)


@torch.inference_mode()
def layer_figures(tensors: LayerTensors, config: RocketKVConfig, prompt: int, error: float) -> LayerDict:
    """Return all figures of a layer on a text.

    Args:
        tensors: of the layer.
        config: the method.
        prompt: tokens of the prompt; the others are the steps.
        error: of the oracles, relative L2.

    Raises:
        ValueError: weights or values are not finite.
    """
    kv_heads, size = tensors.key.shape[1], tensors.key.shape[2]
    group = tensors.query.shape[1] // kv_heads
    steps = size - prompt
    run = stages(tensors, config, prompt)
    by_head = [output.view(steps, kv_heads, -1) for output in run.outputs]
    own = tensors.out[0, prompt:].reshape(steps, kv_heads, -1)
    sinks = tensors.params.sinks
    heads: list[HeadDict] = []
    for head in range(kv_heads):
        heads_of_group = slice(head * group, (head + 1) * group)
        params = tensors.params._replace(sinks=None if sinks is None else sinks[heads_of_group])
        weights = group_weights(tensors.query[0, heads_of_group, prompt:], tensors.key[0, head], **params._asdict())
        prefixes = smallest_prefixes(weights, tensors.value[0, head], error)
        chosen = union(prefixes)
        outputs = [output[:, head] for output in by_head]
        parts = decompose(outputs, outputs[-1].double() - outputs[0].double())
        heads.append(
            {
                "stored": int(chosen.sum()),
                "stored_prompt": int(chosen[:prompt].sum()),
                "needed": prefixes.sizes.tolist(),
                "evicted_error": parts.errors[0],
                "selected_error": parts.errors[1],
                "indexed_error": parts.errors[2],
                "method_error": parts.errors[3],
                "square": parts.square,
                "products": parts.products,
                "gap": parts.gap,
            }
        )
    return {
        "layer": tensors.number,
        "heads": heads,
        "token_bytes": NOMINAL_ITEMSIZE * (tensors.key.shape[3] + tensors.value.shape[3]),
        "method_bytes": run.step_bytes,
        "dense_bytes": run.dense_bytes,
        "method_stored": run.stored,
        "capture_gap": float((run.outputs[0].view_as(own) - own).norm() / own.norm().clamp(min=1e-30)),
    }


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a measurement.

    Attributes:
        model: its name; part of the journal's keys.
        dtype: of the weights.
        method: the method whose error is split.
        token_budget: its budget.
        context: tokens of a prompt.
        steps: tokens decoded after it.
        error: of the oracles, relative L2.
        bandwidth: of memory, in GB/s, for the latency bound.
    """

    model: str
    dtype: str
    method: str
    token_budget: int
    context: int
    steps: int
    error: float
    bandwidth: float


def measure(
    model: PreTrainedModel, windows: Sequence[Window], settings: Settings, journal: Journal, progress: Progress
) -> list[list[LayerDict]]:
    """Return the figures of every text and layer; those in the journal are not measured again.

    Args:
        model: an unpatched model.
        windows: the texts, of `context + steps` tokens each.
        settings: of the measurement.
        journal: of earlier runs in the same folder.
        progress: advances by one for each text and layer.

    Raises:
        ValueError: a text has another length, is too long for the model, or the model has no layer to compress.
    """
    size = settings.context + settings.steps
    numbers = layer_numbers(model)
    if not numbers:
        raise ValueError(f"{type(model).__name__} has no layer of full attention: there is nothing to compress")
    most = getattr(find_decoder(model)[0].config, "max_position_embeddings", None) or size
    if size > most:
        raise ValueError(f"context and steps must be at most {most} tokens together, the model's; got {size}")
    config = RocketKVConfig(method=settings.method, token_budget=settings.token_budget)
    found = []
    for place, window in enumerate(windows):
        if len(window.ids) != size:
            raise ValueError(f"a text must have {size} tokens, for the prompt and the steps; got {len(window.ids)}")
        measured = {name: value for name, value in asdict(settings).items() if name != "bandwidth"}
        base = [VERSION, __version__, torch.__version__, transformers.__version__, measured, window.ids]
        keys = {number: digest([*base, number]) for number in numbers}
        name = f"text {place + 1} of {len(windows)}"

        def visit(tensors: LayerTensors, keys: Mapping[int, str] = keys, name: str = name) -> None:
            if journal.get(keys[tensors.number]) is None:
                progress.say(f"{name}: layer {tensors.number}")
                journal.put(keys[tensors.number], layer_figures(tensors, config, settings.context, settings.error))
                progress.step()

        missing = [number for number in numbers if journal.get(keys[number]) is None]
        for _ in range(len(numbers) - len(missing)):
            progress.step()
        if missing:
            progress.say(f"{name}: reading {size} tokens")
            each_layer(model, window.ids, visit)
        found.append([journal.get(keys[number]) for number in numbers])
    return found
