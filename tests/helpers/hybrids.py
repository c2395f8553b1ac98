"""Tiny hybrid models with linear-attention layers."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from tiny import COMMON, sharpened

LINEAR: dict[str, dict[str, Any]] = {
    "Qwen3Next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "full_attn_idxs": [1, 3],
        "block_ff_dim": 96,
        "block_multiple_of": 16,
    },
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
}


def linear(name: str) -> PreTrainedModel:
    settings = {**COMMON, "num_hidden_layers": 4, **LINEAR[name]}
    kind = getattr(transformers, f"{name}ForCausalLM")
    return sharpened(kind, getattr(transformers, f"{name}Config")(**settings))
