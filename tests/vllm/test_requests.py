"""Requests with settings of their own are refused, by either model runner; nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample import logits_processor as runner_1
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator as runner_2

from rocketkv.vllm.requests import RequestCheck


def test_each_model_runner_loads_the_check_by_its_entry_point() -> None:
    def of_runner_1(params: SamplingParams) -> None:
        runner_1.validate_logits_processors_parameters(None, params)

    assert RequestCheck in runner_1._load_custom_logitsprocs(None)
    for check in (of_runner_1, runner_2(None)):
        check(SamplingParams(extra_args={"kv_transfer_params": {}}))
        check(SamplingParams())
        with pytest.raises(VLLMValidationError, match="leave 'rocketkv' out of extra_args"):
            check(SamplingParams(extra_args={"rocketkv": {"token_budget": 64}}))


def test_it_changes_nothing() -> None:
    model: Any = SimpleNamespace(is_attention_free=False)
    for arguments in ((torch.device("cpu"), False), (object(),)):  # of runner 1 and 2
        own = RequestCheck(SimpleNamespace(model_config=model, additional_config={}), *arguments)
        assert own.is_argmax_invariant()
        assert not own.add_request(0, SamplingParams())
        logits = torch.randn(2, 8)
        assert own.apply(logits) is own.apply(logits, object()) is logits


def test_models_without_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROCKETKV_VLLM", raising=False)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(is_attention_free=True), additional_config={})
    RequestCheck(config)
    config.additional_config = {"rocketkv": {"token_budget": 64}}
    with pytest.raises(ValueError, match="does not support models without attention"):
        RequestCheck(config)
