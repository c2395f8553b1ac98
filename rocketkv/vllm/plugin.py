"""The entry point of vLLM's general plugins, which every process of an engine calls."""


def register() -> None:
    """Register backends with vLLM; may be called again. Without settings they are vLLM's own.

    On a CPU, vLLM has one backend, and the plugin's takes its place. On a GPU, choose it by
    `--attention-backend CUSTOM`.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    backends = AttentionBackendEnum
    if current_platform.is_cpu():
        own = {backends.CPU_ATTN: "CPU", backends.CPU_MLA: "CPU_MLA", backends.AMX_MLA: "AMX_MLA"}
    else:
        own = {backends.CUSTOM: "FLASH" if current_platform.is_cuda() else "TRITON"}
    for backend, name in own.items():
        register_backend(backend, f"{__package__}.choice.{name}")
