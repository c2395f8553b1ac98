"""Static stores and caches, and the loops that take them through a generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from rocketkv.core.params import AttentionParams
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import rocketkv_layers
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from rocketkv.static_step import StaticStep
from tiny import SMALL, TRANSFORMERS, left_padded, prompt
from turns import KERNEL, PARAMS, RESERVE, SPLITS, Tokens, extend, left_padding, tokens

PROMPT = prompt(90)
PADDED = left_padded([PROMPT, prompt(41, seed=3), prompt(15, seed=9)])
ROOM = 16
STATIC: dict[str, Any] = {**SMALL, "decode_capacity": ROOM, "when_full": "raise"}


def in_dtype(given: Tokens, dtype: torch.dtype) -> Tokens:
    return Tokens(given.query.to(dtype), given.key.to(dtype), given.value.to(dtype))


def static_pair(
    method: str, lengths: list[int] | None, count: int, dtype: torch.dtype = torch.float32
) -> tuple[KVStore, KVStore, Tokens]:
    """Return a store that grows and a static one after the same prompt, and tokens to decode."""
    rows = 1 if lengths is None else len(lengths)
    given = in_dtype(tokens(rows, 60), dtype)
    valid = None if lengths is None else left_padding(lengths, 60)
    growing, static = KVStore(), KVStore()
    for store, room in ((growing, None), (static, count)):
        extend(store, given, valid)
        close_prompt(store, SPLITS[method], PARAMS, decode_reserve=RESERVE, kernel_size=KERNEL, decode_capacity=room)
    return growing, static, in_dtype(tokens(rows, count), dtype)


def run_static(step: StaticStep, given: Tokens, params: AttentionParams = PARAMS) -> Tensor:
    out = []
    for i in range(len(given)):
        last = step(given.query[:, :, i], given.key[:, :, i], given.value[:, :, i], params)
        out.append(last[:, :, None].clone())  # the next step writes over it
    return torch.cat(out, dim=2)


def run_operator(step: StaticStep, given: Tokens, params: AttentionParams = PARAMS) -> Tensor:
    """Do what `run_static` does by the operator, as a compiled forward calls it."""
    own = (step.tensors, step.workspace, step.out, step.names, step.rule)
    out = []
    for i in range(len(given)):
        torch.ops.rocketkv.decode_step(given.query[:, :, i], given.key[:, :, i], given.value[:, :, i], *own, *params)
        out.append(step.out[:, :, None].clone())
    return torch.cat(out, dim=2)


def inputs_of(rows: str) -> dict[str, Tensor]:
    return PADDED if rows == "padded" else {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}


def own_loop(
    model: Any, inputs: dict[str, Tensor], step: Callable[..., Any], new_tokens: int = 12, **fields: Any
) -> tuple[Tensor, Tensor, RocketKVCache]:
    """Generate greedily: the prompt by the model, each token by `step`, which is given nothing that grows."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = RocketKVCache(model.config, prompt_length=ids.shape[1], **{**STATIC, **fields})
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    common: dict[str, Any] = {CACHE_ARGUMENT: cache, "use_cache": True}
    found, logits = [], []
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=position, **common)
        for i in range(new_tokens):
            logits.append(out.logits[:, -1])
            found.append(logits[-1].argmax(-1, keepdim=True))
            position = position[:, -1:].clone() + 1
            given = {"position_ids": position, **common}
            if TRANSFORMERS < (5,):
                given["cache_position"] = torch.tensor([ids.shape[1] + i])
            if i + 1 < new_tokens:
                out = step(found[-1], **given)
    return torch.cat(found, dim=1), torch.stack(logits, dim=1), cache


def places(cache: RocketKVCache) -> list[dict[str, tuple[int, torch.Size]]]:
    """Return where each layer's tensors lie, and their shapes."""
    stores = [layer.store for layer in rocketkv_layers(cache)]
    tensors = [store.tensors() | ({"clock": store.clock()} if store.closed else {}) for store in stores]
    return [{name: (tensor.data_ptr(), tensor.shape) for name, tensor in layer.items()} for layer in tensors]


def later(model: Any, cache: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, **{CACHE_ARGUMENT: cache}).logits
    return logits


def compiling(backend: str) -> CompileConfig:
    """Return settings with which `generate` compiles on a CPU too; on a GPU it does so by itself."""
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return config


def uncounted(model: Any, new_tokens: int = 8, **fields: Any) -> tuple[Tensor, RocketKVCache]:
    """Return tokens and a cache whose steps were compiled, and not counted by the host."""
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    found, _, cache = own_loop(model, inputs_of("one"), compiled, new_tokens, **fields)
    assert rocketkv_layers(cache)[0].store.lens.uncounted
    return found, cache
