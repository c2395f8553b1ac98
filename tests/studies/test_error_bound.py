"""`max_error` measured: windows within the bound, dense layers, bytes at equal KL."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import eval_case
from studies.error_bound import Settings, bytes_at, markdown, study
from tiny import build


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_a_study_counts_windows_and_layers(model: str, tmp_path: Path) -> None:
    made, tokenizer = build(model, vocab_size=eval_case.VOCABULARY), eval_case.tokenizer()
    bounds = (1e-9, 0.99)
    settings = Settings(
        prompt=300, steps=4, kinds=("prose", "lists"), places=2, bounds=bounds, kl_places=1, budgets=(72, 96)
    )
    result = study(made, tokenizer, settings, tmp_path)
    assert [(cell["text"], cell["place"], cell["max_error"]) for cell in result["errors"]] == [
        (text, place, bound) for place in (0, 1) for text in ("prose", "lists") for bound in bounds
    ]
    for cell in result["errors"]:
        for error, budget, stored in cell["layers"]:
            if cell["max_error"] == 0.99:
                assert budget is not None
                assert 0 < error <= 0.99
            else:  # keeps all tokens
                assert budget is None
                assert error < 1e-5
                assert stored >= 1
    by_arm = {cell["arm"]: cell for cell in result["divergence"] if cell["text"] == "lists"}
    assert list(by_arm) == ["max_error=1e-09", "max_error=0.99", "t = 72", "t = 96"]
    assert by_arm["max_error=1e-09"]["kl"] < 1e-9 < by_arm["t = 72"]["kl"]
    assert by_arm["t = 72"]["stored"] < by_arm["t = 96"]["stored"]
    assert by_arm["t = 72"]["read"] < by_arm["t = 96"]["read"] < by_arm["max_error=1e-09"]["read"] == 1
    # A second run reads the journal.
    assert study(made, tokenizer, settings, tmp_path) == json.loads(json.dumps(result))
    table = markdown({"settings": asdict(settings), **result})
    assert "| 0.99 | 4 of 4 (" in table
    assert "| 100.0 % | 0.0 % |" in table


def test_bytes_at_a_kl_between_budgets() -> None:
    fixed = [(0.4, 0.1), (0.1, 0.2), (0.025, 0.8)]
    assert bytes_at(0.1, fixed) == pytest.approx(0.2)
    assert bytes_at(0.2, fixed) == pytest.approx((0.1 * 0.2) ** 0.5)
    assert bytes_at(0.05, fixed) == pytest.approx((0.2 * 0.8) ** 0.5)
    assert bytes_at(0.5, fixed) is None
    assert bytes_at(0.01, fixed) is None
