"""What every test gets: a seed, as many threads as help, and no zeros by luck."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# Kernels are for the interpreter or the compiler from their import on: without a GPU only the former runs them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# PyTorch lists its factory functions once, at the first use of a device context: before they are replaced below.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the real model's tests, which take minutes, so that the others run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("real_model") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Set the threads, before fixtures of any scope do their work."""
    # A real model is quicker with the cores that tests beside it leave free. On tiny tensors threads wait for each
    # other: on a busy machine twenty times longer.
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = max(1, min(4, (os.cpu_count() or 1) // beside))
    torch.set_num_threads(cores if item.get_closest_marker("real_model") else 1)


@pytest.fixture(autouse=True)
def _poison_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new empty tensors with NaN (integers with their least value), so that output nobody wrote shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(torch.nan)
                elif tensor.dtype in (torch.int16, torch.int32, torch.int64):
                    tensor.fill_(torch.iinfo(tensor.dtype).min)
            return tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
