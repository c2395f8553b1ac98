"""True errors beside a step's own estimates: against attention made here, and how their ranks are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rocketkv
from rocketkv import RocketKVConfig
from rocketkv.eval.measures.kl import Window
from rocketkv.hf import loading
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.state.monitor import StepReport
from studies.__main__ import main
from studies.telemetry import errors, figures, spearman
from tiny import SETTINGS, SKETCH_SPLIT, build, prompt

PLUS = RocketKVConfig(method="rocketkv+", token_budget=24, split=SKETCH_SPLIT, **SETTINGS)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [1, 4, 9, 100], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # sqrt(0.9)
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlation(first: list[float], second: list[float], expected: float) -> None:
    found = spearman(*(torch.tensor(values, dtype=torch.float64) for values in (first, second)))
    assert found == pytest.approx(expected, abs=1e-12)


def test_errors_are_those_of_the_steps() -> None:
    """The estimates are what a patched model reports, and an error is nothing where everything is attended to."""
    model, reports = build(), list[StepReport]()
    window = Window("0", prompt(86)[0].tolist(), {})
    found = errors(model, PLUS, window, 80)
    assert {name: tensor.shape for name, tensor in found.items()} == dict.fromkeys(found, torch.Size([5, 2, 4]))
    with rocketkv.patch(model, PLUS, on_step=reports.append), torch.no_grad():
        cache = model(torch.tensor([window.ids[:80]])).get(CACHE_ARGUMENT)
        for token in window.ids[80:85]:
            model(torch.tensor([[token]]), **{CACHE_ARGUMENT: cache})
    for i, report in enumerate(reports):
        for layer in range(2):
            torch.testing.assert_close(found["missed"][i, layer], report.missed[layer][0].double())
            torch.testing.assert_close(found["estimated_error"][i, layer], report.estimated_error[layer][0].double())
    assert (found["stored"] > 1e-3).all()
    assert not found["stored"].allclose(found["full"])
    dense = RocketKVConfig(**{**vars(PLUS), "on_loss": "dense", "loss_bound": 0.0})
    assert (errors(model, dense, window, 80)["full"] > 1e-3).all()  # what stage 1 evicted is gone
    within = RocketKVConfig(method="rocketkv+", token_budget=600, **SETTINGS)
    assert all((tensor < 1e-5).all() for tensor in errors(model, within, window, 80).values())


def test_a_method_without_estimates_is_refused() -> None:
    config = RocketKVConfig(method="rocketkv", token_budget=64)
    with pytest.raises(ValueError, match="'rocketkv' makes no estimate"):
        errors(build(), config, Window("0", prompt(30)[0].tolist(), {}), 25)


def test_figures() -> None:
    stored = torch.rand(6, 2, 4, dtype=torch.float64) + 0.1
    made: dict[str, Tensor] = {"stored": stored, "full": -stored, "missed": stored**2, "estimated_error": 2 * stored}
    found = figures(made)
    assert found["points"] == 48
    assert found["missed~stored"] == {"overall": pytest.approx(1), "layers": [pytest.approx(1)] * 2}
    assert found["estimated_error~full"]["overall"] == pytest.approx(-1)
    assert found["estimated_over_true"] == pytest.approx([2, 2, 2])


class Words:
    """A tokenizer of the tiny models: a word is the number of its letters."""

    bos_token_id = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + len(word) for word in text.split()]}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *asked: (build(), Words()))
    output = tmp_path / "found"
    arguments = ["telemetry", "--context", "300", "--steps", "3", "--watched", "16", "-o", str(output)]
    assert main([*arguments, "--budgets", "40", "64"]) == 0
    result = json.loads((output / "telemetry.json").read_text())
    assert [one["budget"] for one in result["results"]] == [40, 64]
    assert result["results"][0]["points"] == 3 * 2 * 4
    assert set(result["milliseconds"]) == {"audit_every=16", "on_step", "on_loss='warn'"}
    assert all(0 < taken["watching"] < taken["step"] for taken in result["milliseconds"].values())
    table = (output / "telemetry.md").read_text()
    assert capsys.readouterr().out == table
    assert "| 64 | 24 |" in table
    assert main([*arguments, "--steps", "0"]) == 2
    assert "steps must be at least 1, got 0" in capsys.readouterr().err
