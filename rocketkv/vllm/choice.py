"""The backends that vLLM resolves by name while a model is built: with settings the plugin's, without them vLLM's own.

Without settings nothing else of the plugin is imported.
"""

import importlib
from typing import Any

from .settings import settings_of
from .versions import refuse_other_versions


def __getattr__(name: str) -> Any:
    """Return the backend class that a member of vLLM's registry stands for under the current vLLM config.

    Raises:
        ValueError: there are settings, and the plugin does not support this version of vLLM.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name not in AttentionBackendEnum.__members__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    settings = None if vllm_config is None else settings_of(vllm_config)
    if settings is not None:
        refuse_other_versions()
    if name == "CUSTOM":  # has no class of vLLM's own
        from vllm.platforms import current_platform

        name = "FLASH_ATTN" if current_platform.is_cuda() else "TRITON_ATTN"
    module, parent = AttentionBackendEnum.__members__[name].value.rsplit(".", 1)
    parent_class = getattr(importlib.import_module(module), parent)
    if vllm_config is None or settings is None:
        return parent_class
    from .backend import backend_for

    return backend_for(parent_class, vllm_config, settings)
