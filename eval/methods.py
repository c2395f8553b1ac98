"""Methods of compression by name: the library's, presses of kvpress, and custom functions.

The names:

- a method of `rocketkv.METHODS`, and `full`, the stock model with its own cache, which takes no budget;
- `kvpress:NAME`, a press class of the kvpress package, which must be installed in the environment that runs it;
- `module:function`, called with the token budget, returning an object with the methods of `Method`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..budget import METHODS
from ..config import RocketKVConfig
from ..hf.cache import RocketKVCache
from ..hf.models import find_decoder
from ..hf.patch import patch

if TYPE_CHECKING:
    from collections.abc import Iterator

FULL = "full"
KVPRESS = "kvpress:"
# Settings of the library's methods that a sweep may set. Method and budget are axes of the sweep; splits and ranges are
# not text, and `patch` would need the tokenizer to find messages.
_NOT_SET = ("method", "token_budget", "split", "protect", "fair_shares", "skip_layers", "layer_budgets")
SETTINGS = tuple(field.name for field in fields(RocketKVConfig) if field.name not in _NOT_SET)


class Method(Protocol):
    """A method at one budget, as the harness uses it.

    A method whose prefill is dense attention, after which only its cache's layers of this library compress, may have an
    attribute `dense_prefill` that is true: then it shares the prefill of a sample with others (`prefill.py`).
    """

    @property
    def name(self) -> str:
        """The name in records."""

    @property
    def token_budget(self) -> int | None:
        """The budget in tokens a decode step, or None where there is none."""

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Return a context inside which the model runs this method, and outside of which it is as before."""

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Return an empty cache for one sequence, whose first prompt has `prompt_length` tokens."""


@dataclass(frozen=True, kw_only=True)
class Full:
    """The stock model and its own cache."""

    name: str = FULL
    token_budget: int | None = None
    dense_prefill: ClassVar[bool] = True

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Return a stock cache."""
        return DynamicCache(config=find_decoder(model)[0].config)


@dataclass(frozen=True)
class Compressed:
    """A method of the library."""

    config: RocketKVConfig
    dense_prefill: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The method's name."""
        return self.config.method

    @property
    def token_budget(self) -> int | None:
        """The budget."""
        return self.config.token_budget

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Patch the model inside the context."""
        with patch(model, self.config):
            yield

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Return a cache that evicts inside the prefill."""
        return RocketKVCache(find_decoder(model)[0].config, self.config, prompt_length=prompt_length)


class Press:
    """A press of kvpress that keeps as many tokens of the prompt as the budget has; no other bytes are counted.

    Args:
        press_name: a class of the kvpress package, with the field `compression_ratio`.
        token_budget: tokens of the prompt that each layer keeps.

    Raises:
        ImportError: kvpress is not installed here.
        ValueError: there is no such class, or it has no `compression_ratio`.
    """

    def __init__(self, press_name: str, token_budget: int) -> None:
        try:
            kvpress = importlib.import_module("kvpress")
        except ImportError as error:
            raise ImportError(
                f"{KVPRESS}{press_name} needs the package kvpress, which does not take every transformers; install it "
                "beside rocketkv[eval] in an environment of its own and name that environment's Python: "
                "--kvpress-python PATH"
            ) from error
        press_class = getattr(kvpress, press_name, None)
        if not isinstance(press_class, type):
            near = difflib.get_close_matches(press_name, dir(kvpress), n=1)
            hint = f" Did you mean {KVPRESS}{near[0]}?" if near else ""
            raise ValueError(f"kvpress has no press {press_name!r}.{hint}")
        self.name = f"{KVPRESS}{press_name}"
        self.token_budget: int | None = token_budget
        self._press = press_class()
        if not hasattr(self._press, "compression_ratio"):
            raise ValueError(
                f"{self.name} has no compression_ratio to set from a token budget, so it cannot be compared"
            )

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Hook the press into the model inside the context."""
        context: AbstractContextManager[None] = self._press(model)
        return context

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        """Return a stock cache, and set the press's ratio for the prompt.

        Raises:
            ValueError: the prompt's length is not known.
        """
        if prompt_length is None:
            raise ValueError("a press needs the prompt's length, which its compression ratio is relative to")
        budget = prompt_length if self.token_budget is None else self.token_budget
        self._press.compression_ratio = max(0.0, 1.0 - budget / prompt_length)
        return DynamicCache(config=find_decoder(model)[0].config)


def find_method(name: str, token_budget: int | None, settings: Mapping[str, Any] | None = None) -> Method:
    """Return a method by name.

    Args:
        name: see the module.
        token_budget: tokens a decode step; `full` takes None.
        settings: fields of `RocketKVConfig` for the library's methods; others take none.

    Raises:
        ValueError: the method is unknown, or a budget or a setting is missing, impossible or not supported.
        TypeError: a setting has the wrong type, or the custom function returned no method.
        ImportError: kvpress or the custom module is not installed.
    """
    settings = dict(settings or {})
    if name == FULL:
        if settings or token_budget is not None:
            raise ValueError(f"method {FULL!r} takes neither a budget nor settings")
        return Full()
    if token_budget is None:
        raise ValueError(f"method {name!r} needs a token budget")
    if name in METHODS:
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; there are {', '.join(SETTINGS)}")
        return Compressed(RocketKVConfig(method=name, token_budget=token_budget, **settings))
    if settings:
        raise ValueError(f"method {name!r} takes no settings; those are the library's own methods'")
    if name.startswith(KVPRESS):
        return Press(name.removeprefix(KVPRESS), token_budget)
    module, separator, function = name.partition(":")
    if not separator:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no method {name!r}.{hint} There are {', '.join(METHODS)}, {KVPRESS}NAME and module:function"
        )
    factory = getattr(importlib.import_module(module), function, None)
    if not callable(factory):
        raise ValueError(f"{module} has no function {function!r} to make a method with")
    method: Method = factory(token_budget)
    missing = [part for part in ("name", "token_budget", "attached", "new_cache") if not hasattr(method, part)]
    if missing:
        raise TypeError(f"{name} must return a method, but what it returned has no {', '.join(missing)}")
    return method
