"""RocketKV: training-free two-stage KV-cache compression for Hugging Face causal language models.

import rocketkv
rocketkv.patch(model, token_budget=512)
model.generate(...)
"""

from ._version import __version__ as __version__
from .budget import METHODS as METHODS
from .budget import BudgetSplit as BudgetSplit
from .cache import RocketKVCache as RocketKVCache
from .config import RocketKVConfig as RocketKVConfig
from .hf import PatchHandle as PatchHandle
from .hf import patch as patch
from .hf import unpatch as unpatch
from .stats import CacheStats as CacheStats
