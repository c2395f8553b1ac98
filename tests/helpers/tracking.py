"""What PyTorch does underneath: which operations run, and how much memory their outputs hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that move nothing.
VIEWS = {"view", "_unsafe_view", "select", "unsqueeze", "transpose", "slice", "expand", "detach", "alias", "squeeze"}

# Operations that make the host wait for a device.
SYNCS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Tracker(TorchDispatchMode):
    """Count the live bytes of every storage that appears in an operation's output and was not given as known.

    Attributes:
        peak: the most bytes that lived at once.
        largest: bytes of the largest storage, and the operation that made it.
        operations: names of all operations, in order.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = list(known)
        self.live: dict[int, int] = {}
        self.peak = 0
        self.largest: tuple[int, str] = (0, "")
        self.operations: list[str] = []

    def __enter__(self) -> Tracker:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operations.append(name)
        known = {tensor.untyped_storage()._cdata for tensor in self.known}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.live:
                    self._add(storage, name)
        return result

    def _add(self, storage: torch.UntypedStorage, name: str) -> None:
        place, size = storage._cdata, storage.nbytes()
        self.live[place] = size
        weakref.finalize(storage, self.live.pop, place, None)
        self.peak = max(self.peak, sum(self.live.values()))
        self.largest = max(self.largest, (size, name))

    def syncs(self) -> list[str]:
        """Return the operations that made the host wait."""
        return [name for name in self.operations if name in SYNCS]


class Operators(TorchDispatchMode):
    """Collect the names of the operators that PyTorch runs and that are no views: a bound of the launches on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
