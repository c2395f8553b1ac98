"""A step of several rows of a slab is, for each, the step of that row alone; without vLLM.

On the CPU step, and on the kernels in Triton's interpreter.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from close import assert_near
from rocketkv.config import RocketKVConfig
from rocketkv.core.params import AttentionParams
from rocketkv.dispatch import Workspaces
from rocketkv.state.store import KVStore
from rocketkv.vllm.sizes import LayerShape
from rocketkv.vllm.slab import LayerSlab, decode_row

SHAPE = LayerShape(heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32)
PARAMS = AttentionParams(0.25, None, None)
LONGEST = 3000


# Prompts with pages of one, two and three tokens, within the budget, and of more than a tile of units.
LENGTHS = {"rocketkv": [200, 700, 5, 2500, 150, 2000], "rocketkv+": [70, 300, 5, 31, 99]}


# Choices in a launch of their own: by several programs a row, and by one.
APART = (("rocketkv+", (64, 128)), ("rocketkv", ()))


def config(method: str, backend: str = "triton") -> RocketKVConfig:
    budget = 96 if method == "rocketkv" else 32
    return RocketKVConfig(
        method=method, token_budget=budget, decode_reserve=16, window_size=8, decode_capacity=20, backend=backend
    )


def tokens(batch: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values [B, heads, count, D]."""
    return tuple(torch.randn(batch, heads, count, 16).to(dtype) for heads in (4, 2, 2))  # type: ignore[return-value]


def filled(
    method: str, lengths: list[int], dtype: torch.dtype = torch.float32, index_dtype: str = "keys"
) -> tuple[LayerSlab, list[KVStore]]:
    """Return a slab with prompts of these lengths in its rows, and their stores."""
    torch.manual_seed(0)
    own = replace(config(method, "torch"), index_dtype=index_dtype)  # stage 1 on the kernels is tested elsewhere
    shape = replace(SHAPE, dtype=dtype)
    slab = LayerSlab([own], shape, rows=len(lengths), max_prompt=LONGEST, device=torch.device("cpu"))
    stores = []
    for row, length in enumerate(lengths):
        query, key, value = tokens(1, length, dtype)
        stores.append(slab.close(row, own, key, value, query[:, :, -8:], PARAMS, Workspaces()))
    return slab, stores


@pytest.mark.parametrize(("method", "choice"), [(method, None) for method in LENGTHS] + [*APART])
def test_a_step_of_rows_is_the_step_of_each_row(
    method: str, choice: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    from rocketkv.kernels import decode, select_plan

    if choice is not None:
        monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
        monkeypatch.setattr(select_plan, "SELECT_BLOCKS", choice)
    own, lengths = config(method), LENGTHS[method]
    slab, stores = filled(method, lengths)
    _, alone = filled(method, lengths)
    if method == "rocketkv":
        assert {store.decoding.split.page_size for store in stores} == {1, 2, 3}
    shared, single = Workspaces(), [Workspaces() for _ in lengths]
    order = [3, -1, 1, 0, len(lengths) - 1]  # the third row stays as it is, and one place is padding
    rows = torch.tensor(order, dtype=torch.int32)
    kept = {name: tensor[2].view(torch.uint8).clone() for name, tensor in slab.memory.items()}
    steps = 3 if choice is None else 1
    for _ in range(steps):  # pages end in some of the rows
        query, key, value = (tensor[:, :, 0] for tensor in tokens(len(order), 1))
        out = torch.full_like(query, 7.0)
        assert slab.decode(rows, own, query, key, value, out, PARAMS, shared)
        (space,) = shared.slabs.values()
        assert bool((out[1] == 7).all())
        for place, row in enumerate(order):
            if row < 0:
                continue
            one, store = slice(place, place + 1), alone[row]
            expected = decode_row(store, own, query[one], key[one], value[one], PARAMS, single[row])
            assert_near(out[one], expected)
            mine, other = stores[row].tensors(), store.tensors()
            for name, tensor in mine.items():
                if name == "missed":
                    torch.testing.assert_close(tensor, other[name], equal_nan=True)
                else:
                    assert torch.equal(tensor.double(), other[name].double()), name
            if store.stored > own.token_budget:
                (used,) = single[row].buffers.values()
                chosen = space.chosen.view(-1, SHAPE.kv_heads, space.chosen.shape[1])[place]
                assert chosen[:, : used.chosen.shape[1]].tolist() == used.chosen.tolist()
    assert slab.clock.tolist() == [length + steps * (row in order) for row, length in enumerate(lengths)]
    for name, tensor in kept.items():
        assert torch.equal(slab.memory[name][2].view(torch.uint8), tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", LENGTHS)
def test_the_cpu_step_of_rows_has_the_bits_of_each_row_alone(method: str, dtype: torch.dtype) -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    lengths, paged = LENGTHS[method], method == "rocketkv"
    index_dtype = "float8_e5m2" if paged and dtype == torch.bfloat16 else "keys"
    own = replace(config(method, "cpu"), index_dtype=index_dtype)
    before, order = torch.get_num_threads(), [*range(len(lengths)), -1]
    order.remove(2)  # this row stays as it is
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        slab, stores = filled(method, lengths, dtype, index_dtype)
        _, alone = filled(method, lengths, dtype, index_dtype)
        kept = {name: tensor[2].view(torch.uint8).clone() for name, tensor in slab.memory.items()}
        shared, shuffled = Workspaces(), random.Random(threads)
        for _ in range(3):  # pages end in some of the rows
            shuffled.shuffle(order)
            rows = torch.tensor(order, dtype=torch.int32)
            query, key, value = (tensor[:, :, 0] for tensor in tokens(len(order), 1, dtype))
            out = torch.full_like(query, 7.0)
            assert slab.decode(rows, own, query, key, value, out, PARAMS, shared)
            for place, row in enumerate(order):
                if row < 0:
                    assert bool((out[place] == 7).all())
                    continue
                one = slice(place, place + 1)
                expected = decode_row(alone[row], own, query[one], key[one], value[one], PARAMS, Workspaces())
                assert torch.equal(out[one], expected)
                for name, tensor in alone[row].tensors().items():
                    found = stores[row].tensors()[name]
                    assert torch.equal(found.double().nan_to_num(-1), tensor.double().nan_to_num(-1)), name
        torch.set_num_threads(before)
        assert shared.warned == set()
        assert slab.clock.tolist() == [length + 3 * (row in order) for row, length in enumerate(lengths)]
        for name, tensor in kept.items():
            assert torch.equal(slab.memory[name][2].view(torch.uint8), tensor), name
