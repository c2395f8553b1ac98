"""Rows of the slab are the static stores of the library; without vLLM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rocketkv.config import RocketKVConfig
from rocketkv.core.params import AttentionParams
from rocketkv.dispatch import Workspaces
from rocketkv.state.compress import close_prompt_by
from rocketkv.state.store import KVStore
from rocketkv.vllm.sizes import LayerShape
from rocketkv.vllm.slab import LayerSlab, decode_row, make_room

SHAPE = LayerShape(heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32)
PARAMS = AttentionParams(0.25, None, None)
MOST = 400


def config(method: str, backend: str = "torch") -> RocketKVConfig:
    return RocketKVConfig(
        method=method, token_budget=32, decode_reserve=16, window_size=8, decode_capacity=20, backend=backend
    )


def tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [1, heads, count, D]."""
    return tuple(torch.randn(1, heads, count, 16) for heads in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+", "snapkv"])
def test_a_row_holds_any_prompt_and_decodes_as_a_store(method: str) -> None:
    own = config(method)
    slab = LayerSlab([own], SHAPE, rows=3, max_prompt=MOST, device=torch.device("cpu"))
    kept = {name: tensor[[0, 2]].clone() for name, tensor in slab.memory.items()}
    for length in (1, 7, 8, 31, 32, 33, 64, 65, 129, 200, 399, MOST):
        query, key, value = tokens(length)
        store, own_queries = KVStore(), query[:, :, -8:]
        store.extend(key, value)
        store.prompt.queries = own_queries
        close_prompt_by(store, own, own.split_for(length, 16), PARAMS)
        for tensor in (*slab.memory.values(), slab.rules, slab.clock):
            tensor[1:2].view(torch.uint8).fill_(255)  # NaN: of another prompt, or after vLLM's sleep mode
        row = slab.close(1, own, key, value, own_queries, PARAMS, Workspaces())
        for step in range(25):  # more than decode_capacity: generated tokens are re-evicted
            if row.capacity == row.stored:
                rooms = [make_room(one, own, length + step, PARAMS, Workspaces()) for one in (row, store)]
                assert rooms == [10, 10]
            new = [tensor[:, :, 0] for tensor in tokens(1)]
            found, expected = (decode_row(one, own, *new, PARAMS, Workspaces()) for one in (row, store))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert row.capacity == row.decoding.prompt_stored + 20
        for name, tensor in row.tensors().items():
            place = slab.memory.get(name, slab.keys)[1]
            assert place.data_ptr() <= tensor.data_ptr(), name
            assert tensor.data_ptr() + tensor.nbytes <= place.data_ptr() + place.nbytes, name
    for name, tensor in kept.items():
        assert torch.equal(slab.memory[name][[0, 2]], tensor), name  # no other row is written
