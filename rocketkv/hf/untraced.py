"""A way out of `torch.compile`; imported only where something is compiled, since that takes seconds."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch's own is not typed
def call_untraced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function eagerly, with all that it calls and that is not compiled for itself."""
    return function(*args, **kwargs)
