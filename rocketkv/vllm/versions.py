"""The versions of vLLM that the plugin supports. On others, engines with settings are refused."""

SUPPORTED = ("0.32", "0.33")  # as in the extra `vllm` of pyproject.toml


def installed() -> str:
    """Return the version of the installed vLLM, under whatever name its package has."""
    import vllm

    return str(getattr(vllm, "__version__", "an unknown version"))


def is_supported() -> bool:
    """Return whether the plugin supports the installed vLLM."""
    return ".".join(installed().split(".")[:2]) in SUPPORTED


def check_version() -> None:
    """Refuse an engine that has settings, where its vLLM is not supported.

    Raises:
        ValueError: the installed vLLM is not supported.
    """
    if not is_supported():
        raise ValueError(
            f"rocketkv supports vLLM {' and '.join(SUPPORTED)}, got {installed()}: install one of those (pip install "
            "'rocketkv[vllm]'), or leave rocketkv's settings out of --additional-config and ROCKETKV_VLLM"
        )
