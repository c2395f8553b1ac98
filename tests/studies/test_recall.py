"""Recall by budget: an arm that goes on from what was read once answers as one that reads the prompt itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rocketkv
from rocketkv.eval.methods import Compressed, Full
from rocketkv.eval.prefill import read_prompt
from studies import recall
from studies.recall import Settings, answer, markdown, method_of, study
from tiny import SKETCH_SPLIT, SMALL, VOCABULARY, build, greedy, prompt

FIELDS: dict[str, dict[str, Any]] = {
    "rocketkv": SMALL,
    "rocketkv+": {**SMALL, "method": "rocketkv+", "split": SKETCH_SPLIT},
    "streaming": {"method": "streaming", "token_budget": 24},
}


@pytest.mark.parametrize("name", FIELDS)
def test_an_arm_answers_as_if_it_had_read_the_prompt_itself(name: str) -> None:
    model, ids = build(), prompt(120)
    method = Compressed(rocketkv.RocketKVConfig(**FIELDS[name]))
    shared = read_prompt(model, [ids[0].tolist()])
    found = answer(model, method, shared, 12)
    with rocketkv.patch(model, method.config):
        expected, *_ = greedy(model, ids, 12)
    assert found == expected[0].tolist()
    full, *_ = greedy(model, ids, 12)
    assert answer(model, Full(), shared, 12) == full[0].tolist()


def test_arms_are_named() -> None:
    assert method_of("full").token_budget is None
    assert (method_of("rocketkv+:64").name, method_of("rocketkv+:64").token_budget) == ("rocketkv+", 64)
    for wrong in ("rocketkv", "rocketkv:", "rocketkv:many", ":64"):
        with pytest.raises(ValueError, match="METHOD:BUDGET"):
            method_of(wrong)


class Words:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: Any, **settings: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [[ord(letter) % VOCABULARY for letter in each] for each in text]}
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_a_study_asks_each_arm_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    asked: list[str] = []
    own = recall.answer

    def counted(model: Any, method: Any, *rest: Any) -> list[int]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(method.name)
        return own(model, method, *rest)

    monkeypatch.setattr(recall, "answer", counted)
    settings = Settings(tokens=(400,), prompts=2, arms=("full", "streaming:64"))
    with pytest.raises(KeyboardInterrupt):
        study(model, Words(), settings, tmp_path)  # type: ignore[arg-type]
    asked.clear()
    result = study(model, Words(), settings, tmp_path)  # type: ignore[arg-type]
    assert asked == ["streaming"]
    assert {arm: len(answers) for arm, answers in result["scores"]["400"].items()} == {"full": 2, "streaming:64": 2}


def test_the_table() -> None:
    scores = {"4096": {"full": [1.0] * 4, "a:1": [1.0, 0.0] * 2}, "8192": {"full": [1.0], "a:1": [0.0]}}
    lines = markdown({"scores": scores}).splitlines()
    assert lines[0] == "| | 4096 tokens | 8192 tokens |"
    assert lines[2] == "| `full` | 100.0 of 4 (51-100) | 100.0 of 1 (21-100) |"
    assert lines[3].startswith("| `a:1` | 50.0 of 4 (15-85) | 0.0 of 1")
