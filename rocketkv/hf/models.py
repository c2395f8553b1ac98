"""Find a model's decoder and attention layers, and refuse models that cannot be compressed."""

import warnings
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES

# Name of the cache in `generate`, `forward` and their outputs: transformers 5.24 changed it.
CACHE_ARGUMENT = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"

# Reasons, by model type, that the attention interface does not show.
REFUSED = {
    "deepseek_v4": "it reads the attention mask as a tensor",
    "doge": "it reads the attention mask as a tensor",
    "git": "it reads the attention mask as a tensor",
    "kosmos_2_text_model": "it makes an attention mask of its own",
    "diffllama": "it calls its attention twice for one layer",
    "dory": "it runs its layers in loops, each with a cache of its own",
    "inkling2_loop": "it runs its layers in loops, each with a cache of its own",
    "minimax": "it keeps a cache of its own",
    "inkling": "its attention has a bias by position",
    "inkling2": "its attention has a bias by position",
    "jetmoe": "it changes keys between its cache and its attention",
}


def given_cache(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return a copy of the arguments, with `cache` under the name that this transformers uses, and the cache.

    transformers handles the old name: it still accepts it, and warns.
    """
    given = {name: kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None}
    kwargs = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
    if CACHE_ARGUMENT != "cache" and "cache" in given:
        given = {CACHE_ARGUMENT: given["cache"]}
    return {**kwargs, **given}, next(iter(given.values()), None)


def given_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the ids or embeddings of a forward."""
    for inputs in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), args[0] if args else None):
        if isinstance(inputs, Tensor):
            return inputs
    return None


def find_decoder(model: PreTrainedModel) -> tuple[PreTrainedModel, list[nn.Module]]:
    """Return the innermost model that owns the causal self-attention layers, and those layers.

    Args:
        model: a transformers model.

    Raises:
        ValueError: there is none, or more than one, or the model is an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} cannot be patched: it is an encoder-decoder, and RocketKV compresses causal "
            "decoders only"
        )
    owners: dict[int, tuple[PreTrainedModel, list[nn.Module]]] = {}
    _collect(model, model, owners)
    found = [group for group in owners.values() if group[1]]
    if not found:
        raise ValueError(
            f"{type(model).__name__} cannot be patched: no causal attention layers with a layer_idx were found in "
            "it, so there is no KV cache that RocketKV knows"
        )
    if len(found) > 1:
        names = ", ".join(type(owner).__name__ for owner, _ in found)
        raise ValueError(f"{type(model).__name__} holds several decoders ({names}): patch the one you mean")
    return found[0]


def _collect(
    module: nn.Module, owner: PreTrainedModel, owners: dict[int, tuple[PreTrainedModel, list[nn.Module]]]
) -> None:
    """Gather the causal attention modules below a module by the innermost model that owns them."""
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            _collect(child, child, owners)
            continue
        if _is_causal_attention(child):
            owners.setdefault(id(owner), (owner, []))[1].append(child)
        _collect(child, owner, owners)


def _is_causal_attention(module: nn.Module) -> bool:
    named = "attention" in type(module).__name__.lower() and isinstance(getattr(module, "layer_idx", None), int)
    return named and getattr(module, "is_causal", True) is not False


def refuse_unsupported(model: PreTrainedModel, decoder: PreTrainedModel, attentions: list[nn.Module]) -> None:
    """Refuse, by name and reason, a model whose cache cannot be compressed; warn of one with nothing to compress.

    Args:
        model: the outermost model.
        decoder: the model that owns the attention layers.
        attentions: those layers.

    Raises:
        ValueError: it cannot be compressed.
    """
    config: Any = decoder.config
    reason = REFUSED.get(config.model_type.removesuffix("_text"))
    if config.__dict__.get("kv_lora_rank"):  # configurations that differ by layer refuse to be asked
        reason = "its cache holds latents (multi-head latent attention), not keys and values"
    elif getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        reason = "its layers share keys and values"
    elif any(getattr(module, "indexer", None) is not None for module in attentions):
        reason = "an indexer of its own chooses the tokens that its attention reads"
    elif not decoder._can_set_attn_implementation():
        reason = "it does not use transformers' attention interface"
    else:
        reason = reason or _uneven_heads(model, attentions)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be patched: {reason}")
    layers = DynamicCache(config=config).layers
    own = {module.layer_idx for module in attentions}
    stray = [i for i, layer in enumerate(layers) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)]
    recurrent = getattr(model, "_is_stateful", False) and not hasattr(cache_utils, "LinearAttentionLayer")
    if recurrent or not set(stray) <= own:
        raise ValueError(
            f"{type(model).__name__} cannot be patched: not all of its layers are attention alone, and this version of "
            "transformers gives it a cache of its own kind; a newer version may not"
        )
    if not any(type(layer) is DynamicLayer for layer in layers):
        warnings.warn(
            f"{type(model).__name__} has no layer of full attention alone: there is nothing to compress",
            stacklevel=3,
        )


def _uneven_heads(model: PreTrainedModel, attentions: list[nn.Module]) -> str | None:
    """Return why tensor parallel cannot divide a model's KV heads among its ranks, or None if it can.

    transformers shards the rows of `k_proj` and replicates no KV heads, so an uneven share fails within the model.
    """
    ranks = getattr(model, "tp_size", None) or 1
    for module in attentions if ranks > 1 else ():
        weight: Any = getattr(getattr(module, "k_proj", None), "weight", None)
        head_dim = getattr(module, "head_dim", None)
        if head_dim and any(placement.is_shard(0) for placement in getattr(weight, "placements", ())):
            kv_heads = weight.shape[0] // head_dim  # a DTensor has the shape of the whole weight
            if kv_heads % ranks:
                return (
                    f"tensor parallel cannot divide its {kv_heads} KV heads among {ranks} ranks; choose a number of "
                    f"ranks that divides {kv_heads}"
                )
    return None


def refuse_empty_rows(mask: Tensor) -> None:
    """Refuse a 2D attention mask with a row that has no token.

    Raises:
        ValueError: it has one.
    """
    empty = (mask == 0).all(-1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask must leave every row at least one token, but row {', '.join(map(str, rows))} is only "
            "padding; drop it from the batch or give it a token. If this is the first chunk of a longer prompt, pass a "
            "RocketKVCache with its prompt_length"
        )
