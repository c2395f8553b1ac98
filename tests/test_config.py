"""Settings: what is refused, with what words, and the split that follows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rocketkv.budget import METHODS, BudgetSplit
from rocketkv.config import RocketKVConfig

NUMBERS = ["token_budget", "decode_reserve", "window_size", "kernel_size"]


def test_defaults_are_the_papers() -> None:
    config = RocketKVConfig()
    assert (config.method, config.window_size, config.pool_size, config.decode_reserve) == ("rocketkv", 32, 63, 128)
    assert config.split is None


def test_pools_are_the_methods_own_unless_given() -> None:
    sketched = {"rocketkv+", "rocketkv-mt+"}
    assert {name: RocketKVConfig(method=name).pool_size for name in METHODS} == {
        name: 13 if name in sketched else 63 for name in METHODS
    }
    assert RocketKVConfig(method="rocketkv+", kernel_size=63).pool_size == 63
    assert dataclasses.replace(RocketKVConfig(), method="rocketkv+").pool_size == 13


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
