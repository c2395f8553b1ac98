"""Refuse by name, before the engine starts, models and settings that the plugin cannot serve."""

from typing import Any

from ..config import RocketKVConfig
from .markers import most_rows
from .settings import VllmSettings

# dtypes of a KV cache that hold the model's own keys and values
_PLAIN = ("auto", "bfloat16", "float16", "float32")


def refuse(vllm_config: Any, settings: VllmSettings) -> None:
    """Refuse an engine that the plugin cannot serve.

    Raises:
        ValueError: it has a feature that does not go together with compressed rows.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    transfer = vllm_config.kv_transfer_config
    found = {
        "models with multi-head latent attention (MLA)": (model.use_mla, "serve the model without rocketkv"),
        "encoder-decoder models": (model.is_encoder_decoder, "serve the model without rocketkv"),
        "speculative decoding": (vllm_config.speculative_config is not None, "leave out --speculative-config"),
        "KV connectors": (
            transfer is not None and transfer.is_kv_transfer_instance,
            "leave out --kv-transfer-config",
        ),
        "decode context parallel": (
            parallel.decode_context_parallel_size > 1,
            "use tensor parallel (--tensor-parallel-size) alone",
        ),
        "prefill context parallel": (
            parallel.prefill_context_parallel_size > 1,
            "use tensor parallel (--tensor-parallel-size) alone",
        ),
        "dual batch overlap": (parallel.enable_dbo, "leave out --enable-dbo"),
        "quantised KV caches": (
            cache.cache_dtype not in _PLAIN,
            f"leave out --kv-cache-dtype {cache.cache_dtype}",
        ),
        "admission by the first chunk alone": (
            not scheduler.scheduler_reserve_full_isl,
            "leave out --no-scheduler-reserve-full-isl",
        ),
    }
    for name, (present, remedy) in found.items():
        if present:
            raise ValueError(f"rocketkv does not support {name}: {remedy}")
    rows, most = settings.rows(scheduler.max_num_seqs), most_rows(model.max_model_len)
    if rows > most:
        raise ValueError(
            f"rocketkv: at most {most} sequences of max_model_len={model.max_model_len} tokens can be served at the "
            f"same time, got {rows}; set max_sequences={most}"
        )
    capacity, length = settings.config.decode_capacity or 0, model.max_model_len
    if settings.config.when_full == "raise" and capacity < length:
        raise ValueError(
            f"rocketkv: when_full='raise' needs a decode_capacity of max_model_len={length}, because an engine cannot "
            f"stop one request; got {capacity}. Raise it, or leave when_full at 'evict'"
        )
    if rows < scheduler.max_num_seqs and vllm_config.use_v2_model_runner:
        raise ValueError(
            f"rocketkv: model runner V2 needs a row for each of max_num_seqs={scheduler.max_num_seqs} requests, got "
            f"max_sequences={rows}; set --max-num-seqs {rows} instead"
        )
    by_layer(vllm_config, settings)


def by_layer(vllm_config: Any, settings: VllmSettings) -> list[RocketKVConfig]:
    """Return the settings of each of the model's layers.

    Raises:
        ValueError: `layer_budgets` names a layer that the model does not have.
    """
    layers = settings.config.by_layer(vllm_config.model_config.get_total_num_hidden_layers())
    return [config for config in layers if config is not None]  # skip_layers is refused
