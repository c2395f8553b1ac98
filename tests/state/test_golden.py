"""The official program's own numbers: kept positions exactly, outputs to 1e-5, through the store and the cache."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from close import assert_near
from rocketkv.budget import BudgetSplit
from rocketkv.config import RocketKVConfig
from rocketkv.core import decode
from rocketkv.core.params import AttentionParams
from rocketkv.core.topk import select
from rocketkv.dispatch import Workspaces, decode_step, eviction_ops
from rocketkv.hf.layer import RocketKVLayer, layer_of
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore

GOLDEN = Path(__file__).parents[1] / "golden"
PARAMS = AttentionParams(64**-0.5)


def explicit_split(budget: int, params: dict[str, Any]) -> BudgetSplit:
    c2 = params["c2"]
    page_size = math.ceil(math.sqrt(c2))
    if page_size > c2:
        page_size = 1
    return BudgetSplit(
        token_budget=budget,
        kept_tokens=params["prompt_budget"],
        page_size=page_size,
        channels=math.floor(64 * page_size / c2),
        top_k=params["topk"],
    )


@pytest.mark.parametrize("budget", [64, 128, 256])
@pytest.mark.parametrize("layer", [7, 22])
def test_one_turn(layer: int, budget: int) -> None:
    info = json.loads((GOLDEN / "params.json").read_text())
    params = info["params"][f"layer_{layer}.budget_{budget}"]
    data = load_file(GOLDEN / f"layer_{layer}.safetensors")
    key, value, prompt = data["key"], data["value"], info["prompt_length"]
    store = KVStore()
    store.extend(key[:, :, :prompt], value[:, :, :prompt])
    store.prompt.remember(data["query_window"], info["window_size"])
    close_prompt(
        store,
        explicit_split(budget, params),
        PARAMS,
        decode_reserve=info["max_new_tokens"],
        kernel_size=info["kernel_size"],
    )
    kept = data[f"kept_positions.budget_{budget}"]
    assert store.stored == kept.shape[2] == params["prompt_budget"]
    assert torch.equal(store.decoding.positions[:, :, : store.stored], kept)
    expected = data[f"decode_output.budget_{budget}"]
    for i in range(info["decode_steps"]):
        at = prompt + i
        out = decode_step(data["query_decode"][:, :, i], key[:, :, at], value[:, :, at], store, PARAMS)
        assert_near(out, expected[:, :, i])


def causal(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
    """Attend as a model's own kernel would: the queries are those of the last keys."""
    assert padding is None
    length, size = query.shape[2], key.shape[2]
    mask = torch.ones(length, size, dtype=torch.bool).tril(size - length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)


class Turns:
    """Two turns through one cache layer, as transformers and the attention function drive it."""

    def __init__(self, method: str, split: BudgetSplit, data: dict[str, Tensor], info: dict[str, Any]) -> None:
        config = RocketKVConfig(
            method=method,
            split=split,
            window_size=info["window_size"],
            kernel_size=info["kernel_size"],
            decode_reserve=info["max_new_tokens"],
        )
        self.layer = RocketKVLayer(config)
        self.data = data

    def forward(self, start: int, stop: int) -> Tensor:
        """Return [B, H, n, D] for tokens `start` to `stop`."""
        query, key, value = (self.data[name][:, :, start:stop] for name in ("query", "key", "value"))
        self.layer.armed = True
        returned, _ = self.layer.update(key, value)
        assert layer_of(returned) is self.layer
        out = self.layer.attend(query, None, PARAMS, fast=causal)
        return out.transpose(1, 2)


NAMES = {"rocketkv": "rocket", "rocketkv-mt": "rocket_mt"}
# Chunks, and whether a prompt's end is known, are the layer's concern: kernels see neither, nor transformers. They meet
# each method and each budget once; both layers and three budgets are in the test of one turn by the kernels.
BY_KERNELS = [("rocketkv", 128, "unknown", 1), ("rocketkv-mt", 64, "known", 1)]
TWO_TURNS = [
    *(
        pytest.param("torch", *case, marks=pytest.mark.integration)
        for case in product(NAMES, [64, 128], ["known", "unknown"], [1, 3])
    ),
    *(("triton", *case) for case in BY_KERNELS),
]


@pytest.mark.parametrize(("backend", "method", "budget", "prompt_end", "chunks"), TWO_TURNS)
def test_two_turns(
    backend: str, method: str, budget: int, prompt_end: str, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton has no package for this platform")
    monkeypatch.setenv("ROCKETKV_BACKEND", backend)
    name = NAMES[method]
    info = json.loads((GOLDEN / "multi_turn_layer_7.json").read_text())
    data = load_file(GOLDEN / "multi_turn_layer_7.safetensors")
    params = info["params"][f"{name}.budget_{budget}"]
    turns = Turns(method, explicit_split(budget, params), data, info)
    for number, turn in enumerate(info["turns"]):
        start, stop = turn["prefill"]
        assert turns.layer.get_seq_length() == start
        if prompt_end == "known":
            turns.layer.prompt_end = stop
        elif number:
            turns.layer.begin_turn()
        bounds = [start + (stop - start) * i // chunks for i in range(chunks + 1)]
        outputs = [turns.forward(first, last) for first, last in pairwise(bounds)]
        expected = f"{name}.budget_{budget}.turn_{number}."
        assert_near(outputs[-1][:, :, -4:], data[expected + "prefill_last4"])
        decoded = [turns.forward(at, at + 1) for at in range(stop, stop + turn["decode_steps"])]
        assert_near(torch.cat(decoded, dim=2), data[expected + "decode"])
    assert turns.layer.get_seq_length() == info["total_length"]
    store, history = turns.layer.store, turns.layer.history
    assert store.uniform
    if history is None:
        assert store.stored == params["stored_tokens_at_end"]
    else:
        history.absorb(store)
        assert history.seen == params["stored_tokens_at_end"]
        assert store.stored == params["prompt_budget"] + info["turns"][-1]["decode_steps"]


@pytest.fixture(scope="module")
def scored() -> dict[int, Tensor]:
    """By layer, what the kernels score a prompt's tokens by: the same for every budget."""
    return {}


@pytest.mark.parametrize("budget", [64, 128, 256])
@pytest.mark.parametrize("layer", [7, 22])
def test_one_turn_by_the_kernels_and_what_they_select(
    layer: int, budget: int, scored: dict[int, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    info = json.loads((GOLDEN / "params.json").read_text())
    split = explicit_split(budget, info["params"][f"layer_{layer}.budget_{budget}"])
    data = load_file(GOLDEN / f"layer_{layer}.safetensors")
    key, value, prompt = data["key"], data["value"], info["prompt_length"]
    stores = {name: KVStore() for name in ("torch", "triton")}
    for name, store in stores.items():
        store.extend(key[:, :, :prompt], value[:, :, :prompt])
        store.prompt.remember(data["query_window"], info["window_size"])
        ops = eviction_ops(store.prompt.keys, backend=name)
        if name == "triton":

            def once(*args: Any, score: Any = ops.window_scores, **kwargs: Any) -> Tensor:
                if layer not in scored:
                    scored[layer] = score(*args, **kwargs)
                return scored[layer].clone()

            ops = ops._replace(window_scores=once)
        close_prompt(store, split, PARAMS, ops=ops, decode_reserve=16, kernel_size=info["kernel_size"])
    for name in ("positions", "keys", "values", "bounds", "seq_lens"):
        assert stores["torch"].tensors()[name].equal(stores["triton"].tensors()[name]), name
    selected: list[Tensor] = []

    def noted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions, weight = select(*args, **kwargs)
        selected.append(positions.sort(-1).values)
        return positions, weight

    monkeypatch.setattr(decode, "select", noted)
    workspaces = Workspaces()
    for i in range(info["decode_steps"]):
        step = data["query_decode"][:, :, i], key[:, :, prompt + i], value[:, :, prompt + i]
        decode_step(*step, stores["torch"], PARAMS, backend="torch")
        out = decode_step(*step, stores["triton"], PARAMS, backend="triton", workspaces=workspaces)
        assert_near(out, data[f"decode_output.budget_{budget}"][:, :, i])
        (workspace,) = workspaces.buffers.values()
        assert workspace.chosen.tolist() == selected[-1].flatten(0, 1).tolist()
