"""What a sweep asks for: its cells, its shards, flags over a YAML file over the defaults, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from eval_case import know_tasks, made_task
from rocketkv._version import __version__
from rocketkv.eval.cli import add_arguments, given_plans
from rocketkv.eval.records import CellDict, cell_key
from rocketkv.eval.sweep.plan import SETTINGS, Loaded, Plan, arms, cells, plan_from, shard
from rocketkv.eval.sweep.run import run_cells


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    know_tasks(
        monkeypatch,
        made_task("sized", group="both"),
        made_task("unsized", group="both", sized=False, version=3),
        made_task("plain", group="rules", chat=False),
        made_task("talk", group="rules", chat=True),
    )


def plan(**fields: Any) -> Plan:
    return Plan(**{"tasks": ("sized",), "lengths": (4096,), **fields})


def given(*arguments: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    (found,) = given_plans(parser.parse_args(["run", *arguments]))
    return found


def names(found: list[CellDict]) -> list[tuple[Any, ...]]:
    return [(cell["task"], cell["length"], cell["method"], cell["token_budget"]) for cell in found]


def test_a_sweep_is_every_method_at_every_budget_on_every_task_at_every_length() -> None:
    found = cells(
        plan(tasks=("both",), methods=("quest", "full", "rocketkv"), budgets=(512, 256), lengths=(4096, 8192)),
        Loaded(chat=True),
    )
    per_length = [("full", None), ("quest", 512), ("quest", 256), ("rocketkv", 512), ("rocketkv", 256)]
    assert names(found) == [
        (task, length, method, budget)
        for task in ("sized", "unsized")
        for length in (4096, 8192)
        for method, budget in per_length
    ]
    assert len({cell_key(cell) for cell in found}) == len(found)
    assert {cell["task_version"] for cell in found if cell["task"] == "unsized"} == {3}


def test_a_cell_has_what_the_plan_says() -> None:
    asked = plan(
        methods=("rocketkv",), samples=7, max_new_tokens=5, seed=3, model="m", dtype="bfloat16", agnostic=True,
        settings={"window_size": 16}, revision="r", chat_template_args={"enable_thinking": False}, thinking_tokens=9,
        generation="card", answers=4,
    )  # fmt: skip
    loaded = Loaded(True, weights="abc", attention="eager", sampling={"do_sample": True, "top_k": 20})
    assert cells(asked, loaded) == [
        {
            "task": "sized",
            "task_version": 1,
            "method": "rocketkv",
            "token_budget": 512,
            "length": 4096,
            "mode": "agnostic",
            "chat": True,
            "samples": 7,
            "max_new_tokens": 5,
            "seed": 3,
            "model": "m",
            "revision": "r",
            "dtype": "bfloat16",
            "attention": "eager",
            "chat_arguments": {"enable_thinking": False},
            "thinking_tokens": 9,
            "sampling": {"do_sample": True, "top_k": 20},
            "answers": 4,
            "batch_size": 1,
            "weights": "abc",
            "library": __version__,
            "settings": {"window_size": 16},
        }
    ]


def test_a_task_named_twice_has_its_cells_once() -> None:
    asked = plan(tasks=("unsized", "both"), methods=("full",))
    assert names(cells(asked, Loaded(chat=False))) == [("unsized", 4096, "full", None), ("sized", 4096, "full", None)]


def test_settings_are_for_the_librarys_methods_alone() -> None:
    found = cells(
        plan(settings={"window_size": 16}, methods=("full", "rocketkv", "kvpress:KnormPress")), Loaded(chat=True)
    )
    settings = {cell["method"]: cell["settings"] for cell in found}
    assert settings == {"full": {}, "rocketkv": {"window_size": 16}, "kvpress:KnormPress": {}}


@pytest.mark.parametrize(
    ("asked", "has", "expected"),
    [
        (None, True, {"sized": True, "plain": False, "talk": True}),
        (None, False, {"sized": False, "plain": False, "talk": False}),
        (False, True, {"sized": False, "plain": False, "talk": False}),
        (True, False, {"sized": True, "plain": False, "talk": True}),
    ],
)
def test_a_chat_template_is_used_where_it_is_wanted_and_the_official_rule_allows_it(
    asked: bool | None, has: bool, expected: dict[str, bool]
) -> None:
    found = cells(plan(tasks=("sized", "rules"), methods=("full",), chat=asked), Loaded(chat=has))
    assert {cell["task"]: cell["chat"] for cell in found} == expected


def test_tasks_of_the_datas_own_length_need_none() -> None:
    assert names(cells(plan(tasks=("unsized",), methods=("full",), lengths=()), Loaded(chat=True))) == [
        ("unsized", None, "full", None)
    ]
    for task in ("sized", "kl", "latency"):
        with pytest.raises(ValueError, match=f"'{task}' is made to a length: lengths must name at least one"):
            cells(plan(tasks=(task,), lengths=()), Loaded(chat=True))


def test_a_stock_task_is_asked_as_lm_eval_asks_it() -> None:
    asked = plan(tasks=("lm-eval:mine", "sized"), methods=("full",), lengths=(4096, 8192), agnostic=True)
    found = cells(asked, Loaded(chat=True))
    # It is neither made to a length nor asked in two parts: its records are not to say so.
    assert [(cell["task"], cell["length"], cell["mode"]) for cell in found] == [
        ("sized", 4096, "agnostic"),
        ("sized", 8192, "agnostic"),
        ("lm-eval:mine", None, "aware"),
    ]


def test_measurements_have_neither_chat_template_nor_mode() -> None:
    found = cells(plan(tasks=("kl", "latency"), methods=("full",), chat=True, agnostic=True), Loaded(chat=True))
    assert [(cell["task"], cell["task_version"], cell["chat"], cell["mode"]) for cell in found] == [
        ("kl", 1, False, "aware"),
        ("latency", 2, False, "aware"),
    ]


def test_arms_begin_with_the_full_cache() -> None:
    assert arms(plan(methods=("quest", "full"), budgets=(1, 2))) == [("full", None), ("quest", 1), ("quest", 2)]
    assert arms(plan(methods=("full",), budgets=())) == [("full", None)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shards_are_disjoint_and_together_all(count: int) -> None:
    everything = cells(
        plan(tasks=("both",), methods=("full", "quest"), budgets=(16, 32, 48), lengths=(8, 9)), Loaded(chat=True)
    )
    parts = [shard(everything, number, count) for number in range(1, count + 1)]
    keys = [cell_key(cell) for part in parts for cell in part]
    assert sorted(keys) == sorted(map(cell_key, everything))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    again = [shard(everything[::-1], number, count) for number in range(1, count + 1)]
    assert [sorted(map(cell_key, part)) for part in again] == [sorted(map(cell_key, part)) for part in parts]
    assert all(part == [cell for cell in everything if cell in part] for part in parts)  # in the plan's order


@pytest.mark.parametrize(("number", "count"), [(0, 2), (3, 2), (1, 0), (-1, 2)])
def test_there_is_no_such_shard(number: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"shard must be from 1/{count} to {count}/{count}, got {number}/{count}"):
        shard([], number, count)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tasks": ("x",)}, ValueError, "there is no task or group 'x'"),
        ({"tasks": ("sizd",)}, ValueError, "Did you mean 'sized'"),
        ({"methods": ("quset",)}, ValueError, "Did you mean 'quest'"),
        ({"methods": ("rocketkv",), "settings": {"window_size": 0}}, ValueError, "window_size"),
        ({"methods": ("no_such_module:make",)}, ImportError, "no_such_module"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_runs(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    asked = plan(**fields)
    with pytest.raises(error, match=message):
        cells(asked, Loaded(chat=True))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"tasks": ["sized"]}, TypeError, "tasks must be a list of str"),
        ({"budgets": (512.0,)}, TypeError, "budgets must be a list of int"),
        ({"budgets": (True,)}, TypeError, "budgets must be a list of int"),
        ({"lengths": (None,)}, TypeError, "lengths must be a list of int"),
        ({"methods": ("full", "full")}, ValueError, "methods must not name anything twice, got full, full"),
        ({"budgets": (0,)}, ValueError, "budgets must be at least 1"),
        ({"lengths": (-4,)}, ValueError, "lengths must be at least 1"),
        ({"budgets": ()}, ValueError, "budgets must name at least one, for methods full, rocketkv"),
        ({"tasks": ()}, ValueError, "at least one task and one method"),
        ({"methods": ()}, ValueError, "at least one task and one method"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": "5"}, TypeError, "samples must be of type int, got '5'"),
        ({"samples": None}, TypeError, "samples must be of type int"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of auto, float32, bfloat16, float16; got 'int8'"),
        ({"generation": "beam"}, ValueError, "generation must be one of greedy, card; got 'beam'"),
        ({"thinking_tokens": -1}, ValueError, "thinking_tokens must be at least 0, got -1"),
        ({"model": 7}, TypeError, "model must be of type str, got 7"),
        ({"chat": "no"}, TypeError, "chat must be of type bool or NoneType, got 'no'"),
        ({"agnostic": "yes"}, TypeError, "agnostic must be of type bool, got 'yes'"),
        ({"settings": None}, TypeError, "settings must be of type dict, got None"),
        ({"settings": {"window": 1}}, ValueError, "unknown settings window; there are"),
        ({"settings": {"token_budget": 1}}, ValueError, "unknown settings token_budget"),
        ({"settings": {"protect": "system"}}, ValueError, "unknown settings protect"),
    ],
)
def test_a_plan_refuses_what_is_impossible(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        plan(**fields)


def test_a_plan_in_a_file_may_have_single_values_for_lists() -> None:
    found = plan_from({"tasks": "sized", "budgets": 256, "methods": ["full", "quest"], "data_dir": "here"})
    assert found == plan(budgets=(256,), methods=("full", "quest"), data_dir=Path("here"), lengths=())
    with pytest.raises(ValueError, match="unknown fields budget, task; a sweep has agnostic, answers, attn,"):
        plan_from({"task": "sized", "budget": 5})


def test_no_arguments_are_the_defaults() -> None:
    assert given() == Plan()


def test_flags_stand_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "tasks: [sized, unsized]\nbudgets: 256\nmax-new-tokens: 9\nseed: 4\nchat: false\nagnostic: true\n"
        "settings: {window_size: 16, kernel_size: 5}\n",
        encoding="utf-8",
    )
    alone = given("--sweep", str(file))
    assert alone == Plan(
        tasks=("sized", "unsized"), budgets=(256,), max_new_tokens=9, seed=4, chat=False, agnostic=True,
        settings={"window_size": 16, "kernel_size": 5},
    )  # fmt: skip
    over = given(
        "--sweep", str(file), "--tasks", "unsized", "--budgets", "1,2", "--seed", "0", "--chat", "--set",
        "window_size=32", "--samples", "3", "--lengths", "64", "--methods", "full,a:b", "--data-dir", "d",
        "--model", "m", "--dtype", "float16", "--max-new-tokens", "1", "--attn", "eager", "--revision", "r",
        "--device-map", '{"": 0}', "--chat-template-arg", "enable_thinking=false", "--chat-template-arg", "effort=low",
        "--thinking-tokens", "7", "--generation", "card", "--toy-haystack",
    )  # fmt: skip
    assert over == dataclasses.replace(
        alone, tasks=("unsized",), budgets=(1, 2), seed=0, chat=True, settings={"window_size": 32, "kernel_size": 5},
        samples=3, lengths=(64,), methods=("full", "a:b"), data_dir=Path("d"), model="m", dtype="float16",
        max_new_tokens=1, attn="eager", revision="r", device_map={"": 0}, thinking_tokens=7, generation="card",
        chat_template_args={"enable_thinking": False, "effort": "low"}, toy_haystack=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n", "must be a mapping of fields to values, got list"), ("budget: 1\n", "unknown fields budget")],
)
def test_a_file_that_is_no_sweep_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        given("--sweep", str(file))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("# nothing\n", encoding="utf-8")
    assert given("--sweep", str(file)) == Plan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budgets", "512,large"), "--budgets: must be an integer of at least 1, got 'large'"),
        (("--lengths", "4k"), "--lengths: must be an integer of at least 1, got '4k'"),
        (("--samples", "0"), "--samples: must be an integer of at least 1, got '0'"),
        (("--methods", "full,rocketvk"), "--methods: there is no method 'rocketvk'. Did you mean 'rocketkv'?"),
        (("--device", "gpu"), "--device: must be cpu, cuda, cuda:1, mps or xpu, got 'gpu'"),
        (("--shard", "-1/2"), "--shard: expected one argument"),
        (("--set", "window_size"), "--set: must be FIELD=VALUE, got 'window_size'"),
        *((("--shard", text), "--shard: must be I/N, such as 1/4") for text in ("1", "a/b", "1/", "1/2/3")),
    ],
)
def test_a_flag_that_cannot_be_read_is_refused(
    arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        given(*arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown settings windows"):
        given("--set", "windows=3")


def test_settings_are_read_as_yaml_reads_values() -> None:
    assert len(SETTINGS) > 1
    found = given("--set", "window_size=8", "--set", "index_dtype=int8").settings
    assert found == {"window_size": 8, "index_dtype": "int8"}


def test_running_nothing_is_nothing(tmp_path: Path) -> None:
    assert str(run_cells(None, [])) == "0 cells done, 0 were before"  # type: ignore[arg-type]  # no cell needs a bench


def test_settings_go_by_the_flags_name_too() -> None:
    assert plan_from({"tasks": "sized", "set": {"window_size": 64}}).settings == {"window_size": 64}
