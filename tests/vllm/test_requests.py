"""Requests with settings of their own are refused, by either model runner; nothing else changes."""

from __future__ import annotations

import sys
from abc import abstractmethod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample import logits_processor as runner_1
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator as runner_2
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as Runner2Processor

from rocketkv.vllm import requests


def test_each_model_runner_loads_the_check_by_its_entry_point() -> None:
    def of_runner_1(params: SamplingParams) -> None:
        runner_1.validate_logits_processors_parameters(None, params)

    (loaded,) = runner_1._load_custom_logitsprocs(None)
    assert issubclass(loaded, runner_1.LogitsProcessor)
    for check in (of_runner_1, runner_2(None)):
        check(SamplingParams(extra_args={"kv_transfer_params": {}}))
        check(SamplingParams())
        with pytest.raises(VLLMValidationError, match="leave 'rocketkv' out of extra_args"):
            check(SamplingParams(extra_args={"rocketkv": {"token_budget": 64}}))


class NewerInterface(Runner2Processor):
    """An interface that vLLM may have one day."""

    @abstractmethod
    def unheard_of(self) -> None: ...


def test_the_check_has_the_interfaces_of_the_installed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is configured: vLLM starts no engine if an entry point fails to load."""
    monkeypatch.setitem(sys.modules, "vllm.newer", SimpleNamespace(LogitsProcessor=NewerInterface))
    newer = requests.RequestCheck
    assert issubclass(newer, NewerInterface)
    newer(SimpleNamespace(additional_config={}), object(), unheard_of=True)
    for name, module in list(sys.modules.items()):
        if getattr(module, "__dict__", {}).get("LogitsProcessor") is runner_1.LogitsProcessor:
            monkeypatch.setitem(sys.modules, name, None)
    assert issubclass(requests.RequestCheck, NewerInterface)
    assert not issubclass(requests.RequestCheck, runner_1.LogitsProcessor)


def test_it_changes_nothing() -> None:
    model: Any = SimpleNamespace(is_attention_free=False)
    for arguments in ((torch.device("cpu"), False), (object(),)):  # of runner 1 and 2
        own = requests.RequestCheck(SimpleNamespace(model_config=model, additional_config={}), *arguments)
        assert own.is_argmax_invariant()
        assert not own.add_request(0, SamplingParams())
        logits = torch.randn(2, 8)
        assert own.apply(logits) is own.apply(logits, object()) is logits


def test_models_without_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROCKETKV_VLLM", raising=False)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(is_attention_free=True), additional_config={})
    requests.RequestCheck(config)
    config.additional_config = {"rocketkv": {"token_budget": 64}}
    with pytest.raises(ValueError, match="does not support models without attention"):
        requests.RequestCheck(config)
