"""Arms of `latency`: the methods of a sweep, and two baselines that other tasks have no use for.

- `full`: the stock model and transformers' own cache;
- `dense`: a preallocated cache and the fastest attention of the device (`dense.py`);
- `compiled:full`: the stock model's decode steps under `torch.compile`, over transformers' static cache;
- `compiled:METHOD`: those of a method of the library, over its static buffers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from ...hf.compiled import uncompiled_reason
from ...hf.layer import rocketkv_layers
from ...hf.models import find_decoder
from ...hf.patch import patch
from ..methods import FULL, Compressed, Full, Method, find_method
from .dense import DENSE, Dense

COMPILED = "compiled:"


def latency_alone(name: str) -> bool:
    """Whether a method runs in the task `latency` alone."""
    return name == DENSE or name.startswith(COMPILED)


def find_arm(name: str, token_budget: int | None, settings: Mapping[str, Any], *, new_tokens: int) -> Method:
    """Return a method by name, that of `find_method` or of this file.

    Args:
        name: see the module.
        token_budget: tokens a decode step; None for `full`, `dense` and `compiled:full`.
        settings: fields of `RocketKVConfig` for the library's methods.
        new_tokens: to be generated after each prompt.

    Raises:
        ValueError: see `find_method`; or the method cannot be compiled.
        TypeError: see `find_method`.
        ImportError: likewise.
    """
    if not latency_alone(name):
        return find_method(name, token_budget, settings)
    inner = name.removeprefix(COMPILED)
    if inner in (DENSE, FULL):
        if name == COMPILED + DENSE:
            raise ValueError(f"{name} has no static shapes; ask for {COMPILED}{FULL}, over transformers' static cache")
        if settings or token_budget is not None:
            raise ValueError(f"method {name!r} takes neither a budget nor settings")
        return Dense(new_tokens=new_tokens) if name == DENSE else CompiledStock(new_tokens=new_tokens)
    found = find_method(inner, token_budget, {"decode_capacity": new_tokens, **settings})
    if not isinstance(found, Compressed):
        raise ValueError(f"{name} must name a method of the library, or {FULL}")
    return CompiledMethod(baseline=found)


@dataclass(eq=False, kw_only=True)
class CompiledMethod:
    """A method of the library, its decode steps under `torch.compile`.

    Attributes:
        baseline: the same method, run eagerly.
        options: of `torch.compile`, in place of CUDA graphs.
        forward: runs a forward while the method is attached.
    """

    baseline: Compressed
    options: Mapping[str, Any] = field(default_factory=dict)
    forward: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The name in records."""
        return COMPILED + self.baseline.name

    @property
    def token_budget(self) -> int | None:
        """The budget."""
        return self.baseline.token_budget

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Patch the model inside the context."""
        with patch(model, self.baseline.config) as handle:
            self.forward = handle.compile_step(**self.options)
            try:
                yield
            finally:
                self.forward = None

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Return an empty static cache.

        Raises:
            ValueError: its decode steps cannot be compiled.
        """
        cache = self.baseline.new_cache(model, prompt_length)
        reason = uncompiled_reason(cache)
        if reason is not None:
            raise ValueError(f"{self.name} cannot be compiled: {reason}")
        return cache


@dataclass(eq=False, kw_only=True)
class CompiledStock:
    """The stock model over transformers' static cache, its decode steps under `torch.compile`.

    Attributes:
        new_tokens: room after the prompt.
        options: of `torch.compile`, in place of CUDA graphs.
        baseline: the method that it must agree with.
        forward: runs a forward while the method is attached.
    """

    new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = COMPILED + FULL
    token_budget: int | None = None
    baseline: Method = field(default_factory=Full)
    forward: Callable[..., Any] | None = None

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Compile the model's forward for the context, and leave the model as it is."""
        named = dict(self.options) or {"mode": "reduce-overhead"}  # CUDA graphs
        compiled = torch.compile(model.__call__, fullgraph=True, **named)
        positioned = "cache_position" in inspect.signature(model.forward).parameters  # transformers before 5

        def forward(ids: Tensor, **more: Any) -> Any:
            if positioned:
                more["cache_position"] = more["position_ids"][0]
            if ids.shape[1] > 1:
                return model(ids, **more)
            if ids.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # PyTorch's own
            return compiled(ids, **more)

        self.forward = forward
        try:
            yield
        finally:
            self.forward = None

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Return an empty static cache.

        Raises:
            ValueError: the prompt's length is not known.
        """
        if prompt_length is None:
            raise ValueError(f"{self.name} needs the prompt's length to allocate its cache")
        room = prompt_length + self.new_tokens
        return StaticCache(config=find_decoder(model)[0].config, max_cache_len=room)


def what_ran(model: PreTrainedModel, method: Method, cache: Any) -> dict[str, Any]:
    """Return what a method ran on: cache, attention, backend of the decode steps, and whether they were compiled.

    Args:
        model: the model, to which the method is attached.
        method: the method.
        cache: after the decode steps.
    """
    layers = rocketkv_layers(cache)
    ran: dict[str, Any] = {
        "cache": type(cache).__name__,
        "attention": find_decoder(model)[0].config._attn_implementation,
        "backend": sorted({layer.backend for layer in layers}) if layers else None,
        "compiled": getattr(method, "forward", None) is not None,
    }
    if isinstance(method, Dense):
        ran |= {"cache": "preallocated", "attention": method.attention, "attention_milliseconds": dict(method.tried)}
    return ran
