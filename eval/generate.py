"""The decode loop of the harness: a prefill, and one token a forward.

Every measurement runs this loop, so that all of them time and compare the same work. Decoding is greedy or
teacher-forced: a caller steps with the loop's own choice (`token`) or with given tokens.

Letters: B batch, S tokens of a prompt, n tokens of a forward, Hkv KV heads, D head dim.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from ..config import RocketKVConfig
from ..hf.cache import RocketKVCache, begin_prompt, cache_stats
from ..hf.fork import copy_layer
from ..hf.models import CACHE_ARGUMENT
from ..state.stats import CacheStats
from .methods import Compressed, Full, Method

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
        forward: runs the forwards in place of the model, such as one that is compiled; None: the model does.
        seconds: wall-clock time of each forward, the choice of `token` included.
        processor_seconds: processor time of each forward.
    """

    model: PreTrainedModel
    cache: Cache
    seen: int = 0
    mask: Tensor | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    token: Tensor = field(default_factory=lambda: torch.empty(0))
    forward: Callable[..., Any] | None = None
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
        self.logits = (self.forward or self.model)(
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

    def greedy(
        self, count: int, ends: Collection[int] = (), choose: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[int]:
        """Yield at most `count` greedy tokens of a single sequence, up to an end token, which is left out.

        The last token is not read, so the cache then holds one token fewer than the sequence.

        Args:
            count: most tokens.
            ends: end tokens.
            choose: returns the next token [1, 1] from logits [1, vocabulary] in place of the most likely one.
        """
        for number in range(count):
            if number:
                self.step(self.token)
            if choose is not None:
                self.token = choose(self.logits)
            token = int(self.token)
            if token in ends:
                return
            yield token

    def snapshot(self) -> LoopSnapshot:
        """Return the present state, for `rollback`; it has no times."""
        return LoopSnapshot(self.seen, self.mask, self.logits, self.token, _cache_state(self.cache))

    def rollback(self, taken: LoopSnapshot) -> None:
        """Return to a state of this loop, any number of times."""
        self.seen, self.mask, self.logits, self.token = taken[:4]
        if isinstance(self.cache, RocketKVCache):
            self.cache.rollback(taken.cache)
        elif isinstance(taken.cache, list):
            self.cache.layers[:] = [copy_layer(layer) for layer in taken.cache]
        else:
            self.cache = _copied(taken.cache)


class LoopSnapshot(NamedTuple):
    """The state of a `DecodeLoop` at one time: its fields, and the state of its cache."""

    seen: int
    mask: Tensor | None
    logits: Tensor
    token: Tensor
    cache: Any


def _cache_state(cache: Cache) -> Any:
    """Return the state of a cache: without copies of keys and values where it is this library's or a stock one."""
    if isinstance(cache, RocketKVCache):
        return cache.snapshot()
    return [copy_layer(layer) for layer in cache.layers] if type(cache) is DynamicCache else _copied(cache)


def _copied(cache: Cache) -> Cache:
    with torch.inference_mode(False):  # a copy made in inference mode could not be written to outside of it
        return copy.deepcopy(cache)


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


def alternating_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    configs: Mapping[str, RocketKVConfig | None],
    *,
    new_tokens: int = 16,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Generation]:
    """Generate greedily after one prompt with several configurations, whose steps alternate.

    So all of them share the machine's other load, and their medians can be compared.

    Args:
        model: a model that is not patched; it is not patched afterwards either.
        tokenizer: its tokenizer.
        prompt: plain text.
        configs: by name, how to compress; None for the stock model and its own cache.
        new_tokens: tokens to generate, at least 2; an end token does not end the generation.
        say: called with what happens next.

    Raises:
        ValueError: `new_tokens` is less than 2.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2, one for the prefill and one step to time; got {new_tokens}")
    ids: list[int] = tokenizer(prompt)["input_ids"]
    methods: dict[str, Method] = {
        name: Full() if config is None else Compressed(config) for name, config in configs.items()
    }
    loops: dict[str, DecodeLoop] = {}
    written: dict[str, list[int]] = {}
    for name, method in methods.items():
        say(f"{name}: reading {len(ids)} tokens")
        with method.attached(model):
            loops[name] = DecodeLoop(model=model, cache=method.new_cache(model, len(ids)))
            loops[name].prefill([ids])
        written[name] = [int(loops[name].token)]
    say(f"all in turn: writing {new_tokens} tokens")
    for _ in range(new_tokens - 1):
        for name, method in methods.items():
            with method.attached(model):
                loops[name].step(loops[name].token)
            written[name].append(int(loops[name].token))
    return {
        name: Generation(
            text=str(tokenizer.decode(written[name], skip_special_tokens=True)),
            first_token_seconds=loop.seconds[0],
            step_seconds=tuple(loop.seconds[1:]),
            stats=cache_stats(loop.cache),
        )
        for name, loop in loops.items()
    }
