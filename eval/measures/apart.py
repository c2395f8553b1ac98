"""Latency on a CPU in a process of its own, so that nothing else counts as its memory."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from ...hf.loading import load_model
from .arms import find_arm
from .latency import LatencyResult, measure_latency
from .memory import OutOfMemory

_SIGKILL = -9  # as `multiprocessing` reports it


def measure_apart(**arguments: Any) -> LatencyResult:
    """Call `measure_by_name` in a new process, so that nothing else counts as its memory.

    Raises:
        OutOfMemory: the system killed the process, as Linux does where memory runs out.
        RuntimeError: the process ended without a result for another reason.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(sender, arguments))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    child.join()
    what = f"measuring {arguments['method']} at {arguments['prompt_tokens']} tokens"
    if child.exitcode == _SIGKILL:
        raise OutOfMemory(f"{what}: the system killed the process (SIGKILL), as it does where memory runs out")
    if result is None:
        raise RuntimeError(f"{what} failed with exit code {child.exitcode}")
    if isinstance(result, Exception):
        raise result
    return cast(LatencyResult, result)


def _send_result(sender: Connection, arguments: dict[str, Any]) -> None:
    """Send the result of `measure_by_name`, or its exception."""
    try:
        sender.send(measure_by_name(**arguments))
    except Exception as error:  # noqa: BLE001  # the parent raises it
        sender.send(error)


def measure_by_name(
    *,
    model: str,
    dtype: str,
    method: str,
    token_budget: int | None,
    settings: dict[str, Any],
    threads: int,
    revision: str | None = None,
    attention: str | None = None,
    **numbers: Any,
) -> LatencyResult:
    """Load a model on the CPU and measure a method.

    Args:
        model: see `load_model`.
        dtype: of the weights, such as `float32`.
        method: see `find_arm`.
        token_budget: likewise.
        settings: likewise.
        threads: of PyTorch.
        revision: see `load_model`.
        attention: likewise.
        numbers: see `measure_latency`.
    """
    torch.set_num_threads(threads)
    found = find_arm(method, token_budget, settings, new_tokens=numbers["new_tokens"])
    loaded, _ = load_model(model, getattr(torch, dtype), attention=attention, revision=revision)
    return measure_latency(loaded, found, **numbers)
