"""The entry point of vLLM's general plugins, which every process of an engine calls."""


def register() -> None:
    """Register spec and backends with vLLM; may be called again. Without settings they are vLLM's own.

    On a CPU, vLLM has one backend, and the plugin's takes its place. On a GPU, choose it by
    `--attention-backend CUSTOM`.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.backend.CPU")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, f"{__package__}.backend.GPU")
