"""CUDA graphs on a CPU, for tests of what captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor


class FakeGraphs:
    """CUDA graphs on a CPU: what is called while one is captured is only taken down, and replays carry it out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing: list[Callable[[], Any]] | None = None
        fakes = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], Any]] = []

            def replay(self) -> None:
                for call in self.calls:
                    call()

        class Event:
            def __init__(self, **options: Any) -> None: ...

            def record(self) -> None: ...

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return 1.0

        class Stream:
            def wait_stream(self, other: Stream) -> None: ...

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            fakes.capturing = graph.calls
            yield
            fakes.capturing = None

        for name, value in (("CUDAGraph", Graph), ("graph", capture), ("Event", Event), ("Stream", Stream)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def wrap(self, function: Callable[..., Tensor], shape: tuple[int, ...]) -> Callable[..., Tensor]:
        """Return a function that can be captured and gives tensors of that shape."""

        def call(*args: Any) -> Tensor:
            if self.capturing is None:
                return function(*args)
            out = torch.zeros(shape)
            self.capturing.append(lambda: out.copy_(function(*args)))
            return out

        return call
