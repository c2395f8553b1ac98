"""A causal model whose attention never asks transformers' attention interface, so that no version can support it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaPreTrainedModel


class OwnConfig(LlamaConfig):
    model_type = "own_attention"


class OwnAttention(nn.Module):
    is_causal = True

    def __init__(self, config: OwnConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mix(hidden.cumsum(1))


class OwnForCausalLM(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OwnAttention(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return torch.nn.functional.linear(hidden, self.embed.weight)
