"""The token counts of samples, and how tasks are named."""

from __future__ import annotations

import importlib

import pytest

from eval_case import END, know_tasks, made_task, sample, tokenizer
from rocketkv.eval.tasks.base import MODULES, Preparation, catalogue, find_tasks
from rocketkv.eval.tasks.length import sample_tokens

WORDS = tokenizer()


def ids_of(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


def test_a_samples_tokens_count_its_chat_template() -> None:
    made = sample(turns=2)
    text = f"{made.context}{made.turns[0].question}"
    for chat, whole in ((False, text), (True, f"<|user|>{text}{END}<|assistant|>")):
        prepared = Preparation(tokenizer=WORDS, length=None, count=1, chat=chat)
        assert sample_tokens(prepared, made) == len(ids_of(f"{whole} the number is"))


def test_tasks_are_found_by_name_and_group_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = (importlib.import_module(f"rocketkv.eval.tasks.{name}") for name in MODULES)
    names = sorted(task.name for module in modules for task in module.TASKS)
    assert sorted(catalogue()) == names  # no two tasks have one name
    assert len(names) > 20
    know_tasks(monkeypatch, made_task("a", group="x"), made_task("b", group="y"), made_task("c", group="x"))
    assert [task.name for task in find_tasks(["b", "x", "a"])] == ["b", "a", "c"]
    assert find_tasks([]) == []
    with pytest.raises(ValueError, match=r"no task or group 'z'. Groups: x, y"):
        find_tasks(["a", "z"])
