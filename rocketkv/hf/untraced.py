"""Run code eagerly inside `torch.compile`; imported only where something is compiled, which takes seconds."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's own is not typed
def call_untraced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function eagerly, outside of the compiled code that calls it."""
    return function(*args, **kwargs)
