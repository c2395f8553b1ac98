"""A cache of compiled kernels by dtypes, numbers and constants, so that a launch costs the host little."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

# Older releases take the arguments of a compiled kernel without its constants; interpreted kernels are not compiled.
DIRECT = os.environ.get("TRITON_INTERPRET") != "1" and tuple(
    int(part) for part in triton.__version__.split(".")[:2]
) >= (3, 3)

WIDTH = 16  # bytes: what Triton asks of every address, to load that many at once


class Launcher:
    """Launches kernels; a launch with the arguments of an earlier one goes to the compiled kernel.

    Triton looks at each argument and constant of each launch to find what it compiled, which takes the host longer than
    the launch. The compiled kernel depends on dtypes, on which addresses are multiples of 16, on numbers, constants and
    options, which are the key here. Launches with other addresses go through Triton.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Launcher":
        """Return one that has launched nothing: compiled kernels belong to the process, and are found again."""
        return Launcher()

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: Sequence[Tensor | None],
        numbers: Sequence[float | None],
        constants: tuple[int, ...],
        options: dict[str, int],
        *,
        compile_only: bool = False,
    ) -> None:
        """Launch a kernel, or compile it; its arguments in order are tensors, numbers and constants."""
        if compile_only:
            kernel.warmup(*tensors, *numbers, *constants, grid=grid, **options)
            return
        if not DIRECT:
            kernel[grid](*tensors, *numbers, *constants, **options)
            return
        addresses = 0
        kinds: list[torch.dtype | None] = []
        for tensor in tensors:
            if tensor is None:
                kinds.append(None)
            else:
                addresses |= tensor.data_ptr()
                kinds.append(tensor.dtype)
        key = (id(kernel), constants, *options.values(), *kinds, *numbers)
        compiled = None if addresses % WIDTH else self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants)
            return
        compiled = kernel[grid](*tensors, *numbers, *constants, **options)
        if addresses % WIDTH == 0 and compiled is not None:
            self._compiled[key] = compiled
