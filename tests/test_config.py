"""Settings: what is refused, with what words, and the split that follows."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from rocketkv import budget
from rocketkv.budget import METHODS, BudgetSplit, Method, register_method
from rocketkv.config import RocketKVConfig

NUMBERS = ["token_budget", "decode_reserve", "window_size", "kernel_size"]


def test_defaults() -> None:
    config = RocketKVConfig()
    assert (config.method, config.window_size, config.stage_1_kernel_size, config.decode_reserve) == (
        "rocketkv+",
        32,
        13,
        128,
    )
    assert config.split is None
    assert RocketKVConfig(method="rocketkv").stage_1_kernel_size == 63, "the paper's"


def test_pools_are_the_methods_own_unless_given() -> None:
    sketched = {"rocketkv+", "rocketkv-mt+"}
    assert {name: RocketKVConfig(method=name).stage_1_kernel_size for name in METHODS} == {
        name: 13 if name in sketched else 63 for name in METHODS
    }
    assert RocketKVConfig(method="rocketkv+", kernel_size=63).stage_1_kernel_size == 63
    assert dataclasses.replace(RocketKVConfig(), method="rocketkv+").stage_1_kernel_size == 13


def test_settings_are_frozen_and_named() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RocketKVConfig().token_budget = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        RocketKVConfig("rocketkv")  # type: ignore[misc]


@pytest.mark.parametrize("value", [512.0, True, "512"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_must_be_an_int(name: str, value: Any) -> None:
    fields: dict[str, Any] = {name: value}
    with pytest.raises(TypeError, match=f"{name} must be an int, got {value!r} of type {type(value).__name__}"):
        RocketKVConfig(**fields)


def test_a_budget_cannot_be_left_out() -> None:
    with pytest.raises(TypeError, match=r"token_budget must be an int, got None"):
        RocketKVConfig(token_budget=None)  # type: ignore[arg-type]


def test_what_is_no_switch_and_no_device_is_refused() -> None:
    with pytest.raises(TypeError, match="fair_shares must be True or False, got 'no'"):
        RocketKVConfig(fair_shares="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"history_device must be the name of a device.*got 'banana'"):
        RocketKVConfig(method="rocketkv-mt", history_device="banana")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_must_be_positive(name: str, value: int) -> None:
    fields: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        RocketKVConfig(**fields)


def test_an_even_kernel_is_refused_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"kernel_size must be odd.*got 64\. Use 63 or 65\."):
        RocketKVConfig(kernel_size=64)
    assert RocketKVConfig(kernel_size=1).kernel_size == 1


@pytest.mark.parametrize(
    ("given", "near"), [("rocketkw", "rocketkv"), ("snap-kv", "snapkv"), ("exact_topk", "exact-topk")]
)
def test_an_unknown_method_is_refused_with_the_nearest_and_the_list(given: str, near: str) -> None:
    with pytest.raises(ValueError, match="method must be one of") as error:
        RocketKVConfig(method=given)
    message = str(error.value)
    assert f"got {given!r}" in message
    assert f"Did you mean {near!r}?" in message
    assert all(method in message for method in METHODS)


def test_a_method_like_none_of_ours_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match="method must be one of") as error:
        RocketKVConfig(method="zzz")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(("window", "reserve"), [(32, 128), (32, 32), (5, 1), (17, 16)])
@pytest.mark.parametrize("method", METHODS)
def test_the_least_budget_is_accepted_and_one_less_refused(method: str, window: int, reserve: int) -> None:
    fields: dict[str, Any] = {"method": method, "window_size": window, "decode_reserve": reserve}
    least = METHODS[method].least_budget(window, reserve)
    assert RocketKVConfig(token_budget=least, **fields).token_budget == least
    if least > 1:
        with pytest.raises(ValueError, match=f"token_budget must be at least {least} .*got {least - 1}") as error:
            RocketKVConfig(token_budget=least - 1, **fields)
        message = str(error.value)
        assert method in message
        assert f"window_size={window}" in message
        assert f"decode_reserve={reserve}" in message


def test_split_for_is_the_methods_split() -> None:
    config = RocketKVConfig(method="quest", token_budget=100, decode_reserve=50)
    assert config.split_for(950, 48) == METHODS["quest"].split(950, 100, 48, 50)


def test_a_split_of_ones_own_is_used_for_every_prompt() -> None:
    split = BudgetSplit(token_budget=64, kept_tokens=40, page_size=2, channels=10, top_k=20)
    config = RocketKVConfig(split=split)
    assert config.split_for(100, 16) is split
    assert config.split_for(100_000, 10) is split
    with pytest.raises(ValueError, match=r"split.channels must be at most head_dim=9, got 10"):
        config.split_for(100, 9)


def test_a_split_of_ones_own_must_keep_the_window() -> None:
    split = BudgetSplit(token_budget=64, kept_tokens=31)
    with pytest.raises(ValueError, match=r"split.kept_tokens must be at least window_size=32.*got 31"):
        RocketKVConfig(split=split)
    assert RocketKVConfig(split=split, window_size=31).split is split
    by_position = BudgetSplit(token_budget=8, kept_tokens=8, top_k=8, sinks=2)
    assert RocketKVConfig(split=by_position).split is by_position


def test_a_split_must_be_a_split() -> None:
    with pytest.raises(TypeError, match="split must be a BudgetSplit or None, got dict"):
        RocketKVConfig(split={"token_budget": 64})  # type: ignore[arg-type]


def test_integers_of_numpy_and_lists_are_stored_as_pythons_own() -> None:
    config = RocketKVConfig(
        token_budget=np.int64(256),
        kernel_size=np.int32(5),
        decode_capacity=np.uint8(64),
        protect=[[np.int64(0), 4], (7, 9)],
        layer_budgets={np.int64(3): np.int32(1024), 1: 300},
    )
    same = RocketKVConfig(
        token_budget=256,
        kernel_size=5,
        decode_capacity=64,
        protect=((0, 4), (7, 9)),
        layer_budgets=((1, 300), (3, 1024)),
    )
    assert config == same
    assert RocketKVConfig(skip_layers=[np.int64(0), -1]).skip_layers == (0, -1)
    assert hash(config) == hash(same)
    assert "int64" not in repr(config)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["layer_budgets"] == [[1, 300], [3, 1024]]
    assert dataclasses.replace(config, token_budget=300).layer_budgets == ((1, 300), (3, 1024))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"protect": [(0, 1.5)]}, TypeError, "protect must be an int, got 1.5 of type float"),
        ({"protect": [3]}, TypeError, "protect must be a list or tuple, got 3"),
        ({"protect": [(1, 2, 3)]}, TypeError, "protect must hold pairs of integers"),
        ({"protect": [(5, 5)]}, ValueError, "0 <= start < stop; got \\(5, 5\\)"),
        ({"protect": "user"}, ValueError, "protect must be 'system', ranges .* got 'user'"),
        ({"protect": "system", "method": "streaming"}, ValueError, "rank tokens by attention; 'streaming' does not"),
        ({"skip_layers": 0}, TypeError, "skip_layers must be a list or tuple, got 0"),
        ({"skip_layers": [True]}, TypeError, "skip_layers must be an int, got True"),
        ({"layer_budgets": {0: 1}}, ValueError, r"layer_budgets\[0\] must be at least 35 .*got 1"),
        ({"skip_layers": [0], "decode_capacity": 64}, ValueError, "skip_layers is for caches that grow.*=64"),
        ({"layer_budgets": {0: "8"}}, TypeError, "layer_budgets must be an int, got '8'"),
        (
            {"layer_budgets": {0: 256}, "split": BudgetSplit(token_budget=64)},
            ValueError,
            "layer_budgets has no effect with a custom split",
        ),
    ],
)
def test_what_no_setting_can_be_is_refused(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        RocketKVConfig(**fields)


def test_settings_by_layer() -> None:
    config = RocketKVConfig(token_budget=512, skip_layers=(0, -1), layer_budgets={1: 1024, -2: 256})
    found = config.by_layer(6)
    assert [None if each is None else each.token_budget for each in found] == [None, 1024, 512, 512, 256, None]
    assert found[2] == RocketKVConfig(token_budget=512)
    assert RocketKVConfig().by_layer(2) == [RocketKVConfig()] * 2
    for fields, message in (
        ({"skip_layers": (6,)}, "skip_layers names layer 6, but the model has layers 0 to 5"),
        ({"layer_budgets": {-7: 512}}, "layer_budgets names layer -7, but the model has layers 0 to 5"),
        ({"skip_layers": (5,), "layer_budgets": {-1: 512}}, "name layer 5 twice"),
        ({"layer_budgets": [(0, 512), (0, 600)]}, "name layer 0 twice"),
    ):
        with pytest.raises(ValueError, match=message):
            RocketKVConfig(**fields).by_layer(6)  # type: ignore[arg-type]


def test_settings_are_made_without_torch() -> None:
    code = "import sys; from rocketkv import RocketKVConfig; RocketKVConfig(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_registered_method_is_a_setting_like_any_other(request: pytest.FixtureRequest) -> None:
    def split(prompt_length: int, token_budget: int, head_dim: int, decode_reserve: int) -> BudgetSplit:
        return BudgetSplit(token_budget=token_budget, kept_tokens=token_budget, pool_offset=1)

    name = "a-registered-method"
    request.addfinalizer(lambda: budget._METHODS.pop(name))
    register_method(
        Method(name, split, least_budget=lambda window, reserve: window + 7, kernel_size=7, multi_turn=True)
    )
    config = RocketKVConfig(method=name, token_budget=39)
    assert config.stage_1_kernel_size == 7
    assert config.keeps_history
    assert config.split_for(1000, 64) == split(1000, 39, 64, 128)
    with pytest.raises(ValueError, match=f"token_budget must be at least 39 for method '{name}'"):
        RocketKVConfig(method=name, token_budget=38)
    with pytest.raises(ValueError, match="such as 'rocketkv\\+'"):
        RocketKVConfig(method=name, on_loss="warn")
