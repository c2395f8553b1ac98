"""The backends that vLLM resolves by name while a model is built: with settings the plugin's, without them vLLM's own.

Without settings nothing else of the plugin is imported.
"""

import pkgutil
from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .settings import settings_of
from .versions import check_version


def __getattr__(name: str) -> Any:
    """Return the class for one of vLLM's backends under the current vLLM config.

    With settings, the backends of MLA are refused.
    """
    if name not in AttentionBackendEnum.__members__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    parent_class = pkgutil.resolve_name(AttentionBackendEnum[name].value)  # a member's value is vLLM's own class
    vllm_config = get_current_vllm_config_or_none()
    settings = None if vllm_config is None else settings_of(vllm_config)
    if vllm_config is None or settings is None:
        return parent_class
    check_version()
    from .backend import backend_for

    return backend_for(parent_class, vllm_config, settings)
