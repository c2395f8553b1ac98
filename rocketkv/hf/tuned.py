"""Files of `rocketkv tune`: settings, a fingerprint of their model, and the measurements.

A file is one JSON document with a checksum. A damaged file, or one for another model, is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import RocketKVConfig
from .models import find_decoder
from .tensorfile import refuse_difference, weights_digest

KIND = "rocketkv tune"
FORMAT = 1
# Fields of a decoder's configuration; a model may lack some.
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "sliding_window"),
)


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Return a model's fingerprint, as JSON values.

    It reads 16 numbers of each weight, rounded to bfloat16: a model has the same fingerprint in float32 and in
    bfloat16, and in float16 if its weights were published in one of the 16-bit dtypes. Heads and the scaling of
    positions (RoPE) do not count.

    Returns:
        `architecture`, the decoder's class; `sizes`, of its layers; `vocabulary`, in tokens; `weights_sha256`.

    Raises:
        ValueError: the model has no decoder that can be compressed, or weights that cannot be read: sharded, of a
            subclass of Parameter, or offloaded.
    """
    decoder = find_decoder(model)[0]
    config: Any = decoder.config
    for name, weight in decoder.named_parameters():
        if type(weight) is not nn.Parameter or weight.is_meta:
            raise ValueError(
                f"{type(model).__name__} cannot be identified: its weight {name} is a {type(weight).__name__} on "
                f"{weight.device}, whose numbers are not at hand. Give the settings of the file as fields of patch"
            )
    return {
        "architecture": type(decoder).__name__,
        "sizes": {name: getattr(config, name, None) for name in _SIZES},
        "vocabulary": config.vocab_size,
        "weights_sha256": weights_digest(decoder, rounded_to=torch.bfloat16),
    }


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of a file: kind and format, the given values, and a checksum of all of them.

    Args:
        document: JSON values; `model`, a fingerprint, and `settings`, fields of RocketKVConfig, among them.
    """
    made = {"kind": KIND, "format": FORMAT, **document}
    return {**made, "checksum": _checksum(made)}


def read_settings(path: str | os.PathLike[str], model: PreTrainedModel) -> RocketKVConfig:
    """Return the settings of a file of `rocketkv tune`.

    Args:
        path: the file.
        model: the model that they are for, in any dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, edited or of another kind or format, or was made for another model; the message
            names the difference.
    """
    path = Path(path)
    document = _document(path)
    here = fingerprint(model)
    try:
        refuse_difference(path, "model", document.get("model"), here)
    except ValueError as error:
        raise ValueError(
            f"{error}. Measurements on one model do not hold for another: run `rocketkv tune` on this one, or pass "
            "settings as fields of patch"
        ) from error
    try:
        return RocketKVConfig(**document.get("settings", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} was made by rocketkv {document.get('rocketkv')} and has settings that this version does not take: "
            f"{error}"
        ) from error


def _document(path: Path) -> dict[str, Any]:
    """Return the document of a file, checked."""
    again = "Make it again with `rocketkv tune`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged, or no file of `rocketkv tune`: {error}. {again}") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise ValueError(f"{path} is no file of `rocketkv tune`. {again}, or give a RocketKVConfig")
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} has format {found.get('format')!r}; this version reads format {FORMAT}. {again}")
    checksum = found.pop("checksum", None)
    if checksum != _checksum(found):
        raise ValueError(
            f"{path} does not match its checksum: it was damaged or edited. {again}; fields of patch replace settings"
        )
    return found


def _checksum(document: Mapping[str, Any]) -> str:
    content = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()
