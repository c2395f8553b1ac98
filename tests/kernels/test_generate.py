"""Whole models on the kernels, in Triton's interpreter where there is no GPU, and the choice of the backend."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rocketkv
from close import assert_near
from rocketkv import backend, dispatch
from rocketkv.budget import BudgetSplit
from rocketkv.core.eviction import TORCH_OPS
from rocketkv.hf.layer import RocketKVLayer
from tiny import HYBRID, SETTINGS, SMALL, build, greedy, left_padded, prompt

pytest.importorskip("triton", reason="Triton has no package for this platform")

PADDED = left_padded([prompt(56), prompt(27, seed=3)])


def assert_same(model: Any, inputs: Any, **fields: Any) -> Any:
    with rocketkv.patch(model, **fields, backend="torch"):
        tokens, logits, _ = greedy(model, inputs, 6)
    with rocketkv.patch(model, **fields, backend="triton") as handle:
        found, found_logits, cache = greedy(model, inputs, 6)
        stats = handle.stats()
    assert found.equal(tokens)
    assert_near(found_logits, logits, 2e-5)
    assert stats.workspace_bytes > 0
    return cache


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])  # and a Llama below
def test_models_give_the_same_tokens(family: str) -> None:
    assert_same(build(family, num_hidden_layers=2, layer_types=HYBRID["layer_types"][:2]), prompt(70), **SMALL)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_left_padded_batches_give_the_same_tokens(family: str) -> None:
    assert_same(build(family, num_hidden_layers=1), PADDED, **SMALL)


@pytest.mark.parametrize("method", ["snapkv", "streaming", "sparq", "rocketkv+"])
def test_methods_give_the_same_tokens(method: str) -> None:
    assert_same(build(num_hidden_layers=1), prompt(70), **SETTINGS, token_budget=48, method=method)


def test_layers_share_their_workspace_and_its_bytes_are_counted() -> None:
    cache = assert_same(build(), prompt(70), **SMALL)
    layers = [layer for layer in cache.layers if isinstance(layer, RocketKVLayer)]
    first = layers[0].workspaces
    assert all(layer.workspaces is first for layer in layers)
    (workspace,) = first.buffers.values()
    live = sum(tensor.untyped_storage().nbytes() for tensor in workspace.tensors().values())
    assert cache.stats().workspace_bytes == live
    assert cache.stats().total_bytes == sum(layer.stats().total_bytes for layer in layers) + live


def test_what_the_kernels_do_not_take_runs_on_the_reference_and_says_so_once() -> None:
    split = BudgetSplit(token_budget=24, kept_tokens=60, page_size=20, channels=8, top_k=12)
    model = build()
    with rocketkv.patch(model, **{**SMALL, "split": split}, backend="triton"):
        with pytest.warns(UserWarning, match="run on PyTorch, not on the kernels: pages hold 20 tokens") as said:
            found = greedy(model, prompt(90), 4)[0]
        assert sum("not on the kernels" in str(warning.message) for warning in said) == 1
    with rocketkv.patch(model, **{**SMALL, "split": split}, backend="torch"):
        assert greedy(model, prompt(90), 4)[0].equal(found)


def test_the_backend_is_chosen_by_field_then_variable_then_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    compiled = importlib.util.find_spec("numba") is not None
    assert backend.backend_name(cpu) == ("cpu" if compiled else "torch")
    assert backend.backend_name(cpu, "triton") == "triton"
    assert backend.backend_name(torch.device("cuda")) == "triton"
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert backend.backend_name(cpu) == "triton"
    assert backend.backend_name(cpu, "torch") == "torch"
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="ROCKETKV_BACKEND must be one of auto, torch, triton, cpu; got 'cuda'"):
        backend.backend_name(cpu)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' cannot run on 'cpu': the kernels need an NVIDIA or AMD GPU"):
        backend.backend_name(cpu, "triton")
    with pytest.raises(ValueError, match="backend='cpu' cannot run on 'cuda': the compiled step needs a CPU"):
        backend.backend_name(torch.device("cuda"), "cpu")


def test_without_numba_a_cpu_runs_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend.no_cpu_step.cache_clear()
    try:
        assert backend.backend_name(cpu) == "torch"
        assert "rocketkv[cpu]" in backend.cpu_hint(cpu)
        with pytest.raises(ValueError, match=r"numba package is not installed \(pip install 'rocketkv\[cpu\]'\)"):
            backend.backend_name(cpu, "cpu")
    finally:
        backend.no_cpu_step.cache_clear()


def test_without_the_triton_package_a_gpu_runs_pytorch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend.no_triton.cache_clear()
    with FakeTensorMode():
        keys = torch.empty(1, 2, 30, 16, device="cuda")
    try:
        assert backend.backend_name(keys.device) == "torch"
        with pytest.warns(UserWarning, match="pip install triton"):
            assert dispatch.eviction_ops(keys) is TORCH_OPS
        with pytest.raises(ValueError, match="the triton package is not installed"):
            backend.backend_name(torch.device("cuda"), "triton")
    finally:
        backend.no_triton.cache_clear()
