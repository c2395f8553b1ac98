"""The state of a patch, stored on the patched model."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from ..config import RocketKVConfig
from ..state.monitor import OnStep
from ..state.stats import CacheStats
from .chat import ChatMarks

STATE = "_rocketkv"  # on the patched model: its PatchState


@dataclass(frozen=True, eq=False)
class Finished:
    """A generation that has ended.

    Attributes:
        stats: statistics of its cache, or None if it had none.
        cache: returns the cache, or None once it is gone.
        held: whether this record keeps the cache alive.
    """

    stats: CacheStats | None
    cache: Callable[[], Any]
    held: bool


@dataclass(eq=False)
class PatchState:
    """The patch of a model: all that is needed to run and to undo it. It is copied and pickled with the model.

    Attributes:
        config: the settings in force.
        chat: marks of the chat template, or None without a tokenizer.
        former_configs: modules and their configurations before the patch.
        former: methods in the model's `__dict__` before the patch, by name.
        installed: methods that the patch stored in the model's `__dict__`, by name.
        former_forward: the `forward` in the decoder's `__dict__` before the patch, or None.
        hook: the decoder's forward pre-hook.
        warned: warnings already given.
        on_step: callback for reports of decode steps, or None.
        finished: the last generation that ended, in any thread.
        thread: the running generation of each thread.
        lock: protects `finished`, which threads replace.
    """

    config: RocketKVConfig
    chat: ChatMarks | None = None
    former_configs: list[tuple[nn.Module, PretrainedConfig]] = field(default_factory=list)
    former: dict[str, Any] = field(default_factory=dict)
    installed: dict[str, Any] = field(default_factory=dict)
    former_forward: Callable[..., Any] | None = None
    hook: RemovableHandle | None = None
    warned: set[str] = field(default_factory=set)
    on_step: OnStep | None = None
    finished: Finished | None = None
    thread: threading.local = field(default_factory=threading.local)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of this process and its threads."""
        return self.__dict__ | {"thread": None, "lock": None, "on_step": None, "finished": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with no generation and no callback."""
        self.__dict__.update(state, thread=threading.local(), lock=threading.Lock())

    @property
    def running(self) -> Any:
        """The `Generation` that runs in this thread, or None."""
        return getattr(self.thread, "running", None)

    def release(self) -> None:
        """Drop the reference to the last generation's cache; its stats stay."""
        with self.lock:
            if self.finished is not None and self.finished.held:
                self.finished = Finished(self.finished.stats, no_cache, held=False)


def no_cache() -> None:
    """Return None, the cache of a generation that has none."""


def state_of(model: nn.Module) -> PatchState | None:
    """Return the state of a model's patch, or None if it is not patched."""
    return model.__dict__.get(STATE)
