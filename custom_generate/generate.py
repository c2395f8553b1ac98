"""Generate with a compressed KV cache, for `model.generate(..., custom_generate=PATH, trust_remote_code=True)`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import rocketkv
from rocketkv.hf.patch_state import state_of


def generate(model: Any, **kwargs: Any) -> Any:
    """Run the model's own `generate`, patched by rocketkv for this call.

    Args:
        model: a causal language model of transformers.
        **kwargs: fields of `rocketkv.RocketKVConfig`, such as `method` and `token_budget`; all others are arguments of
            `model.generate`.

    Returns:
        What `model.generate` returns; with `return_dict_in_generate=True` it includes the compressed cache.

    Raises:
        ValueError: the model is patched already, cannot be compressed, or a field has an impossible value.
    """
    if state_of(model) is not None:
        raise ValueError(
            "this model is patched already: call model.generate without custom_generate, or rocketkv.unpatch(model) "
            "first"
        )
    settings = {field.name: kwargs.pop(field.name) for field in fields(rocketkv.RocketKVConfig) if field.name in kwargs}
    with rocketkv.patch(model, **settings):
        return model.generate(**kwargs)
