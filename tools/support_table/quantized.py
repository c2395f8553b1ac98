"""Tiny models with weights in 4 or 8 bits, by the packages that transformers hands them to."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers

from tiny import NEVER, build

from .check import Row, check_model, first_line

# Some round activations, so that equal computations in another order differ by more than in float32.
TOLERANCE = 1e-2
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


def torchao(name: str) -> Any:
    """Return the configuration of one of torchao's schemes."""
    return transformers.TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())


SCHEMES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bitsandbytes, 8 bits": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes, 4 bits (NF4)": (
        "bitsandbytes",
        lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ),
    "torchao, 8 bits": ("torchao", lambda: torchao("Int8WeightOnlyConfig")),
    "torchao, 8 bits, activations too": ("torchao", lambda: torchao("Int8DynamicActivationInt8WeightConfig")),
    "Quanto, 8 bits": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int8")),
    "Quanto, 4 bits": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int4")),
}


def check_scheme(name: str) -> Row:
    """Load a tiny Llama by a scheme and check it."""
    package, make = SCHEMES[name]
    try:
        importlib.import_module(package)
    except ImportError:
        return Row(name, "not built", note=f"{package} was not installed")
    with tempfile.TemporaryDirectory() as folder:
        build("llama", **SIZES).save_pretrained(folder)
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=make(), dtype=torch.float32, device_map="cpu"
            )
        except Exception as error:  # noqa: BLE001 - whatever a package raises is the row's reason
            return Row(name, "not built", note=first_line(error))
    model.generation_config.eos_token_id = NEVER
    return replace(check_model(model.eval(), model.config, TOLERANCE), kind=name)
