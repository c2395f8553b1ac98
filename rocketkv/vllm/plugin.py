"""The entry point of vLLM's general plugins, which every process of an engine calls."""

import os

from .settings import VARIABLE
from .versions import refuse_other_versions, supported


def register() -> None:
    """Register backends with vLLM; may be called again. Without settings they are vLLM's own.

    On a CPU, vLLM has one backend, and the plugin's takes its place. On a GPU, choose it by
    `--attention-backend CUSTOM`. Where another version of vLLM has no such registry, nothing is registered.

    Raises:
        ValueError: the environment has settings, and the plugin does not support this version of vLLM.
    """
    if os.environ.get(VARIABLE):
        refuse_other_versions()
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        names = ("CPU_ATTN", "CPU_MLA", "AMX_MLA") if current_platform.is_cpu() else ("CUSTOM",)
        # A member's value is the path of vLLM's own class.
        backends = [AttentionBackendEnum.__members__[name] for name in names]
    except (ImportError, AttributeError, KeyError):
        if supported():
            raise
        return
    for backend in backends:
        register_backend(backend, f"{__package__}.choice.{backend.name}")
