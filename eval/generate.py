"""The decode loop of the harness: a prefill, one token a forward, and several methods after one shared prefill.

Every measurement runs this loop, so that all of them time and compare the same work. Decoding is greedy or
teacher-forced: a caller steps with the loop's own choice (`token`) or with given tokens.

Letters: B batch, S tokens of a prompt, n tokens of a forward, Hkv KV heads, D head dim.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..config import RocketKVConfig
from ..hf.cache import begin_prompt, cache_stats
from ..hf.layer import RocketKVLayer
from ..hf.models import CACHE_ARGUMENT
from ..state.stats import CacheStats
from .methods import Compressed, Full, Method

TAIL = 64  # last tokens of a prompt that every method reads itself after a shared prefill; above any window used here

Ids = Tensor | Sequence[Sequence[int]]
"""Token ids [B, n], or rows of token ids, which are padded on the left where their lengths differ."""


@dataclass(kw_only=True)
class DecodeLoop:
    """Forwards of one batch of sequences over one cache.

    The method of the cache must be attached to the model while the loop runs.

    Attributes:
        model: the model.
        cache: its cache.
        seen: tokens read per row, padding included.
        mask: [B, seen] int64, 0 at padding; None: there is no padding.
        logits: [B, vocabulary], of the last forward.
        token: [B, 1] int64, the most likely next token of each row.
        seconds: wall-clock time of each forward, the choice of `token` included.
        processor_seconds: processor time of each forward.
    """

    model: PreTrainedModel
    cache: Cache
    seen: int = 0
    mask: Tensor | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    token: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def prefill(self, ids: Ids) -> Tensor:
        """Read a prompt in one forward and return the logits [B, vocabulary] after it."""
        begin_prompt(self.cache, self.seen + (ids.shape[1] if isinstance(ids, Tensor) else max(map(len, ids))))
        return self.step(ids)

    @torch.inference_mode()
    def step(self, ids: Ids) -> Tensor:
        """Run one forward and return the logits [B, vocabulary] after it; the attributes record it."""
        device = self.model.device
        ids, valid = _padded(ids, device)
        count = ids.shape[1]
        if valid is not None and self.mask is None:
            self.mask = ids.new_ones(len(ids), self.seen)
        if self.mask is None:
            # Given, as a cache that a press has shortened counts from its own length.
            positions = torch.arange(self.seen, self.seen + count, device=device)[None]
        else:
            self.mask = torch.cat((self.mask, torch.ones_like(ids) if valid is None else valid), dim=1)
            positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
        self.seen += count
        synchronize(device)
        start, processor_start = time.perf_counter(), time.process_time()
        self.logits = self.model(
            ids,
            position_ids=positions,
            attention_mask=self.mask,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self.cache},
        ).logits[:, -1]
        self.token = self.logits.argmax(-1, keepdim=True)
        synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        self.processor_seconds.append(time.process_time() - processor_start)
        return self.logits

    def greedy(self, count: int, ends: Collection[int] = ()) -> Iterator[int]:
        """Yield at most `count` greedy tokens of a single sequence, up to an end token, which is left out.

        The last token is not read, so the cache then holds one token fewer than the sequence.
        """
        for number in range(count):
            if number:
                self.step(self.token)
            token = int(self.token)
            if token in ends:
                return
            yield token

    def fork(self) -> DecodeLoop:
        """Return an independent copy, its cache copied and without times."""
        with torch.inference_mode(False):  # a copy made in inference mode could not be written to outside of it
            return replace(self, cache=copy.deepcopy(self.cache), seconds=[], processor_seconds=[])


def _padded(ids: Ids, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return token ids [B, n] and their mask [B, n] int64, 0 at padding, or None where there is no padding."""
    if isinstance(ids, Tensor):
        return ids.to(device), None
    size = max(map(len, ids))
    tensor = torch.tensor([[0] * (size - len(row)) + list(row) for row in ids], device=device)
    if min(map(len, ids)) == size:
        return tensor, None
    return tensor, torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in ids], device=device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SharedPrefill(NamedTuple):
    """Keys and values of a batch of prompts up to their last `TAIL` tokens, from dense attention.

    All methods prefill densely, so each can continue from here.

    Attributes:
        layers: keys and values [B, Hkv, S - TAIL, D] of each full-attention layer, padded on the left; of any other
            layer, which no method changes, the cache layer itself.
        mask: [B, S - TAIL] int64, 0 at padding; None: there is no padding.
        tails: [B, TAIL] int64, the last tokens.
        size: S - TAIL, tokens of the longest row so far.
    """

    layers: list[tuple[Tensor, Tensor] | CacheLayerMixin]
    mask: Tensor | None
    tails: Tensor
    size: int


def shared_prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> SharedPrefill:
    """Read prompts up to their tails, one by one, with the stock model.

    Args:
        model: a model with no method attached.
        prompts: token ids of each; a single one where the model has layers without full attention.

    Raises:
        ValueError: a prompt has at most `TAIL` tokens, or there are several for layers without full attention.
    """
    if min(map(len, prompts)) <= TAIL:
        raise ValueError(f"a prompt must have more than {TAIL} tokens, got {min(map(len, prompts))}")
    size = max(map(len, prompts)) - TAIL
    rows: list[list[Any]] = []
    for ids in prompts:
        loop = DecodeLoop(model=model, cache=Full().new_cache(model, len(ids)))
        loop.prefill([ids[:-TAIL]])
        rows.append(list(loop.cache.layers))
    joined: list[tuple[Tensor, Tensor] | CacheLayerMixin] = []
    for layer_of_rows in zip(*rows, strict=True):
        if type(layer_of_rows[0]) in (DynamicLayer, RocketKVLayer):
            keys = [F.pad(layer.keys, (0, 0, size - layer.keys.shape[2], 0)) for layer in layer_of_rows]
            values = [F.pad(layer.values, (0, 0, size - layer.values.shape[2], 0)) for layer in layer_of_rows]
            joined.append((torch.cat(keys), torch.cat(values)))
        elif len(prompts) == 1:
            joined.append(layer_of_rows[0])
        else:
            raise ValueError(
                f"layers without full attention, as {type(model).__name__} has, take one prompt, got {len(prompts)}"
            )
    _, mask = _padded([ids[:-TAIL] for ids in prompts], model.device)
    tails = torch.tensor([list(ids[-TAIL:]) for ids in prompts], device=model.device)
    return SharedPrefill(joined, mask, tails, size)


def continue_prefill(model: PreTrainedModel, method: Method, shared: SharedPrefill) -> DecodeLoop:
    """Return a loop that has read the whole prompts by a method, which must be attached to the model.

    Args:
        model: the model.
        method: compresses at the prompts' end.
        shared: stays unchanged.
    """
    size = shared.size
    cache = method.new_cache(model, size + TAIL)
    valid = None if shared.mask is None else shared.mask.bool()
    for number, read in enumerate(shared.layers):
        layer: Any = cache.layers[number]
        if not isinstance(read, tuple):
            cache.layers[number] = copy.deepcopy(read)
        elif isinstance(layer, RocketKVLayer):
            layer.store.extend(*read, valid, expected=size + TAIL)
        else:
            cache.update(*read, number)
    loop = DecodeLoop(model=model, cache=cache, seen=size, mask=shared.mask)
    loop.prefill(shared.tails)
    return loop


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One greedy generation.

    Attributes:
        text: the new tokens, decoded.
        first_token_seconds: of the prefill, stage 1 included.
        step_seconds: of each decode step.
        stats: of the cache at the end.
    """

    text: str
    first_token_seconds: float
    step_seconds: tuple[float, ...]
    stats: CacheStats

    @property
    def tokens_per_second(self) -> float:
        """One over the median step."""
        return 1.0 / median(self.step_seconds)


def measured_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    config: RocketKVConfig | None,
    *,
    new_tokens: int = 16,
) -> Generation:
    """Generate greedily after one prompt and measure it.

    Args:
        model: a model that is not patched; it is not patched afterwards either.
        tokenizer: its tokenizer.
        prompt: plain text.
        config: how to compress; None for the stock model and its own cache.
        new_tokens: tokens to generate, at least 2; an end token does not end the generation.

    Raises:
        ValueError: `new_tokens` is less than 2.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2, one for the prefill and one step to time; got {new_tokens}")
    method: Method = Full() if config is None else Compressed(config)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    with method.attached(model):
        loop = DecodeLoop(model=model, cache=method.new_cache(model, len(ids)))
        loop.prefill([ids])
        written = list(loop.greedy(new_tokens))
    first, *steps = loop.seconds
    text = str(tokenizer.decode(written, skip_special_tokens=True))
    return Generation(text=text, first_token_seconds=first, step_seconds=tuple(steps), stats=cache_stats(loop.cache))
