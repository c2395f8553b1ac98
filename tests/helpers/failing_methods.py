"""Methods that cannot be made, for processes that measure them by name."""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def killed(token_budget: int) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def exits(token_budget: int) -> NoReturn:
    os._exit(3)


def broken(token_budget: int) -> NoReturn:
    raise ValueError("it broke")
