"""A layer, watched or not, on its way through a prompt and steps, and exact attention to what it stores."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from naive import attention
from rocketkv.budget import BudgetSplit
from rocketkv.config import RocketKVConfig
from rocketkv.hf.layer import RocketKVLayer, layer_of
from rocketkv.state.monitor import Monitor
from rocketkv.state.store import KVStore
from tiny import SETTINGS, SKETCH_SPLIT
from turns import KERNEL, PARAMS, PROMPT, RESERVE, SCALING, WINDOW, Tokens

SPLIT = BudgetSplit(token_budget=14, kept_tokens=50, sketch_bits=2, top_k=6, residual=True)
PLUS: dict[str, Any] = {**SETTINGS, "method": "rocketkv+", "token_budget": 24, "split": SKETCH_SPLIT}
# As much kept, and no selection of it.
ALL_STORED = BudgetSplit(token_budget=24, kept_tokens=40, value_aware=True, pool_offset=SKETCH_SPLIT.pool_offset)


def layer(
    *, watched: bool = True, method: str = "rocketkv+", split: BudgetSplit = SPLIT, **fields: Any
) -> RocketKVLayer:
    config = RocketKVConfig(
        method=method, split=split, window_size=WINDOW, kernel_size=KERNEL, decode_reserve=RESERVE, **fields
    )
    made = RocketKVLayer(config)
    made.monitor = Monitor(config, [0]) if watched else None
    return made


def forward(made: RocketKVLayer, given: Tokens) -> Tensor:
    """Take some tokens through a layer and return [B, H, n, Dv]."""
    made.armed = True
    assert layer_of(made.update(given.key, given.value)[0]) is made
    return made.attend(given.query, None, PARAMS, fast=lambda *_: None).transpose(1, 2)


def run(made: RocketKVLayer, given: Tokens, prompt_length: int = PROMPT) -> list[Tensor]:
    """Take a prompt and the tokens after it through a layer; return what each of these gives, [B, H, Dv]."""
    forward(made, given[:prompt_length])
    return [forward(made, given[i : i + 1])[:, :, 0] for i in range(prompt_length, len(given))]


def exact(store: KVStore, query: Tensor, **kwargs: Any) -> Tensor:
    """Return attention [B, H, Dv] to all that a store holds, by its definition."""
    keys, values, _, seq_lens = store.decoding.buffers[:4]
    seen = [[range(int(count)) for count in row] for row in seq_lens]
    return attention(query, keys, values, SCALING, seen, **kwargs)


def errors(out: Tensor, expected: Tensor) -> Tensor:
    return (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
