"""The benchmark of whole models: its arms agree, and it reports what it documents; nothing is timed here."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no package for this platform")

from fake_graphs import FakeGraphs
from rocketkv.cli.main import main
from rocketkv.eval.bench import cli, model_arms
from rocketkv.eval.bench import model as bench_model
from rocketkv.eval.bench.kernel_cases import Case
from rocketkv.eval.checks import WrongResultError

CPU, FP32 = torch.device("cpu"), torch.float32
SMALL = Case(2, 128, 32)


@pytest.mark.integration
def test_a_model_is_captured_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeGraphs(monkeypatch)
    real = model_arms.ModelArm.step

    def step(arm: model_arms.ModelArm) -> Tensor:
        arm.ready()  # a graph would hold on to the patch that it was captured with
        return real(arm)

    monkeypatch.setattr(model_arms.ModelArm, "step", fakes.wrap(step, (1, 101)))
    monkeypatch.setattr(bench_model, "STEPS", 3)
    model = model_arms.build_model("qwen3-8b", 400 + model_arms.DECODE_CAPACITY, FP32, CPU, **model_arms.TINY)
    with torch.inference_mode():
        result = bench_model._bench_case(model, Case(1, 300, 64), 5)
    assert not isinstance(result, str)
    assert set(result["milliseconds"]) == {"static", "full", "rocketkv", "rocketkv+"}
    assert set(result["first_token"]) == {"stock", "rocketkv", "rocketkv+"}
    assert set(result["absent"]) == {"flash-attn"}
    # Two steps to check the graph, six rounds of three, and the step that comes next: all that the cache holds then.
    assert result["bytes"]["dense"] == (300 + 2 + 6 * 3 + 1) * 2 * 2 * 16 * 4 * 2
    assert result["bytes"]["rocketkv"] < result["bytes"]["dense"]
    assert json.loads(json.dumps(result)) == result


@pytest.mark.integration
@pytest.mark.parametrize("shape", list(model_arms.SHAPES))
def test_the_steps_of_a_tiny_model_agree(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shape in cli.SHAPES
    assert main(["bench", "model", "--check", "--json", "--shape", shape]) == 0
    result = json.loads(capsys.readouterr().out)
    for one in result["checked"]:
        assert one["arms"] == ["static", "full", "rocketkv", "rocketkv+"]
        assert one["first_token"] == ["stock", "rocketkv", "rocketkv+"]


@pytest.mark.integration
def test_a_model_that_goes_wrong_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = model_arms.ModelArm.step

    def wrong(arm: model_arms.ModelArm) -> Tensor:
        out = real(arm)
        return out if arm.config is None else out * 1.01

    monkeypatch.setattr(model_arms.ModelArm, "step", wrong)
    assert main(["bench", "model", "--check", "--cases", "1x40/64"]) == 1
    assert "nothing is timed" in capsys.readouterr().err


@pytest.mark.integration
def test_a_model_reads_all_weights_but_the_embedding() -> None:
    model = model_arms.build_model("llama-3.1-8b", 64, FP32, CPU, **model_arms.TINY)
    held = sum(weight.nbytes for weight in model.parameters())
    assert bench_model.step_weights(model) == held - 101 * 64 * 4


def test_a_models_ceiling_counts_its_weights() -> None:
    seconds = {"static": [0.02] * 5, "full": [0.018] * 5, "rocketkv": [0.009] * 5}
    read = {"full": 300, "rocketkv": 60, "rocketkv+": 80}
    result = bench_model.summary(Case(1, 131072, 1024), seconds, 100, read)
    assert result["best_dense"] == "full"
    assert result["byte_ceiling"] == {"rocketkv": 400 / 160}
    assert result["speedup"]["rocketkv"]["median"] == pytest.approx(2.0)
    assert result["tokens_per_second"]["rocketkv"] == pytest.approx(1 / 0.009)
    assert [(goal["goal"], goal["met"]) for goal in result["goals"]] == [(1.8, True)]
    quick = {"rocketkv": [0.019] * 5, "rocketkv+": [0.012] * 5}
    short = bench_model.summary(Case(1, 512, 1024), seconds | quick, 100, dict.fromkeys(read, 10))
    assert [(goal["goal"], goal["met"]) for goal in short["goals"]] == [(0.97, False)]
    assert short["speedup"]["rocketkv+"]["median"] == pytest.approx(1.5)
    for field in (*result, "case", "absent", "first_token", "clocks"):
        assert field in (bench_model.__doc__ or ""), field


@pytest.mark.integration
def test_flash_attention_over_a_static_cache_is_a_dense_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(query: Tensor, keys: Tensor, values: Tensor, *, cache_seqlens: Tensor, softmax_scale: float) -> Tensor:
        rows = [
            torch.nn.functional.scaled_dot_product_attention(
                *(
                    tensor[b : b + 1, :n].transpose(1, 2)
                    for tensor, n in ((query, 1), (keys, length), (values, length))
                ),
                enable_gqa=True,
                scale=softmax_scale,
            )
            for b, length in enumerate(cache_seqlens.tolist())
        ]
        return torch.cat(rows).transpose(1, 2)

    flash = types.ModuleType("flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr(flash, "flash_attn_with_kvcache", attend, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    model = model_arms.build_model("llama-3.1-8b", 400, FP32, CPU, **model_arms.TINY)
    case = Case(2, 100, 64)
    with torch.inference_mode():
        arms, _ = model_arms.model_arms(model, case)
        assert not model_arms.check_arms(case, arms)  # the dense arms agree
        monkeypatch.setattr(flash, "flash_attn_with_kvcache", lambda *args, **options: 2 * attend(*args, **options))
        with pytest.raises(WrongResultError, match="logits of flash-attn"):
            model_arms.check_arms(case, arms)
        model_arms.restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert set(arms) == {"static", "flash-attn", "full", "rocketkv", "rocketkv+"}
