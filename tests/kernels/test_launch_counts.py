"""Launches of a decode step at real capacities: counted, not run.

One head of 16 channels: what is launched depends on the stored tokens and the split, not on the width of a layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rocketkv.budget import BudgetSplit, rocketkv_plus_split, rocketkv_split
from rocketkv.config import RocketKVConfig
from rocketkv.core.params import AttentionParams
from rocketkv.dispatch import Workspaces, decode_step
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore
from rocketkv.static_step import static_step
from rocketkv.vllm.sizes import LayerShape
from rocketkv.vllm.slab import LayerSlab

pytest.importorskip("triton", reason="Triton has no package for this platform")

import kernel_configurations as configurations
from layer_case import DEVICE
from rocketkv.kernels import decode, dependent
from tracking import VIEWS, Tracker

D, WINDOW, ROOM = 16, 32, 8
KERNELS = ("append_score", "append_sketch", "select_parts", "select", "select_attend")
TWO, THREE = ["select_attend"], ["select_parts", "select_attend"]
# Of stored tokens by method: pages of three fit one program's registers far longer than single tokens do.
CASES = [
    ("rocketkv", 8192, TWO),
    ("rocketkv", 16384, TWO),
    ("rocketkv", 131200, THREE),
    ("rocketkv+", 8192, TWO),
    ("rocketkv+", 16384, THREE),
    ("rocketkv+", 131200, THREE),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Take down what is launched, by name, with its options, and run none of it."""
    found: list[tuple[str, dict[str, Any]]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: found.append((self.name, options))

    for name in KERNELS:
        monkeypatch.setattr(decode, f"{name}_kernel", Noted(name))
    return found


def split_for(method: str) -> BudgetSplit:
    """Return a split of the method whose steps rank all stored tokens: nothing is evicted."""
    if method == "rocketkv":
        return replace(rocketkv_split(131072, 1024, D, 128), kept_tokens=None)
    return replace(rocketkv_plus_split(32768, 1024, D, 128), kept_tokens=None, value_aware=False, pool_offset=0)


def first_of(method: str) -> str:
    return "append_score" if method == "rocketkv" else "append_sketch"


@pytest.mark.parametrize(("method", "stored", "later"), CASES)
def test_a_static_step_is_two_launches_or_three_and_nothing_else(
    method: str, stored: int, later: list[str], launched: list[tuple[str, dict[str, Any]]]
) -> None:
    store, prompt = KVStore(), stored - ROOM
    key = torch.randn(1, 1, prompt, D, device=DEVICE)
    store.extend(key, key, expected=prompt)
    store.prompt.remember(key[:, :, -WINDOW:], WINDOW)
    params = AttentionParams(D**-0.5)
    close_prompt(store, split_for(method), params, decode_reserve=ROOM, kernel_size=7, decode_capacity=ROOM)
    assert store.capacity == stored
    query, new = torch.randn(1, 1, D, device=DEVICE), torch.randn(1, 1, D, device=DEVICE)
    step = static_step(query, store, backend="triton")
    known = [*step.tensors, *step.workspace, step.out, query, new]

    def operator() -> None:
        own = step.tensors, step.workspace, step.out, step.names, step.rule
        torch.ops.rocketkv.decode_step(query, new, new, *own, *params)

    for run in (lambda: step(query, new, new, params), operator):
        launched.clear()
        with torch.inference_mode(), Tracker(known) as tracker:
            run()
        assert [name for name, _ in launched] == [first_of(method), *later]
        assert set(tracker.operations) - VIEWS <= {"decode_step"}
        assert tracker.peak == 0
    launched.clear()
    decode_step(query, new, new, store, params, backend="triton")
    assert [name for name, _ in launched] == [first_of(method), *later]


@pytest.mark.parametrize(("method", "stored", "later"), CASES)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_step_of_a_large_layer_launches_as_many_that_overlap(
    architecture: str,
    method: str,
    stored: int,
    later: list[str],
    launched: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Llama-3.1-8B's heads, on tensors without memory; on sm_90 all launches but the first are dependent ones."""
    monkeypatch.setattr(dependent, "AVAILABLE", True)
    settings = configurations.LLAMA_128K if method == "rocketkv" else configurations.PLUS_32K
    configurations.decode(torch.bfloat16, **{**settings, "capacity": stored})(132, architecture)
    assert [name for name, _ in launched] == [first_of(method), *later]
    overlaps = ["launch_pdl" in options for _, options in launched]
    assert overlaps == [False, *(architecture == "sm_90" for _ in later)]


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
def test_a_step_of_rows_of_a_slab_launches_as_many_for_any_number_of_rows(
    method: str, launched: list[tuple[str, dict[str, Any]]]
) -> None:
    config = RocketKVConfig(method=method, token_budget=64, window_size=8, decode_capacity=16, backend="triton")
    shape = LayerShape(heads=1, kv_heads=1, head_dim=D, value_dim=D, dtype=torch.float32)
    slab = LayerSlab([config], shape, rows=9, max_prompt=512, device=DEVICE)
    params, workspaces = AttentionParams(D**-0.5), Workspaces()
    for count in (1, 2, 9, 2):
        rows = torch.arange(count, dtype=torch.int32, device=DEVICE)
        new, out = torch.randn(count, 1, D, device=DEVICE), torch.empty(count, 1, D, device=DEVICE)
        launched.clear()
        space = workspaces.slabs.copy()
        with torch.inference_mode(), Tracker([new, out, rows]) as tracker:
            assert slab.decode(rows, config, new, new, new, out, params, workspaces)
        assert [name for name, _ in launched] == [first_of(method), *TWO]
        assert len(space) < len(workspaces.slabs) or not set(tracker.operations) - VIEWS  # nothing but launches
