"""Record which tokens a run keeps, which of them its decode steps read, and the attention weight that the steps miss.

Letters: B batch, H query heads, Hkv KV heads, G = H/Hkv, D head dim, N stored tokens, k selected tokens.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..core.decode import selected_slots
from ..core.params import AttentionParams
from ..core.topk import full_precision
from .store import KVStore


class Report(Protocol):
    """The part of a `StepReport` that a trace reads; the report's module imports this one."""

    position: int


@dataclass(frozen=True, eq=False)
class LayerReads:
    """The tokens that a decode step attends to in one layer.

    The weights are exact: a softmax over all stored tokens, so that `weights.sum(-1) + missed` is 1, or less with
    learned sinks.

    Attributes:
        positions: [B, Hkv, k] int32, positions in the sequence, -1 for none; on the CPU.
        weights: [B, H, k] float32, each head's attention weight on those tokens, 0 for none; on the CPU.
        missed: [B, H] float32, its weight on stored tokens that the step does not attend to; on the CPU.
    """

    positions: Tensor
    weights: Tensor
    missed: Tensor


@dataclass(frozen=True, eq=False)
class TracedStep:
    """The reads of one decode step.

    Attributes:
        position: position of the step's token in the sequence.
        layers: the reads by layer number, in the layers' order.
    """

    position: int
    layers: dict[int, LayerReads] = field(default_factory=dict)


class Trace:
    """A record of one generation, for `rocketkv.patch(model, ..., on_step=Trace())`; `rocketkv.figures` draws it.

    It begins anew at each prompt's end. In every layer, a traced step selects a second time and computes the weights of
    all stored tokens. A reaction (`on_loss`) is not in the record, and the last steps may be those of rejected drafts.

    Attributes:
        kept: by layer number, the positions of the prompt's tokens that stage 1 kept, [B, Hkv, N] int32, -1 for none;
            on the CPU. Empty before the first decode step.
        steps: the decode steps, in order.

    Examples:
        >>> import rocketkv, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2))
        >>> trace = rocketkv.Trace()
        >>> with rocketkv.patch(model, token_budget=256, on_step=trace):
        ...     tokens = model.generate(torch.randint(3, 1000, (1, 2000)), max_new_tokens=4, do_sample=False)
        >>> [step.position for step in trace.steps]
        [2000, 2001, 2002]
        >>> trace.steps[0].layers[1].positions.shape  # half of the budget, less one for two means
        torch.Size([1, 4, 127])

        A figure, for `plotly.graph_objects.Figure`:

        >>> from rocketkv import figures
        >>> figure = figures.missed(trace)
    """

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}
        self.steps: list[TracedStep] = []
        self._open: dict[int, TracedStep] = {}  # drafts pass several steps through a layer before the next layer

    def __call__(self, report: Report) -> None:
        """Add the step that all layers have ended."""
        ended = self._open.pop(report.position)
        self._drop_from(ended.position)
        self.steps.append(ended)

    def begin(self) -> None:
        """Begin a generation: drop everything."""
        self.kept.clear()
        self.steps.clear()
        self._open.clear()

    def _drop_from(self, position: int) -> None:
        """Drop steps that a crop or a rollback has undone."""
        while self.steps and self.steps[-1].position >= position:
            self.steps.pop()

    def note(self, number: int, store: KVStore, query: Tensor, params: AttentionParams) -> None:
        """Note the reads of one layer's step.

        Args:
            number: number of the layer in the model.
            store: the layer's store, which includes the step's token.
            query: [B, H, D], the step's query.
            params: the model's attention parameters.
        """
        position, decoding = store.seen - 1, store.decoding
        if number not in self.kept:
            places = decoding.positions[:, :, : store.stored]
            places = places.masked_fill(places >= decoding.prompt_end, -1)
            self.kept[number] = places[:, :, : decoding.prompt_stored].cpu()
        step = self._open.setdefault(position, TracedStep(position))
        step.layers[number] = step_reads(store, query, params)


@torch.no_grad()
def step_reads(store: KVStore, query: Tensor, params: AttentionParams) -> LayerReads:
    """Return the tokens that a layer's last step attended to, and their exact weights.

    Args:
        store: the layer's store, which includes the step's token.
        query: [B, H, D], the step's query.
        params: the model's attention parameters.
    """
    buffers, split, stored = store.decoding.buffers, store.decoding.split, store.stored
    lengths = None if store.uniform else buffers.seq_lens
    mask: Tensor | None = None
    if split.top_k is None or stored <= split.token_budget:
        slots = torch.arange(stored, device=query.device).expand(*buffers.seq_lens.shape, stored)
    else:
        index, shortest = store.decoding.index, store.shortest
        slots, mask, _ = selected_slots(
            query, buffers, index, split, params, stored=stored, shortest=shortest, lengths=lengths
        )
    slots = slots.long()
    real = slots < buffers.seq_lens[..., None] if mask is None else mask & (slots < buffers.seq_lens[..., None])
    weight = _weights(query, buffers.keys[:, :, :stored], buffers.seq_lens, params)  # [B, Hkv, G, N]
    # Slots that do not count point behind the last token.
    own = torch.nn.functional.pad(weight, (0, 1))
    places = torch.where(real, slots, stored)[:, :, None].expand(*weight.shape[:3], -1)
    missed = own.scatter(-1, places, 0.0).sum(-1)
    positions = torch.where(real, buffers.positions.gather(2, slots.clamp(max=stored - 1)), -1)
    return LayerReads(positions.cpu(), own.gather(-1, places).flatten(1, 2).cpu(), missed.flatten(1, 2).cpu())


def _weights(query: Tensor, keys: Tensor, seq_lens: Tensor, params: AttentionParams) -> Tensor:
    """Return each head's exact attention weights on the stored tokens, [B, Hkv, G, N] float32."""
    batch, kv_heads, stored, _ = keys.shape
    rows = query.float().view(batch, kv_heads, -1, query.shape[-1])
    with full_precision(query.device):
        logits = torch.matmul(rows * params.scaling, keys.float().transpose(-1, -2))
    if params.softcap is not None:
        logits = torch.tanh(logits / params.softcap) * params.softcap
    empty = torch.arange(stored, device=keys.device) >= seq_lens[..., None]
    logits = logits.masked_fill(empty[:, :, None], -torch.inf)
    if params.sinks is None:
        return logits.softmax(-1).nan_to_num(nan=0.0)
    sinks = params.sinks.float().view(1, kv_heads, -1, 1).expand(*logits.shape[:3], 1)
    return torch.cat((logits, sinks), -1).softmax(-1)[..., :stored]
