"""Refuse requests that carry settings: vLLM passes them to no attention backend, so they would have no effect.

A logits processor is the one public class that sees a request before the engine admits it. vLLM loads this one through
the entry point `vllm.logits_processors`, under either model runner. It changes no logits.
"""

from typing import Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as Runner1Processor

from .settings import KEY, settings_of

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as Runner2Processor
except ImportError:  # a vLLM older than the supported ones: its engines would not start if this module failed to load
    Runner2Processor = object


class RequestCheck(Runner1Processor, Runner2Processor):
    """Refuses requests whose `extra_args` have settings, and models without attention."""

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        """Check the model; of the backends that refuse other models, such a one has none.

        Raises:
            ValueError: there are settings, but the model has no attention.
        """
        if vllm_config.model_config.is_attention_free and settings_of(vllm_config) is not None:
            raise ValueError("rocketkv does not support models without attention: serve the model without rocketkv")

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check a request.

        Raises:
            ValueError: it carries settings.
        """
        if KEY in (sampling_params.extra_args or {}):
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
