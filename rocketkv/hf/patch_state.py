"""The state of a patch, which lives on the model that it patches."""

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
        stats: of its cache, or None if it had none.
        cache: returns the cache, or None once it is gone.
        held: whether `cache` keeps it alive.
    """

    stats: CacheStats | None
    cache: Callable[[], Any]
    held: bool


@dataclass(eq=False)
class PatchState:
    """The patch of a model: enough to run it and to undo it. It is copied and pickled with the model.

    Attributes:
        config: the settings in force.
        chat: the chat template's marks, or None where no tokenizer was given.
        former_configs: modules and the configurations that they had.
        former: methods that the model had in its own `__dict__`, by name.
        installed: methods that the patch put there, by name.
        former_forward: the decoder's own `forward` in its `__dict__`, or None.
        hook: the decoder's forward pre-hook.
        warned: warnings that were given.
        on_step: callback for reports of decode steps, or None.
        finished: the last generation that ended, in any thread.
        thread: the running generation of each thread.
        lock: of `finished`, which threads replace.
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
        """Leave out what belongs to this process and its threads."""
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
    """Return None: a generation whose cache is gone."""


def state_of(model: nn.Module) -> PatchState | None:
    """Return what `patch` left on a model, or None where it is not patched."""
    return model.__dict__.get(STATE)
