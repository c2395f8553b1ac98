"""A press of kvpress, and modules that do not exist."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)


class KeepFirst:
    """A press of no use: after a prompt each layer keeps its first tokens, as many as the ratio leaves."""

    compression_ratio = 0.0

    @contextlib.contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            cache = next(value for value in kwargs.values() if isinstance(value, Cache))
            seen = kwargs["hidden_states"].shape[1]
            if seen > 1 and cache.layers[0].keys.shape[2] == seen:
                kept = round(seen * (1 - self.compression_ratio))
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, :kept].clone(), layer.values[:, :, :kept].clone()
            return output

        last = model.model.layers[-1].self_attn
        handle = last.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
