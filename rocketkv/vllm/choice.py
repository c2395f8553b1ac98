"""The backends that vLLM resolves by name while a model is built: with settings the plugin's, without them vLLM's own.

Without settings nothing else of the plugin is imported.
"""

import importlib
from typing import Any

from .settings import settings_of

# With settings, the backends of MLA are refused.
_PARENTS = {
    "CPU": "cpu_attn.CPUAttentionBackend",
    "CPU_MLA": "mla.cpu_mla.CPUMLABackend",
    "AMX_MLA": "mla.amx_mla.AMXMLABackend",
    "FLASH": "flash_attn.FlashAttentionBackend",
    "TRITON": "triton_attn.TritonAttentionBackend",
}


def __getattr__(name: str) -> Any:
    """Return the backend class that a name stands for under the current vLLM config."""
    if name not in _PARENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none

    module, parent = _PARENTS[name].rsplit(".", 1)
    parent_class = getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), parent)
    vllm_config = get_current_vllm_config_or_none()
    settings = None if vllm_config is None else settings_of(vllm_config)
    if vllm_config is None or settings is None:
        return parent_class
    from .backend import backend_for

    return backend_for(parent_class, vllm_config, settings)
