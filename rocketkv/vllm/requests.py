"""Refuse requests that carry settings: vLLM passes them to no attention backend, so they would have no effect.

A logits processor is the one public class that sees a request before the engine admits it. vLLM loads `RequestCheck`
through the entry point `vllm.logits_processors`, under either model runner, and starts no engine if that fails or if
the class is not a subclass of the runner's interface. It changes no logits.
"""

import sys
from typing import Any

from .settings import KEY, settings_of
from .versions import check_version


def __getattr__(name: str) -> Any:
    """Return `RequestCheck`, a subclass of vLLM's interfaces, which other versions keep in other modules."""
    if name != "RequestCheck":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check = type(name, (_RequestCheck, *_interfaces()), {"__module__": __name__})
    # An abstract method that only a newer vLLM has must not keep its engines from starting.
    check.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return check


def _interfaces() -> list[type]:
    """Return vLLM's imported interfaces of logits processors: the loader that asks has imported its own."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("vllm.")]
    named = dict.fromkeys(getattr(module, "__dict__", {}).get("LogitsProcessor") for module in modules)
    # A layer of models has the same name.
    found = [kind for kind in named if isinstance(kind, type) and hasattr(kind, "validate_params")]
    return [kind for kind in found if not any(issubclass(other, kind) for other in found if other is not kind)]


class _RequestCheck:
    """Refuses requests whose `extra_args` have settings; with settings, also versions and models without support."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        """Check version and model: where a model has no attention, no backend refuses it.

        Raises:
            ValueError: there are settings, but this vLLM is not supported or the model has no attention.
        """
        if settings_of(vllm_config) is None:
            return
        check_version()
        if vllm_config.model_config.is_attention_free:
            raise ValueError("rocketkv does not support models without attention: serve the model without rocketkv")

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check a request.

        Raises:
            ValueError: it carries settings.
        """
        if KEY in (getattr(sampling_params, "extra_args", None) or {}):
            raise ValueError(
                f"a request cannot carry settings of its own: leave {KEY!r} out of extra_args (vllm_xargs), and set "
                "them for the engine, by --additional-config or ROCKETKV_VLLM"
            )

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Return False: no logits are changed."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Do nothing: there is no state."""

    def is_argmax_invariant(self) -> bool:
        """Return True, so that greedy steps leave it out."""
        return True

    def apply(self, logits: Any, *args: Any) -> Any:
        """Return the logits as they are."""
        return logits
