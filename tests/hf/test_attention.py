"""Which attention reads a prompt: the model's own fast one where it has one, and never an S x S mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rocketkv
from rocketkv.core import dense
from rocketkv.hf.attention import rocketkv_attention
from tiny import FAMILIES, LARGE, SMALL, build, greedy, hand_written, left_padded, prompt

pytestmark = pytest.mark.integration

FLASH = "flash_of_tests"
ROWS = [prompt(90), prompt(50, seed=2)]
Call = tuple[str, tuple[int, ...], int, Any]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Register an attention as flash attention registers itself, which notes how it is called."""
    noted: list[Call] = []

    def flash(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
        dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
        s_aux: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert attention_mask is None or (attention_mask.ndim == 2 and attention_mask.shape[1] == key.shape[2])
        noted.append((module.config._attn_implementation, tuple(query.shape), key.shape[2], attention_mask))
        # Queries are those of the last tokens.
        length, size = query.shape[2], key.shape[2]
        distance = torch.arange(size - length, size)[:, None] - torch.arange(size)
        seen = distance >= 0
        if sliding_window is not None:
            seen = seen & (distance < sliding_window)
        seen = seen[None] if attention_mask is None else seen & attention_mask[:, None].bool()
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        if s_aux is not None:
            sink = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            weights = torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            weights = logits.softmax(-1)
        out = weights.nan_to_num() @ value.repeat_interleave(groups, dim=1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(FLASH, flash)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    yield noted
    del ALL_ATTENTION_FUNCTIONS._global_mapping[FLASH]
    del AttentionMaskInterface._global_mapping[FLASH]


def choose_flash(model: Any) -> None:
    """Set the attention as a model does that was loaded with it; asking for it by name needs a package."""
    model.config._attn_implementation_internal = FLASH


@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss", "phi3"])
def test_prompts_go_through_flash_attention(family: str, padded: bool, chunk: int | None, calls: list[Call]) -> None:
    model = build(family)
    inputs = left_padded(ROWS) if padded else {"input_ids": ROWS[0], "attention_mask": torch.ones_like(ROWS[0])}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with rocketkv.patch(model, **SMALL):
        cache = rocketkv.RocketKVCache(model.config, prompt_length=90, **SMALL)
        expected = hand_written(model, ids, cache=cache, mask=mask, chunk=chunk or 0)
    choose_flash(model)
    layers = model.config.num_hidden_layers
    with rocketkv.patch(model, **SMALL):
        cache = rocketkv.RocketKVCache(model.config, prompt_length=90, **SMALL)
        tokens, logits, _ = hand_written(model, ids, cache=cache, mask=mask, chunk=chunk or 0)
        assert {call[0] for call in calls} == {FLASH}
        prefill = [call for call in calls if call[1][2] > 1]
        assert len(prefill) == layers * (3 if chunk else 1)
        assert [call[2] for call in prefill[-1:]] == [90]
        if padded:
            # Full-attention layers see all of the prompt; the last windows of sliding ones hold no padding.
            assert all(call[3] is not None for call in prefill if call[2] in (32, 64, 90))
    assert tokens.equal(expected[0])
    close(logits, expected[1])
    assert model.config._attn_implementation == FLASH


def test_generate_goes_through_flash_attention(calls: list[Call]) -> None:
    model = build()
    with rocketkv.patch(model, **SMALL):
        expected = greedy(model, left_padded(ROWS))
    choose_flash(model)
    with rocketkv.patch(model, **SMALL):
        found = greedy(model, left_padded(ROWS))
    # Both layers read the prompt; decode steps are ours.
    assert [(call[0], call[2]) for call in calls] == [(FLASH, 90)] * 2
    assert found[0].equal(expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_eager_models_read_prompts_with_sdpa(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(attn_implementation=implementation)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    shapes: list[tuple[int, ...]] = []

    def noted(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(query.shape))
        return sdpa(module, query, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", noted)
    expected = greedy(model, ROWS[0], 1)[1]
    del shapes[:]
    with rocketkv.patch(model, **SMALL):
        logits = greedy(model, ROWS[0], 1)[1]
    assert shapes == [(1, 4, 90, 16)] * 2
    close(logits, expected)


class LargestMask(TorchDispatchMode):
    """Note the most elements of any tensor with as many columns as keys, and of any boolean one."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.elements = 0
        self.name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                stored = tensor.untyped_storage().nbytes() // tensor.itemsize
                if (tensor.dtype == torch.bool or tensor.shape[-1:] == (self.length,)) and stored > self.elements:
                    self.elements, self.name = stored, func.overloadpacket.__name__
        return result


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_of_all_queries_and_keys(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_BYTES", 2**18)
    length = 1024
    model = build(family, num_attention_heads=2, num_key_value_heads=1, vocab_size=64, hidden_size=32)
    inputs = left_padded([torch.randint(3, 64, (1, length)), torch.randint(3, 64, (1, length - 300))])
    with rocketkv.patch(model, **LARGE), LargestMask(length) as largest:
        logits = greedy(model, inputs, 1)[1]
    assert 0 < largest.elements < length * length, largest.name
    with LargestMask(length) as stock:
        expected = greedy(model, inputs, 1)[1]
    assert stock.elements >= length * length, "the stock model makes such a mask, so this test can see one"
    largest_logit = expected.abs().max()
    close(logits / largest_logit, expected / largest_logit)


def test_wrappers_pass_the_dropout_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    # kvpress, when it is imported, wraps all functions that are registered, ours too, in one of this signature.
    def wrapper(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float, **kwargs: Any
    ) -> Any:
        return rocketkv_attention(module, query, key, value, attention_mask, dropout, **kwargs)

    model = build()
    with rocketkv.patch(model, **SMALL):
        expected = greedy(model, ROWS[0])
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "rocketkv", wrapper)
        found = greedy(model, ROWS[0])
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_mask_at_all_is_causal(softcap: float | None) -> None:
    module = build().model.layers[0].self_attn
    query, key, value = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    whole = rocketkv_attention(module, query, key, value, None, scaling=0.25, softcap=softcap)[0]
    for length in range(1, 6):
        part = rocketkv_attention(
            module, query[:, :, :length], key[:, :, :length], value[:, :, :length], None, scaling=0.25, softcap=softcap
        )[0]
        torch.testing.assert_close(whole[:, :length], part)
