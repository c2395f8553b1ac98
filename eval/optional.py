"""Packages of the extras `eval` and `math`, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, extra: str = "eval") -> Any:
    """Import a module of a package that an extra installs.

    Raises:
        ImportError: the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed here and not installed: pip install 'rocketkv[{extra}]'") from error
