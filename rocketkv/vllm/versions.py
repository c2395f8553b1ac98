"""The vLLM versions that the plugin supports; the only place that names them."""

import sys

SUPPORTED = ("0.32", "0.33")


def vllm_version() -> str:
    """Return the version of the vLLM that loads the plugin, or "unknown"."""
    return getattr(sys.modules.get("vllm"), "__version__", "unknown")


def supported() -> bool:
    """Whether the plugin supports this vLLM."""
    return ".".join(vllm_version().split(".")[:2]) in SUPPORTED


def refuse_other_versions() -> None:
    """Refuse to run with settings under a vLLM that the plugin does not support.

    Raises:
        ValueError: it does not support this version.
    """
    if not supported():
        raise ValueError(
            f"rocketkv supports vLLM {' and '.join(SUPPORTED)}, and this is {vllm_version()}: install one of those, or "
            "remove rocketkv's settings (--additional-config, ROCKETKV_VLLM)"
        )
