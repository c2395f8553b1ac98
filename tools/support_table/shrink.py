"""Tiny configurations of any model: the default one with fewer layers, heads, experts and words.

The rule keeps what attention depends on: the head dim, the ratio of query and KV heads where there are groups, and one
layer of every kind. `EXTRA` lists the few fields that the rule does not find.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 1024
WORDS = 500  # ids that prompts are made of; special tokens lie above
HEADS, GROUPED_KV_HEADS = 4, 2
MOST_LAYERS = 6

LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
    "layers",
    "num_decoder_layers",
    "num_blocks",
)
HEAD_COUNTS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "attention_heads",
    "encoder_attention_heads",
)
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num")
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim_model", "emb_dim", "embed_dim")
TEXT_WIDTHS = ("out_hidden_size", "text_hidden_size")  # of a vision or audio part: the hidden size of the text part
# Fields of the same meaning in many configurations, and their value where the default is larger.
AT_MOST: dict[str, int] = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dim_ff", "dff"), 256),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "mlp_dim", "dense_intermediate_size"), 256),
    **dict.fromkeys(("intermediate_size_mlp", "block_ff_dim", "moe_hidden_size", "expert_ffn_hidden_size"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "zero_expert_num"), 1),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("num_embeddings", "codebook_size", "max_source_positions"), VOCABULARY),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 64),
    **dict.fromkeys(("hidden_size_per_layer_input", "ple_embed_dim"), 32),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "attention_chunk_size"), 64),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("index_topk", "index_n_heads", "index_block_size", "index_topk_blocks"), 4),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [16, 24, 24]}
TWO_KINDS = ["linear_attention", "full_attention"]
# Fields by model type that the rule does not find.
EXTRA: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 1024, "audio_token_offset": 2048},
    "apertus1p5_text": {"vocab_size": 4096},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "glm4v_text": {"rope_parameters": MROPE},
    "glm4v_moe_text": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "ministral": {"head_dim": 128},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 4},
    "qwen2_5_omni_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": VOCABULARY,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"hidden_size": 256, "num_attention_heads": 4},
    "rwkv": {"hidden_size": 256, "attention_hidden_size": 256},
    "xlstm": {"hidden_size": 512, "embedding_dim": 512, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
# Fields of released models where the default of the class is another kind of model, and how the table says it.
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("with the layers of Bamba-9B", {"attn_layer_indices": [9, 18, 27]}),
    "granitemoehybrid": (
        "with the layers of Granite-4.0-H-Micro",
        {"layer_types": [TWO_KINDS[i in (5, 15, 25, 35)] for i in range(40)], "num_hidden_layers": 40},
    ),
    "lfm2": (
        "with the layers of LFM2-1.2B",
        {"layer_types": [("conv", "full_attention")[i in (2, 5, 8, 10, 12, 14)] for i in range(16)]},
    ),
    "lfm2_moe": (
        "with the layers of LFM2-8B-A1B",
        {"layer_types": [("conv", "full_attention")[i in (2, 6, 10, 14, 18, 21)] for i in range(24)]},
    ),
    "minimax_m3_vl_text": (
        "with layers of the type `minimax_m3_sparse`",
        {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57},
    ),
    "mistral": ("with `sliding_window=None`, as released", {"sliding_window": None}),
}


def default_of(model_type: str) -> tuple[PretrainedConfig, str]:
    """Return a model type's default configuration, with the fields of `RELEASED`, and what the table says of these."""
    config: PretrainedConfig = CONFIG_MAPPING[model_type]()
    notes = [put_released(part) for part in (config, *sub_configs(config))]
    return config, ", ".join(dict.fromkeys(note for note in notes if note))


def put_released(config: PretrainedConfig) -> str:
    """Set the fields of `RELEASED` in a configuration without those of its parts, and return the note."""
    note, fields = RELEASED.get(config.model_type, ("", {}))
    if "layer_types" in fields:
        config.num_hidden_layers = len(fields["layer_types"])
    for name, value in fields.items():
        setattr(config, name, value)
    return note


def sub_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return the configurations of a model's parts."""
    return [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]


def tiny(config: PretrainedConfig, *, decoder: bool = False) -> PretrainedConfig:
    """Return a small configuration of the same class.

    Args:
        config: the default one.
        decoder: whether a model that can be an encoder is to be a decoder.
    """
    changes = changes_of(config)
    if decoder and hasattr(config, "is_decoder"):
        changes["is_decoder"] = True
    return type(config)(**changes)


def changes_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields in which the small configuration differs from the default one."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    changes: dict[str, Any] = dict(RELEASED[config.model_type][1]) if config.model_type in RELEASED else {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            changes[name] = tiny(value)
        elif name in AT_MOST and is_count(value):
            changes[name] = min(value, AT_MOST[name])
        elif is_special_token(name, value):
            changes[name] = VOCABULARY - 1 - value % (VOCABULARY - WORDS)
    for text in (part for part in changes.values() if isinstance(part, PretrainedConfig) and "text" in part.model_type):
        for part in changes.values():
            for name in TEXT_WIDTHS:
                if isinstance(part, PretrainedConfig) and hasattr(part, name):
                    setattr(part, name, text.hidden_size)
    heads = first_count(fields, HEAD_COUNTS)
    for name in HEAD_COUNTS:
        if is_count(fields.get(name)):
            changes[name] = min(fields[name], HEADS)
    for name in KV_HEAD_COUNTS:
        if is_count(fields.get(name)):
            changes[name] = HEADS if fields[name] >= heads else min(fields[name], GROUPED_KV_HEADS)
    for name in WIDTHS:
        if is_count(fields.get(name)) and heads:
            changes[name] = fields[name] // heads * min(heads, HEADS)
    changes |= layer_changes(fields)
    return {**changes, **EXTRA.get(config.model_type, {})}


def layer_changes(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the number of layers, and what is listed by layer, of a few layers with one of every kind."""
    changes: dict[str, Any] = {}
    for name in LAYER_COUNTS:
        count = fields.get(name)
        if not is_count(count):
            continue
        lists = {key: value for key, value in fields.items() if isinstance(value, list | tuple) and len(value) == count}
        kinds = [repr([value[i] for value in lists.values()]) for i in range(count)]
        kept = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
        kept = kept if len(kept) > 1 else list(range(min(2, count)))
        changes[name] = len(kept)
        changes |= {key: [value[i] for i in kept] for key, value in lists.items()}
    return changes


def is_count(value: Any) -> TypeGuard[int]:
    """Return whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def first_count(fields: dict[str, Any], names: tuple[str, ...]) -> int:
    """Return the first of several fields that is a positive integer, or 0."""
    return next((fields[name] for name in names if is_count(fields.get(name))), 0)


def is_special_token(name: str, value: Any) -> bool:
    """Return whether a field is the id of a token that the small vocabulary lacks."""
    return name.endswith(("_token_id", "_token_index", "_id")) and is_count(value) and value >= VOCABULARY
