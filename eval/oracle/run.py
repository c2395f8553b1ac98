"""Run the oracles over a model and texts: true queries, keys and values of every layer, one layer at a time.

A text is one forward of the model as it is, which is what teacher forcing comes to: the token after the prompt's last
is read after the prompt, and so on, whatever the model would have written. What each full-attention layer is given is
taken down on the way, in float32: bounds come from it directly, and the method's outputs from a cache layer of the
library's own that reads the same tokens, the prompt and then a token at a time. So a method needs nothing to be known
here but its settings.

Sliding-window layers and others that no method compresses have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple, TypedDict

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..._version import __version__
from ...budget import BudgetSplit
from ...config import RocketKVConfig
from ...core.attention import attend, select
from ...core.masks import LazyMask
from ...hf.cache import RocketKVCache
from ...hf.handover import claim
from ...hf.layer import RocketKVLayer
from ...hf.models import CACHE_ARGUMENT, find_decoder
from ...hf.patch import patch
from ...hf.prefill import FastAttention
from ..journal import Journal
from ..measures.kl import Window
from ..progress import Progress
from ..records import digest
from .bounds import decompose, group_weights, smallest_prefixes, union

VERSION = 2
NOMINAL_ITEMSIZE = 2  # bytes of an element, as budgets count


class Taken(NamedTuple):
    """What one layer is given in a forward over a text, and what it makes of it.

    Attributes:
        number: the layer's, in the model.
        query: [1, H, S, D] float32, after rotary embedding.
        key: [1, Hkv, S, D] float32, likewise.
        value: [1, Hkv, S, Dv] float32.
        out: [1, S, H, Dv] float32, the model's own attention.
        exact: scaling, softcap and sinks.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    exact: dict[str, Any]


class HeadDict(TypedDict):
    """One KV head's figures on one text; tokens, and relative L2 errors."""

    stored: int  # storage oracle: union of the steps' prefixes
    stored_prompt: int  # those of the prompt among them
    needed: list[int]  # compute oracle: each step's prefix
    evicted_error: float  # dense attention over what stage 1 keeps
    selected_error: float  # exact top-k of what is stored, at the method's k: the selection oracle
    indexed_error: float  # the method without its residual; the method itself where it has none
    method_error: float
    square: float  # see `oracle.Parts`
    products: list[float]
    gap: float


class LayerDict(TypedDict):
    """One layer's figures on one text."""

    layer: int
    heads: list[HeadDict]
    token_bytes: int  # K and V of one token and KV head, in 16 bits
    method_bytes: float  # that the method reads a step, all KV heads, as budgets count, mean over steps
    dense_bytes: float  # that dense attention reads
    method_stored: int  # tokens the longest KV head of the method stores at the end
    capture_gap: float  # relative distance of the attention computed here from the model's own


class _Tap(RocketKVLayer):
    """A layer that keeps everything, shows what it is given, and forgets it again."""

    def __init__(self, config: RocketKVConfig, number: int, visit: Callable[[Taken], None]) -> None:
        super().__init__(config)
        self._number, self._visit = number, visit

    def attend(
        self,
        query: Tensor,
        mask: LazyMask | None,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        fast: FastAttention,
    ) -> Tensor:
        """Attend as any layer, and show it."""
        if self.pending is None:
            raise ValueError("attend follows update, which hands the keys and values over")
        key, value = (tensor.detach().float() for tensor in self.pending)
        exact: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        out = super().attend(query, mask, fast=fast, **exact)
        self._visit(Taken(self._number, query.detach().float(), key, value, out.detach().float(), exact))
        self.reset()
        return out


@torch.inference_mode()
def each_layer(model: PreTrainedModel, ids: Sequence[int], visit: Callable[[Taken], None]) -> None:
    """Run a model over a text and show every full-attention layer, in their order.

    Args:
        model: a model to which no method is attached; none is afterwards.
        ids: the text.
        visit: called with what a layer was given, before the next one is run.
    """
    config = RocketKVConfig(method="full", token_budget=len(ids))
    decoder = find_decoder(model)[0]
    cache = RocketKVCache(decoder.config, config)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, RocketKVLayer):
            cache.layers[number] = _Tap(config, number, visit)
    with patch(model, config):
        decoder(torch.tensor([list(ids)], device=model.device), **{CACHE_ARGUMENT: cache}, use_cache=True)


def layer_numbers(model: PreTrainedModel) -> list[int]:
    """Return the numbers of the layers that `each_layer` shows."""
    config = RocketKVConfig(method="full", token_budget=1)
    layers = RocketKVCache(find_decoder(model)[0].config, config).layers
    return [number for number, layer in enumerate(layers) if isinstance(layer, RocketKVLayer)]


def _feed(layer: RocketKVLayer, taken: Taken, start: int, stop: int) -> Tensor:
    """Give a layer some tokens as a model does; return [1, n, H, Dv]. Nobody reads what it makes of a prompt."""

    def unread(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    key = taken.key[:, :, start:stop]
    layer.armed = True
    layer.update(key, taken.value[:, :, start:stop])
    claim(key)
    return layer.attend(taken.query[:, :, start:stop], None, fast=unread, **taken.exact)


class Stages(NamedTuple):
    """The outputs of the steps, [m, H, Dv] each, and what the method read and stored.

    Attributes:
        outputs: full attention, dense over what is stored, exact top-k of it, the method without its residual, and the
            method.
        step_bytes: the method's, of all KV heads, as budgets count; mean over steps.
        dense_bytes: of dense attention.
        stored: tokens of the method's longest KV head at the end.
    """

    outputs: list[Tensor]
    step_bytes: float
    dense_bytes: float
    stored: int


@torch.inference_mode()
def stages(taken: Taken, config: RocketKVConfig, prompt: int) -> Stages:
    """Run a method over what a layer was given, with its parts put in one after the other.

    Args:
        taken: a layer's text.
        config: the method.
        prompt: tokens of the prompt; the others are decoded.
    """
    size = taken.key.shape[2]
    layer = RocketKVLayer(config)
    layer.prompt_end = prompt
    _feed(layer, taken, 0, prompt)
    split = layer.store.split
    if split is None:
        raise ValueError("the prompt is not closed")
    bare: RocketKVLayer | None = None
    if split.residual:
        bare = RocketKVLayer(replace(config, split=replace(split, residual=False, calibrated=False)))
        bare.prompt_end = prompt
        _feed(bare, taken, 0, prompt)
    found: list[list[Tensor]] = [[], [], [], [], []]
    read: list[int] = []
    dense: list[int] = []
    for token in range(prompt, size):
        stats = layer.stats()  # of the step that comes
        read.append(stats.nominal_step_bytes)
        dense.append(stats.nominal_dense_step_bytes)
        query = taken.query[:, :, token]
        own = _feed(layer, taken, token, token + 1)[:, 0]
        # Without a residual these are one stage.
        without = own if bare is None else _feed(bare, taken, token, token + 1)[:, 0]
        keys, values = taken.key[:, :, : token + 1], taken.value[:, :, : token + 1]
        steps = (attend(query, keys, values, **taken.exact), *_stored_attention(layer, query, split, taken.exact))
        for place, out in enumerate((*steps, without, own)):
            found[place].append(out[0])
    return Stages([torch.stack(outputs) for outputs in found], fmean(read), fmean(dense), layer.store.stored)


def _stored_attention(
    layer: RocketKVLayer, query: Tensor, split: BudgetSplit, exact: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return attention [1, H, Dv] to all that a layer stores, and to the k tokens of largest true weight of that."""
    store = layer.store
    if store.keys is None or store.values is None:
        raise ValueError("there are no tokens")
    stored = store.stored
    keys, values = store.keys[:, :, :stored], store.values[:, :, :stored]
    lengths = None if store.uniform else store.lengths
    mask = None if lengths is None else torch.arange(stored, device=keys.device) < lengths[..., None]
    dense = attend(query, keys, values, mask=mask, **exact)
    if split.top_k is None or stored <= split.token_budget:  # a step attends to all
        return dense, dense
    grouped = query.view(1, keys.shape[1], -1, query.shape[-1])
    logits = torch.matmul(grouped * exact["scaling"], keys.transpose(-1, -2)).flatten(1, 2)
    if exact["softcap"] is not None:
        logits = torch.tanh(logits / exact["softcap"]) * exact["softcap"]
    positions, _ = select(
        logits,
        min(split.top_k, stored),
        stored=stored,
        lengths=lengths,
        kv_heads=keys.shape[1],
        unit_size=1,
        sinks=exact["sinks"],
        protected=split.protected,
        by_largest=split.by_largest,
    )
    real = None if lengths is None else positions < lengths[..., None]
    return dense, attend(query, keys, values, positions, mask=real, **exact)


@torch.inference_mode()
def layer_figures(taken: Taken, config: RocketKVConfig, prompt: int, error: float) -> LayerDict:
    """Return all figures of a layer on a text.

    Args:
        taken: what the layer was given.
        config: the method.
        prompt: tokens of the prompt; the others are the steps.
        error: the oracles', relative L2.

    Raises:
        ValueError: the model gave what is not finite.
    """
    kv_heads, size = taken.key.shape[1], taken.key.shape[2]
    group = taken.query.shape[1] // kv_heads
    steps = size - prompt
    run = stages(taken, config, prompt)
    by_head = [output.view(steps, kv_heads, -1) for output in run.outputs]
    own = taken.out[0, prompt:].reshape(steps, kv_heads, -1)
    sinks = taken.exact["sinks"]
    heads: list[HeadDict] = []
    for head in range(kv_heads):
        heads_of_group = slice(head * group, (head + 1) * group)
        weights = group_weights(
            taken.query[0, heads_of_group, prompt:],
            taken.key[0, head],
            scaling=taken.exact["scaling"],
            softcap=taken.exact["softcap"],
            sinks=None if sinks is None else sinks[heads_of_group],
        )
        prefixes = smallest_prefixes(weights, taken.value[0, head], error)
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
        "layer": taken.number,
        "heads": heads,
        "token_bytes": NOMINAL_ITEMSIZE * (taken.key.shape[3] + taken.value.shape[3]),
        "method_bytes": run.step_bytes,
        "dense_bytes": run.dense_bytes,
        "method_stored": run.stored,
        "capture_gap": float((run.outputs[0].view_as(own) - own).norm() / own.norm().clamp(min=1e-30)),
    }


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        model: its name, which tells it from others in the journal.
        dtype: of the weights.
        method: whose error is split.
        token_budget: its budget.
        context: tokens of a prompt.
        steps: tokens decoded after it.
        error: of the oracles, relative L2.
        bandwidth: GB/s of the memory that the latency bound is for.
    """

    model: str
    dtype: str
    method: str
    token_budget: int
    context: int
    steps: int
    error: float
    bandwidth: float

    def __post_init__(self) -> None:
        for name, least in (("context", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least} tokens, got {getattr(self, name)}")
        if not 0 < self.error < 1:
            raise ValueError(f"error must be between 0 and 1, a share of the output's norm; got {self.error}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive, in GB/s; got {self.bandwidth}")


def measure(
    model: PreTrainedModel, windows: Sequence[Window], settings: Settings, journal: Journal, progress: Progress
) -> list[list[LayerDict]]:
    """Return the figures of every text and layer: those of the journal, and the others made now and put there.

    Args:
        model: a model to which no method is attached.
        windows: the texts, of `context + steps` tokens each.
        settings: what is measured.
        journal: of earlier runs of the same folder.
        progress: with a step for each text and layer.

    Raises:
        ValueError: a text has another length, or the model takes no text of that length or has no layer to compress.
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

        def visit(taken: Taken, keys: Mapping[int, str] = keys, name: str = name) -> None:
            if journal.get(keys[taken.number]) is None:
                progress.say(f"{name}: layer {taken.number}")
                journal.put(keys[taken.number], layer_figures(taken, config, settings.context, settings.error))
                progress.step()

        missing = [number for number in numbers if journal.get(keys[number]) is None]
        for _ in range(len(numbers) - len(missing)):
            progress.step()
        if missing:
            progress.say(f"{name}: reading {size} tokens")
            each_layer(model, window.ids, visit)
        found.append([journal.get(keys[number]) for number in numbers])
    return found
