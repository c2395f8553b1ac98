"""Calls captured in a CUDA graph; without a GPU they are replayed by calling them again."""

from collections.abc import Callable

import torch


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a function that replays a call, which must have run before: kernels are compiled by then."""
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], object] = graph.replay
    return replay


def warmed(call: Callable[[], object], device: torch.device) -> None:
    """Run a call on a stream aside, as a capture needs it."""
    if device.type != "cuda":
        call()
        return
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch's own is not typed
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)


class Noise:
    """Work on a second stream, beside what is tested, that competes for multiprocessors and memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._matrix = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
            self._memory = torch.zeros(2, 2**26, device=device, dtype=torch.uint8)

    def make(self) -> None:
        """Enqueue some, without waiting for it."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._matrix @ self._matrix
                self._memory[0].copy_(self._memory[1])
