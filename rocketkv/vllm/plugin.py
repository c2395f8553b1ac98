"""The entry point of vLLM's general plugins, which every process of an engine calls."""

import contextlib

from .settings import settings_of
from .versions import check_version, is_supported


def register() -> None:
    """Register backends with vLLM; may be called again. Without settings they are vLLM's own.

    On a CPU, vLLM has one backend, and the plugin's takes its place. On a GPU, choose it by
    `--attention-backend CUSTOM`.

    Raises:
        ValueError: the environment has settings, but this vLLM is not supported.
    """
    if is_supported():
        _register_backends()
        return
    if settings_of(None) is not None:
        check_version()
    with contextlib.suppress(Exception):  # where the registry is as expected, `choice` refuses settings of the config
        _register_backends()


def _register_backends() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from . import choice  # fails here, not while a model is built

    backends = AttentionBackendEnum
    if current_platform.is_cpu():
        own = {backend: backend for backend in (backends.CPU_ATTN, backends.CPU_MLA, backends.AMX_MLA)}
    else:
        own = {backends.CUSTOM: backends.FLASH_ATTN if current_platform.is_cuda() else backends.TRITON_ATTN}
    for backend, parent in own.items():
        register_backend(backend, f"{choice.__name__}.{parent.name}")
