"""Methods by name: the library's own, presses of a made-up kvpress, functions of the user's own; what is refused."""

from __future__ import annotations

import json
import os
import stat
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from eval_case import know_tasks, made_task, model, sample, save, tokenizer
from presses import KeepFirst, module
from rocketkv import METHODS, RocketKVConfig
from rocketkv.cli.main import main
from rocketkv.eval.conversation import answer_sample
from rocketkv.eval.methods import SETTINGS, Compressed, Full, find_method
from rocketkv.eval.records import records
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import rocketkv_layers

OWN = "rocketkv_test_method"


class NoRatio:
    """A press that has no ratio."""


@pytest.fixture
def kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "kvpress", KeepFirstPress=KeepFirst, NoRatioPress=NoRatio, helper=len)


def test_full_is_the_stock_model() -> None:
    method = find_method("full", None)
    assert (method.name, method.token_budget) == ("full", None)
    assert method == Full()
    tiny = model()
    with method.attached(tiny):
        assert type(method.new_cache(tiny, 5)) is DynamicCache


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_the_librarys_methods_have_their_budget_and_settings(name: str) -> None:
    method = find_method(name, 96, {"window_size": 16})
    assert isinstance(method, Compressed)
    assert (method.name, method.token_budget) == (name, 96)
    assert method.config == RocketKVConfig(method=name, token_budget=96, window_size=16)
    tiny = model()
    before = type(tiny).generate, dict(vars(tiny))
    with method.attached(tiny):
        cache = method.new_cache(tiny, 5)
    assert isinstance(cache, RocketKVCache)
    assert [layer.prompt_end for layer in rocketkv_layers(cache)] == [5, 5]
    assert (type(tiny).generate, dict(vars(tiny))) == before


def test_settings_are_all_fields_but_the_sweeps_axes_and_those_that_are_no_text() -> None:
    config = RocketKVConfig(token_budget=96)
    others = {"method", "token_budget", "split", "protect", "fair_shares", "skip_layers", "layer_budgets"}
    assert {*SETTINGS} | others == set(config.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "budget", "settings", "message"),
    [
        ("full", 5, {}, "'full' takes neither a budget nor settings"),
        ("full", None, {"window_size": 3}, "'full' takes neither a budget nor settings"),
        ("rocketkv", None, {}, "'rocketkv' needs a token budget"),
        ("kvpress:KeepFirstPress", None, {}, "needs a token budget"),
        ("rocketkv", 5, {"windowsize": 3}, "unknown settings windowsize; there are"),
        ("rocketkv", 5, {"method": "quest"}, "unknown settings method; there are"),
        ("rocketkv", 0, {}, "token_budget"),
        ("roketkv", 5, {}, "no method 'roketkv'. Did you mean 'rocketkv'"),
        ("zzz", 5, {}, "no method 'zzz'. There are "),
        ("kvpress:KeepFirstPress", 5, {"window_size": 3}, "takes no settings"),
        (f"{OWN}:make", 5, {"window_size": 3}, "takes no settings"),
        ("kvpress:KeepFrstPress", 5, {}, "no press 'KeepFrstPress'. Did you mean kvpress:KeepFirstPress"),
        ("kvpress:helper", 5, {}, "no press 'helper'"),
        ("kvpress:NoRatioPress", 5, {}, "NoRatioPress has no compression_ratio"),
        (f"{OWN}:nothing", 5, {}, f"{OWN} has no function 'nothing'"),
        (f"{OWN}:constant", 5, {}, f"{OWN} has no function 'constant'"),
    ],
)
@pytest.mark.usefixtures("kvpress")
def test_what_is_no_method_is_refused(
    name: str, budget: int | None, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(monkeypatch, OWN, make=lambda _: Full(), constant=5)
    with pytest.raises(ValueError, match=message):
        find_method(name, budget, settings)


def test_a_function_of_the_users_own_makes_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, OWN, make=lambda budget: Full(name=f"{OWN}:make", token_budget=budget))
    method = find_method(f"{OWN}:make", 7)
    assert (method.name, method.token_budget) == (f"{OWN}:make", 7)


@pytest.mark.parametrize(
    ("made", "missing"),
    [(None, "name, token_budget, attached, new_cache"), (types.SimpleNamespace(name="a"), "token_budget, attached")],
)
def test_a_function_that_returns_no_method_is_told_what_it_lacks(
    made: Any, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(monkeypatch, OWN, make=lambda _: made)
    with pytest.raises(TypeError, match=f"{OWN}:make must return a method, but what it returned has no {missing}"):
        find_method(f"{OWN}:make", 7)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ImportError, match="rocketkv_test_no_such"):
        find_method("rocketkv_test_no_such:make", 7)


@pytest.mark.usefixtures("kvpress")
def test_a_presss_ratio_leaves_the_budget_of_each_prompt() -> None:
    method, tiny = find_method("kvpress:KeepFirstPress", 30), model()
    assert (method.name, method.token_budget) == ("kvpress:KeepFirstPress", 30)
    press: Any = method._press  # type: ignore[attr-defined]
    for length, ratio in ((120, 0.75), (60, 0.5), (30, 0.0), (20, 0.0)):
        assert type(method.new_cache(tiny, length)) is DynamicCache
        assert press.compression_ratio == pytest.approx(ratio)
    with pytest.raises(ValueError, match="needs the prompt's length"):
        method.new_cache(tiny, None)


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
@pytest.mark.usefixtures("kvpress")
def test_a_press_keeps_its_budget_and_tokens_their_positions(mode: str) -> None:
    tiny, words = model(), tokenizer()
    seen: list[list[int]] = []
    tiny.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    made = sample(turns=2, max_new_tokens=4)
    answers = answer_sample(tiny, words, find_method("kvpress:KeepFirstPress", 30), made, mode=mode)
    prompts = [position for position in seen if len(position) > 1]
    length = prompts[0][-1] + 1
    assert length > 60
    # The cache holds 30 tokens after the first prompt, yet the text goes on where it was.
    assert [position[0] for position in prompts] == [0, length, length] if mode == "agnostic" else [0, length]
    assert all(position == list(range(position[0], position[-1] + 1)) for position in seen)
    steps = [position[0] for position in seen[-3:]]
    assert steps == [prompts[-1][-1] + 1 + step for step in range(3)]
    later = len(prompts[-1]) + 3  # of the last question, and the tokens written after it
    token_bytes = 2 * 2 * 16 * 2 * 4  # layers, heads, channels, keys and values, float32
    assert answers.cost["kv_bytes"] == (30 + later) * token_bytes


def test_without_kvpress_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ImportError, match=r"kvpress:KnormPress needs the package kvpress.*--kvpress-python PATH"):
        find_method("kvpress:KnormPress", 30)


def test_a_sweep_with_presses_says_so_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    know_tasks(monkeypatch, made_task())
    folder = save(tmp_path / "model")
    results = tmp_path / "results"
    assert main(arguments(folder, results)) == 2
    assert "--kvpress-python PATH" in capsys.readouterr().err
    assert not results.exists()


def arguments(folder: Path, results: Path, *more: str) -> list[str]:
    return [
        "eval", "run", "--model", str(folder), "--tasks", "made", "--methods", "full,kvpress:KeepFirstPress",
        "--budgets", "30", "--lengths", "60", "--samples", "1", "--max-new-tokens", "3", "--device", "cpu", "-o",
        str(results), *more,
    ]  # fmt: skip


def test_presses_are_left_to_the_environment_that_has_kvpress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    know_tasks(monkeypatch, made_task())
    folder, results, told = save(tmp_path / "model"), tmp_path / "results", tmp_path / "told.json"
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], 'PYTHONPATH' in os.environ], open({str(told)!r}, 'w'))\nsys.exit(3)\n"
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    given = arguments(folder, results, "--kvpress-python", str(python))
    monkeypatch.setattr(sys, "argv", ["rocketkv", *given])
    assert main(given) == 3  # as that process ended
    assert json.loads(told.read_text()) == [["-m", "rocketkv.cli.main", *given, "--only-presses"], False]
    assert [record["cell"]["method"] for record in records(results)] == ["full"]
    assert "1 cells done" in capsys.readouterr().err


@pytest.mark.usefixtures("kvpress")
def test_the_environment_that_has_kvpress_runs_presses_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    know_tasks(monkeypatch, made_task())
    folder, results = save(tmp_path / "model"), tmp_path / "results"
    assert main(arguments(folder, results, "--only-presses", "--kvpress-python", os.devnull)) == 0
    assert [record["cell"]["method"] for record in records(results)] == ["kvpress:KeepFirstPress"]
    assert capsys.readouterr().out == ""  # the summary is the first process's
    assert main(arguments(folder, results)) == 0
    assert sorted(record["cell"]["method"] for record in records(results)) == ["full", "kvpress:KeepFirstPress"]
    assert torch.is_grad_enabled()
