"""Save a cache to a file and load it, to read a long context once and use it again later.

A file contains the tensors in use, and a JSON document with the model, the settings, the version and the other state of
the cache. A file that is damaged or does not fit is refused; nothing in a file is ever executed.

Letters: B batch, Hkv KV heads, N slots in use.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..backend import backend_name
from ..budget import BudgetSplit
from ..config import RocketKVConfig
from ..core.decode import DecodeBuffers
from ..core.index import index_of
from ..core.pages import movable
from ..state.decoding import DecodeTokens
from ..state.history import NAMES
from ..state.protection import RowMarks
from ..state.queries import QueryRing
from ..state.store import KVStore
from .cache import RocketKVCache
from .layer import RocketKVLayer, rocketkv_layers
from .models import find_decoder
from .patch_state import state_of
from .tensorfile import open_tensors, refuse_difference, weights_digest, write_tensors

_STOCK = {kind.__name__: kind for kind in (DynamicLayer, DynamicSlidingWindowLayer)}
_STOCK_FIELDS = ("cumulative_length", "record_past")  # of the sliding-window layer; which exist depends on transformers
# Fields of `DecodeTokens` that the document contains unchanged.
_DECODING = ("decode_capacity", "prompt_end", "prompt_stored", "moved", "aligned", "expected_error")
_INPUTS = ("input_ids", "attention_mask")
# Fields of a model's configuration that keys and values do not depend on.
_TRANSIENT = (
    *("transformers_version", "name_or_path", "dtype", "torch_dtype", "architectures", "attn_implementation"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def save_cache(
    cache: RocketKVCache,
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> None:
    """Write a cache to a file; the cache that `load_cache` returns continues exactly where this one is.

    The file is written atomically. `model.generate` continues from all token ids of the sequence, so save these too;
    `load_inputs` returns them.

    Args:
        cache: the cache, after a prompt's end; it does not change.
        path: the file, with the usual suffix `.safetensors`; an existing file is replaced.
        model: the model that filled the cache, patched or not; the file identifies it.
        ids: [B, n] token ids of the sequence, padding included: at least all tokens that the cache has seen.
        attention_mask: [B, n], 0 at padding, for rows of different lengths.

    Raises:
        TypeError: `cache` is not a RocketKVCache, `model` is not a transformers model, or `ids` are not integers.
        ValueError: a file cannot represent the cache's state, or `ids` are not its tokens; the message says why.
        FileNotFoundError: there is no such folder.

    Examples:
        >>> import rocketkv, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2))
        >>> handle = rocketkv.patch(model, token_budget=128)
        >>> ids = model.generate(torch.randint(3, 1000, (1, 900)), max_new_tokens=10)
        >>> rocketkv.save_cache(handle.cache, "context.safetensors", model=model, ids=ids)
        >>> cache = rocketkv.load_cache("context.safetensors", model)
        >>> ids = rocketkv.load_inputs("context.safetensors")["input_ids"]
        >>> longer = model.generate(ids, cache=cache, max_new_tokens=10)
    """
    if not isinstance(cache, RocketKVCache):
        raise TypeError(f"cache must be a RocketKVCache, got {type(cache).__name__}")
    outer, decoder = _models(model)
    _refuse_unfinished(cache)
    tensors = dict(_inputs(cache, ids, attention_mask))
    layers = []
    for i, layer in enumerate(cache.layers):
        held, entry = _packed(layer)
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in held.items()}
        layers.append(entry)
    document = {"model": _model_mark(outer, decoder), "settings": asdict(cache.config), "layers": layers}
    write_tensors(Path(path), tensors, document)


def load_cache(path: str | os.PathLike[str], model: nn.Module) -> RocketKVCache:
    """Return the cache that `save_cache` wrote to a file, on the model's devices.

    It has the settings that it was saved with; a patched model must have the same.

    Args:
        path: the file; it is not changed.
        model: the model that continues from the cache.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: the file is damaged, is of another model, other settings or another version of this library, or is
            not a saved cache; the message lists the differences.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    outer, decoder = _models(model)
    document, read = open_tensors(path)
    refuse_difference(path, "model", document.get("model"), _model_mark(outer, decoder))
    state = state_of(outer)
    if state is not None:
        # JSON turns tuples into lists, in `protect` for instance.
        here = json.loads(json.dumps(asdict(state.config)))
        refuse_difference(path, "settings", document.get("settings"), here)
    tensors = read(lambda name: True)
    try:
        with torch.inference_mode(False):  # buffers may be written in a later call that is not in inference mode
            return _cache(decoder, document, tensors)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe a cache: {error!r}") from error


def load_inputs(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the `input_ids` [B, n] and, if there is one, the `attention_mask` [B, n] that were saved with a cache.

    Raises:
        ValueError: the file is damaged, or was saved without them.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    found = open_tensors(path)[1](lambda name: name in _INPUTS)
    if "input_ids" not in found:
        raise ValueError(f"{path} was saved without token ids: give them to save_cache as ids")
    return {name: tensor.clone() for name, tensor in found.items()}


def load_positions(path: str | os.PathLike[str]) -> tuple[dict[int, Tensor], RocketKVConfig]:
    """Return `RocketKVCache.positions` of a saved cache, and its settings, without its model.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    document, read = open_tensors(path)
    names = {f"layers.{i}.positions": i for i in range(len(document["layers"]))}
    held = read(lambda name: name in names)
    return {i: held[name] for name, i in names.items() if name in held}, _settings(document)


def _models(model: nn.Module) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the outermost transformers model in a module, and its decoder."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module, find_decoder(module)[0]
    raise TypeError(f"model must be a transformers model or hold one, got {type(model).__name__}")


def _refuse_unfinished(cache: RocketKVCache) -> None:
    """Refuse a cache whose state a file cannot represent."""
    if not rocketkv_layers(cache):
        raise ValueError("this cache has no compressed layer: there is nothing that save_cache is needed for")
    layer: Any
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, RocketKVLayer):
            if type(layer) not in _STOCK.values() or not layer.is_initialized:
                raise ValueError(
                    f"layer {i} is an empty or unknown {type(layer).__name__}, which cannot be saved: only full and "
                    "sliding-window attention can, after a prompt"
                )
            continue
        if layer.pending is not None:
            raise ValueError(
                f"layer {i} holds tokens of a forward that was interrupted; crop or roll the cache back, or start anew"
            )
        _ = layer.store.seen  # counts the steps that were compiled, if there are any
        if layer.store.lens.uncounted:
            raise ValueError(
                "decode steps of this static cache were captured in a CUDA graph, which may write into it at any time; "
                "save the cache before that, after its prompt"
            )
        if not layer.store.closed or layer.prompt_end is not None:
            raise ValueError(
                "the prompt is not finished, so stage 1 has not run yet: give the cache its prompt_length, or decode a "
                "token, before saving"
            )
        if layer.speculative:
            raise ValueError("drafts are being verified: save the cache after generate has returned")


def _inputs(cache: RocketKVCache, ids: Tensor | None, mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the sequence's token ids and mask, checked."""
    store = rocketkv_layers(cache)[0].store
    rows = 0 if store.keys is None else store.keys.shape[0]
    if mask is not None and ids is None:
        raise ValueError("attention_mask says which of the ids are padding: give ids too")
    both: tuple[tuple[str, str, Any], ...] = (("input_ids", "ids", ids), ("attention_mask", "attention_mask", mask))
    for name, argument, given in both:
        if given is None:
            continue
        if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
            raise TypeError(f"{argument} must be a tensor of integers, got {getattr(given, 'dtype', type(given))}")
        if given.dim() != 2 or given.shape[0] != rows or given.shape[1] < store.seen:
            raise ValueError(
                f"{argument} must be [B, n] for the cache's {rows} rows and at least its {store.seen} tokens, padding "
                f"included; got {list(given.shape)}"
            )
        if ids is not None and given.shape != ids.shape:
            raise ValueError(f"attention_mask must have the shape of ids, {list(ids.shape)}, got {list(given.shape)}")
        yield name, given.detach().long()


def _packed(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the used part of a layer's tensors, and the rest of its state for JSON."""
    if not isinstance(layer, RocketKVLayer):
        fields = {name: getattr(layer, name) for name in _STOCK_FIELDS if hasattr(layer, name)}
        return {"keys": layer.keys, "values": layer.values}, {"kind": type(layer).__name__, "fields": fields}
    store, decoding = layer.store, layer.store.decoding
    tensors, stored = store.tensors(), store.stored
    for name in ("keys", "values", "positions"):
        tensors[name] = tensors[name][:, :, :stored]
    if decoding.index is not None:
        for name in decoding.index.slotted:
            used = decoding.index.shape(name, stored, decoding.keys.shape[3])[0]
            tensors[name] = tensors[name][:, :, :used]
    history = layer.history
    if history is not None:
        history.absorb(store)
        held = {name: tensor[:, :, : history.seen] for name, tensor in history.tensors().items()}
        tensors |= {f"history.{name}": tensor for name, tensor in held.items()}
    return tensors, {
        "kind": "RocketKVLayer",
        "split": asdict(decoding.split),
        "marks": None if store.marks is None else [asdict(mark) for mark in store.marks],
        "complete": store.complete,
        "restorable": store.restorable,
        **{name: getattr(decoding, name) for name in _DECODING},
        "ring_start": None if decoding.ring is None else decoding.ring.start,
        "seen": store.seen,
        "stored": stored,
        "shortest": store.shortest,
        "capacity": store.capacity,
        "prompt_tokens": layer.prompt_tokens,
    }


def _settings(document: dict[str, Any]) -> RocketKVConfig:
    settings = document["settings"]
    split = None if settings["split"] is None else BudgetSplit(**settings["split"])
    return RocketKVConfig(**{**settings, "split": split})


def _cache(decoder: PreTrainedModel, document: dict[str, Any], tensors: dict[str, Tensor]) -> RocketKVCache:
    """Build the cache of a document and its tensors."""
    config = _settings(document)
    cache = RocketKVCache(decoder.config, config)
    entries = document["layers"]
    if len(entries) != len(cache.layers):
        raise ValueError(f"the file has {len(entries)} layers, the model's cache {len(cache.layers)}")
    devices: dict[Any, torch.device] = {
        module.layer_idx: next(module.parameters()).device for module in find_decoder(decoder)[1]
    }
    for i, entry in enumerate(entries):
        prefix = f"layers.{i}."
        held = {
            name.removeprefix(prefix): tensor.to(devices[i])
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        kind = entry["kind"]
        layer: Any = cache.layers[i]
        if kind == "RocketKVLayer" and isinstance(layer, RocketKVLayer):
            past = {name: held.pop(f"history.{name}") for name in NAMES if f"history.{name}" in held}
            _fill(layer.store, held, entry)
            if layer.history is not None:
                layer.history.fill(past, layer.store)
            layer.prompt_tokens = int(entry["prompt_tokens"])
            layer.backend = backend_name(held["keys"].device, config.backend)
            continue
        if kind == "DynamicLayer" and type(layer) is DynamicSlidingWindowLayer:
            layer = DynamicLayer()  # a sliding-window layer that kept all tokens, for drafts
            cache.layers[i] = layer
        if kind not in _STOCK or type(layer) is not _STOCK[kind]:
            raise ValueError(f"layer {i} is a {kind} in the file, and the model wants a {type(layer).__name__}")
        fields = {name: value for name, value in entry["fields"].items() if name in _STOCK_FIELDS}
        for name, value in fields.items():
            setattr(layer, name, value)  # a layer that records the past keeps all tokens of `update`
        layer.update(held["keys"].clone(), held["values"].clone())
        for name, value in fields.items():
            setattr(layer, name, value)  # `update` has counted the tokens again
    return cache


def _fill(store: KVStore, held: dict[str, Tensor], entry: dict[str, Any]) -> None:
    """Fill an empty store with the saved slots, in buffers of their former capacity."""
    split, marks, ring_start = BudgetSplit(**entry["split"]), entry["marks"], entry["ring_start"]
    seen, stored, shortest, capacity = (int(entry[name]) for name in ("seen", "stored", "shortest", "capacity"))
    batch, kv_heads, _, head_dim = held["keys"].shape
    expected: dict[str, tuple[int, ...]] = {
        "keys": (batch, kv_heads, stored, head_dim),
        "values": (batch, kv_heads, stored, held["values"].shape[-1]),
        "positions": (batch, kv_heads, stored),
        "seq_lens": (batch, kv_heads),
    }
    if ring_start is not None:
        expected["query_ring"] = (batch, *held["query_ring"].shape[1:3], head_dim)
    index = index_of(split)
    if index is not None:
        expected |= {name: (batch, kv_heads, *index.shape(name, stored, head_dim)) for name in index.names}
    if split.residual:
        expected["value_sum"] = (batch, kv_heads, held["values"].shape[-1])
        expected["missed"] = (batch, held["missed"].shape[1])
    if split.calibrated:
        expected["residual_bias"] = (batch, held["residual_bias"].shape[1])
    found = {name: tuple(tensor.shape) for name, tensor in held.items()}
    seq_lens = held["seq_lens"]
    # Rows may have been dropped since, also the longest or the shortest one.
    ordered = 0 <= shortest <= int(seq_lens.min()) and int(seq_lens.max()) <= stored <= capacity
    if found != expected or not ordered:
        raise ValueError(f"shapes, lengths and settings of a layer do not go together: {found} for {expected}")

    def whole(name: str, size: int, value: int = 0) -> Tensor:
        part = movable(held[name])
        buffer = part.new_full((*part.shape[:2], size, *part.shape[3:]), value)
        buffer[:, :, : part.shape[2]] = part
        return buffer.view(held[name].dtype)

    def indexed(name: str) -> Tensor:
        slotted = index is not None and name in index.slotted
        return whole(name, index.shape(name, capacity, head_dim)[0] if slotted and index else held[name].shape[2])

    small = ("value_sum", "residual_bias", "missed", "query_ring")
    store.phase = DecodeTokens(
        buffers=DecodeBuffers(
            whole("keys", capacity),
            whole("values", capacity),
            whole("positions", capacity, -1),
            seq_lens.clone(),
            () if index is None else tuple(indexed(name) for name in index.names),
            **{name: held[name].clone() for name in small if name in held},
        ),
        split=split,
        index=index,
        ring=None if ring_start is None else QueryRing(int(ring_start)),
        **{name: entry[name] for name in _DECODING},
    )
    store.marks = None if marks is None else tuple(_marks(**mark) for mark in marks)
    store.complete, store.restorable = bool(entry["complete"]), int(entry["restorable"])
    store.lens.seen, store.lens.longest, store.lens.shortest = seen, stored, shortest
    if store.decoding.decode_capacity is not None:
        store.clock()


def _marks(protected: list[list[int]], messages: list[int]) -> RowMarks:
    """Return a row's marks from JSON."""
    return RowMarks(tuple((int(start), int(stop)) for start, stop in protected), tuple(map(int, messages)))


def _model_mark(outer: PreTrainedModel, decoder: PreTrainedModel) -> dict[str, Any]:
    """Return the properties that identify a model, as far as its cache depends on them."""
    config = _plain(outer.config.to_dict())
    return {
        "class": type(outer).__name__,
        "dtype": str(outer.dtype),
        "config": config,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": weights_digest(decoder),
    }


def _plain(value: Any) -> Any:
    """Return a configuration as JSON values, without the fields of `_TRANSIENT`."""
    if isinstance(value, Mapping):
        kept = ((str(name), each) for name, each in value.items())
        return {name: _plain(each) for name, each in kept if not name.startswith("_") and name not in _TRANSIENT}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
