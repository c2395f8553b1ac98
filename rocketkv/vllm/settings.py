"""Settings of the plugin: a `RocketKVConfig`, and how many sequences may decode at the same time.

They come from vLLM's `--additional-config '{"rocketkv": {"token_budget": 512}}'`, or from the environment variable
ROCKETKV_VLLM with the inner JSON object. Without either, the plugin changes nothing.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..budget import METHODS
from ..config import RocketKVConfig, did_you_mean

VARIABLE = "ROCKETKV_VLLM"
KEY = "rocketkv"

# Room for generated tokens; when it is full, stage 1 runs again over them.
DECODE_CAPACITY = 1024

# Fields of a RocketKVConfig that work in the engine.
_FIELDS = (
    "method",
    "token_budget",
    "decode_capacity",
    "decode_reserve",
    "window_size",
    "kernel_size",
    "layer_budgets",
    "when_full",
    "index_dtype",
    "backend",
)
_OWN = ("max_sequences",)


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """Settings of one engine.

    Attributes:
        config: the compression's settings; `decode_capacity` is the room for each sequence's generated tokens.
        max_sequences: rows of the slab, that is sequences that are admitted at the same time; None: vLLM's
            `max_num_seqs`.
    """

    config: RocketKVConfig
    max_sequences: int | None = None

    def rows(self, max_num_seqs: int) -> int:
        """Return the rows of the slab for vLLM's `max_num_seqs`."""
        return max_num_seqs if self.max_sequences is None else min(self.max_sequences, max_num_seqs)


def parse(given: Mapping[str, Any]) -> VllmSettings:
    """Return the settings of a JSON object.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: there is no such field, it does not work in vLLM, or it has an impossible value.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"rocketkv's settings in vLLM must be a JSON object, got {type(given).__name__}")
    known = (*_FIELDS, *_OWN)
    for name in given:
        if name in known:
            continue
        if name in RocketKVConfig.__dataclass_fields__:
            raise ValueError(
                f"rocketkv: {name} does not work in vLLM; leave it out. The settings that do: {', '.join(known)}"
            )
        raise ValueError(f"rocketkv: there is no setting {name!r}.{did_you_mean(name, known)} See docs/vllm.md")
    fields = {name: value for name, value in given.items() if name in _FIELDS}
    budgets = fields.get("layer_budgets")
    if isinstance(budgets, Mapping):  # the keys of a JSON object are strings
        fields["layer_budgets"] = {int(layer): budget for layer, budget in budgets.items()}
    config = RocketKVConfig(**{"decode_capacity": DECODE_CAPACITY, **fields})
    _check_method(config)
    rows = given.get("max_sequences")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rocketkv: max_sequences must be an int of at least 1, got {rows!r}")
    return VllmSettings(config=config, max_sequences=rows)


def _check_method(config: RocketKVConfig) -> None:
    """Refuse methods and capacities under which a sequence's memory has no bound."""
    split = config.split_for(1 << 20, 128)
    if config.keeps_history or split.kept_tokens is None or not split.ranked:
        names = [name for name, method in METHODS.items() if not method.multi_turn and _bounded(config, name)]
        raise ValueError(
            f"rocketkv: method {config.method!r} does not work in vLLM, where a sequence's memory is reserved before "
            f"its prompt is read; use one that evicts by attention: {', '.join(names)}"
        )
    if config.decode_capacity is None:
        raise ValueError(
            f"rocketkv: decode_capacity must be an int in vLLM, got None; leave it out for {DECODE_CAPACITY}"
        )
    if config.when_full == "evict" and config.decode_capacity < 2 * config.window_size:
        raise ValueError(
            f"rocketkv: decode_capacity must be at least 2 * window_size = {2 * config.window_size}, so that generated "
            f"tokens can be re-evicted; got {config.decode_capacity}"
        )


def _bounded(config: RocketKVConfig, name: str) -> bool:
    split = METHODS[name].split(1 << 20, config.token_budget, 128, config.decode_reserve)
    return split.kept_tokens is not None and split.ranked


def settings_of(vllm_config: Any) -> VllmSettings | None:
    """Return the plugin's settings in a `VllmConfig` or in the environment, or None if there are none.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a setting does not exist, or has an impossible value; or the variable is no JSON.
    """
    additional = getattr(vllm_config, "additional_config", None)
    given = additional.get(KEY) if isinstance(additional, Mapping) else None
    if given is None:
        text = os.environ.get(VARIABLE)
        if not text:
            return None
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{VARIABLE} must be a JSON object, such as '{{\"token_budget\": 512}}': {error}"
            ) from error
    return parse(given)
