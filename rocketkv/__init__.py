"""RocketKV: training-free two-stage KV-cache compression for Hugging Face causal language models.

import rocketkv
rocketkv.patch(model, token_budget=512)
model.generate(...)

Names are imported on first use: neither `rocketkv --help` nor an engine that imports `rocketkv.core.eviction` loads
transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .budget import METHODS, BudgetSplit, Method, register_method
    from .config import RocketKVConfig
    from .hf.cache import RocketKVCache
    from .hf.files import load_cache, load_inputs, save_cache
    from .hf.patch import PatchHandle, patch, unpatch
    from .hf.plan import plan
    from .state.missed import Audit
    from .state.monitor import StepReport
    from .state.stats import CacheStats
    from .state.trace import Trace

__all__ = [
    "METHODS",
    "Audit",
    "BudgetSplit",
    "CacheStats",
    "Method",
    "PatchHandle",
    "RocketKVCache",
    "RocketKVConfig",
    "StepReport",
    "Trace",
    "__version__",
    "load_cache",
    "load_inputs",
    "patch",
    "plan",
    "register_method",
    "save_cache",
    "unpatch",
]

_MODULES = {
    "METHODS": ".budget",
    "Audit": ".state.missed",
    "BudgetSplit": ".budget",
    "CacheStats": ".state.stats",
    "Method": ".budget",
    "PatchHandle": ".hf.patch",
    "RocketKVCache": ".hf.cache",
    "RocketKVConfig": ".config",
    "StepReport": ".state.monitor",
    "Trace": ".state.trace",
    "load_cache": ".hf.files",
    "load_inputs": ".hf.files",
    "patch": ".hf.patch",
    "plan": ".hf.plan",
    "register_method": ".budget",
    "save_cache": ".hf.files",
    "unpatch": ".hf.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
