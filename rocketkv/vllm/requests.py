"""Refuse requests that carry settings: vLLM passes them to no attention backend, so they would have no effect.

A logits processor is the one public class that sees a request before the engine admits it. vLLM loads this one through
the entry point `vllm.logits_processors`, whatever its settings, and starts no engine if that fails. So the class
derives from the interface that the loader itself uses, in any version, and nothing of vLLM is imported. It changes no
logits.
"""

import functools
import sys
from typing import Any

from .settings import KEY, settings_of
from .versions import refuse_other_versions


def __getattr__(name: str) -> Any:
    """Return `RequestCheck`, a subclass of the interfaces of logits processors that vLLM has loaded by now."""
    if name != "RequestCheck":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loaded = [module for key, module in list(sys.modules.items()) if key.startswith("vllm.")]
    found = dict.fromkeys(vars(module).get("LogitsProcessor") for module in loaded)
    return _request_check(tuple(each for each in found if isinstance(each, type) and hasattr(each, "validate_params")))


@functools.cache
def _request_check(interfaces: tuple[type, ...]) -> type:
    check = type("RequestCheck", (_RequestCheck, *interfaces), {"__module__": __name__})
    # What the interface of another version declares beyond these is never called: `add_request` returns False.
    check.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]  # of classes of an ABC
    return check


class _RequestCheck:
    """Refuses requests whose `extra_args` have settings, and models without attention."""

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        """Check the engine; of the backends that refuse other models, one without attention has none.

        Raises:
            ValueError: there are settings, but the model has no attention, or the plugin does not support this vLLM.
        """
        if settings_of(vllm_config) is None:
            return
        refuse_other_versions()
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
