"""`custom_generate/`: transformers runs it from disk, and it gives the tokens of a patched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import dynamic_module_utils

import rocketkv
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.hf.patch_state import state_of
from tiny import SMALL, build, left_padded, prompt

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of `generate`; what transformers copies of the folder goes to a temporary one."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    return {"custom_generate": str(ROOT), "trust_remote_code": True}


def test_it_gives_the_tokens_of_a_patched_model(custom: dict[str, Any]) -> None:
    model, inputs = build(), left_padded([prompt(90), prompt(60)])
    with rocketkv.patch(model, **SMALL):
        expected = model.generate(**inputs, **SETTINGS)
    stock = model.generate(**inputs, **SETTINGS)
    found = model.generate(**inputs, **SETTINGS, **custom, **SMALL, return_dict_in_generate=True)
    assert found.sequences.equal(expected)
    assert not expected.equal(stock)
    stats = found[CACHE_ARGUMENT].stats()
    assert stats.layers[0].tokens_stored < 90
    assert state_of(model) is None
    assert model.generate(**inputs, **SETTINGS).equal(stock)


def test_what_it_cannot_do_is_refused(custom: dict[str, Any]) -> None:
    model, ids = build(), prompt(40)
    with pytest.raises(ValueError, match="token_budget"):
        model.generate(ids, **SETTINGS, **custom, token_budget=0)
    with pytest.raises(ValueError, match="tokenbudget"):
        model.generate(ids, **SETTINGS, **custom, tokenbudget=64)
    assert state_of(model) is None
    with rocketkv.patch(model, **SMALL), pytest.raises(ValueError, match="patched already"):
        model.generate(ids, **SETTINGS, **custom, token_budget=64)
