"""The budget split: the official figures, each method's formulas, and the least budget of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rocketkv.budget import (
    METHODS,
    BudgetSplit,
    Method,
    compression_ratio,
    register_method,
    rocketkv_plus_split,
    rocketkv_split,
)

SKETCHED = {"rocketkv+", "rocketkv-mt+"}
ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "budgets.json").read_text())


def test_there_are_130_official_rows() -> None:
    assert len(ROWS) == 130


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(v) for v in row.values() if isinstance(v, int)))
def test_split_equals_the_official_accuracy_path(row: dict[str, Any]) -> None:
    reserve, budget, head_dim = row["max_new_tokens"], row["token_budget"], row["head_dim"]
    split = rocketkv_split(row["sequence_length"] - reserve, budget, head_dim, reserve)
    official = row["accuracy_path"]
    assert split == BudgetSplit(
        token_budget=budget,
        kept_tokens=official["prompt_budget"],
        page_size=official["page_size"],
        channels=official["r"],
        top_k=official["top_k"],
    )
    assert split.kept_tokens == official["capacity"] - reserve


def test_split_at_published_settings() -> None:
    # S = 131072, t = 512: c = 256, alpha = 0.68, capacity = floor(131072 / 256^0.68) = 3019, c2 = 5.896...
    assert rocketkv_split(131072 - 128, 512, 128, 128) == BudgetSplit(
        token_budget=512, kept_tokens=2891, page_size=3, channels=65, top_k=256
    )


@pytest.mark.parametrize(
    ("prompt", "budget", "head_dim", "reserve"),
    [
        (1, 2, 1, 1),
        (7, 3, 5, 2),
        (333, 77, 80, 19),
        (4097, 513, 96, 127),
        (1_000_003, 257, 129, 131),
        (64, 4096, 64, 128),
    ],
)
def test_odd_values_give_a_split_within_the_budget(prompt: int, budget: int, head_dim: int, reserve: int) -> None:
    split = rocketkv_split(prompt, budget, head_dim, reserve)
    assert split.kept_tokens is not None
    assert split.channels is not None
    assert split.top_k == max(1, budget // 2)
    assert 1 <= split.channels <= head_dim
    assert min(reserve, prompt) <= split.kept_tokens <= max(1, prompt)
    # Half the budget is for the scores: as many numbers as the K and V of t/2 tokens. One channel is the least.
    scores_read = (split.kept_tokens + reserve) * split.channels / split.page_size
    assert scores_read <= budget * head_dim or split.channels == 1


def test_short_sequences_are_not_compressed() -> None:
    assert compression_ratio(100, 256) == 1.0
    split = rocketkv_split(100, 256, 64, 28)
    assert (split.kept_tokens, split.page_size, split.channels) == (100, 1, 64)


def test_a_page_may_be_as_large_as_the_remaining_compression_but_not_larger() -> None:
    # The capacity is 2 * reserve in both. c2 = 2 takes pages of 2; for c2 = 1.6 they would be too large.
    assert rocketkv_split(172, 128, 64, 128) == BudgetSplit(
        token_budget=128, kept_tokens=128, page_size=2, channels=64, top_k=64
    )
    assert rocketkv_split(172, 160, 64, 128) == BudgetSplit(
        token_budget=160, kept_tokens=128, page_size=1, channels=40, top_k=80
    )


def test_stage_1_keeps_at_least_the_reserve() -> None:
    # 2 * reserve tokens of capacity, however small the budget; all of them where the sequence is shorter.
    assert rocketkv_split(100_000, 2, 64, 128).kept_tokens == 128
    assert rocketkv_split(90, 2, 64, 128).kept_tokens == 90


@pytest.mark.parametrize("reserve", [1, 40, 128])
@pytest.mark.parametrize(
    ("prompt", "budget", "head_dim"), [(1000, 64, 64), (4999, 333, 80), (50, 128, 16), (129, 5, 3)]
)
def test_every_method_follows_the_table(prompt: int, budget: int, head_dim: int, reserve: int) -> None:
    c = max(1.0, (prompt + reserve) / budget)
    rocket = METHODS["rocketkv"].split(prompt, budget, head_dim, reserve)
    half = max(1, budget // 2)
    expected = {
        "full": (None, 1, None, None, None),
        "rocketkv": (rocket.kept_tokens, rocket.page_size, rocket.channels, half, None),
        "rocketkv-mt": (rocket.kept_tokens, rocket.page_size, rocket.channels, half, None),
        "snapkv": (budget, 1, None, None, None),
        "quest": (None, math.ceil(c), head_dim, half, None),
        "sparq": (None, 1, max(1, math.floor(head_dim / c)), half, None),
        "streaming": (budget, 1, None, budget, 4),
        "exact-topk": (None, 1, head_dim, budget, None),
        "stored-topk": (rocket.kept_tokens, 1, head_dim, half, None),
    }
    assert expected.keys() == METHODS.keys() - SKETCHED
    for method, fields in expected.items():
        split = METHODS[method].split(prompt, budget, head_dim, reserve)
        assert (split.kept_tokens, split.page_size, split.channels, split.top_k, split.sinks) == fields, method
        assert split.token_budget == budget
        assert split.rolling == (method == "streaming")


@pytest.mark.parametrize(("method", "most"), [("rocketkv+", None), ("rocketkv+", 700), ("rocketkv-mt+", None)])
@pytest.mark.parametrize("reserve", [1, 40, 128])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize(("prompt", "budget"), [(30000, 64), (30000, 333), (4000, 512), (900, 512), (130, 128)])
def test_the_sketchs_split_spends_the_budget(
    prompt: int, budget: int, head_dim: int, reserve: int, method: str, most: int | None
) -> None:
    split = METHODS[method].split(prompt, budget, head_dim, reserve)
    if most is not None:
        split = rocketkv_plus_split(prompt, budget, head_dim, reserve, most_stored=most)
    assert split.kept_tokens is not None
    assert split.top_k is not None
    assert (split.token_budget, split.page_size, split.channels, split.residual) == (budget, 1, None, True)
    assert split.by_largest
    assert split.value_aware
    assert split.calibrated
    assert split.pool_offset == 2
    assert split.sketch_bits == (2 if head_dim <= 128 else 1)
    stored = split.kept_tokens + reserve
    assert stored <= prompt + reserve
    spent, whole = plus_bytes(split, stored, head_dim), budget * 4 * head_dim
    # Neither another attended token nor, with as many attended, two other stored ones would fit.
    assert whole - 4 * head_dim < spent <= whole
    limited = most is not None and stored == max(most, 2 * reserve)
    if not limited and stored not in (prompt + reserve, 2 * reserve):
        share = {"rocketkv+": 0.5 if split.sketch_bits == 2 else 0.4, "rocketkv-mt+": 0.65}[method]
        assert split.top_k + 1 == math.floor(share * budget + 1e-9)
        assert plus_bytes(split, stored + 2, head_dim) > whole
    assert most is None or stored <= max(most, 2 * reserve)


def test_what_the_sketch_stores_at_8k() -> None:
    prompt, budget, head_dim, reserve = 8192, 512, 64, 128
    kept = rocketkv_split(prompt, budget, head_dim, reserve).kept_tokens
    assert kept is not None
    for most, share in ((kept + reserve, 0.34), (None, 0.46)):
        split = rocketkv_plus_split(prompt, budget, head_dim, reserve, most_stored=most)
        assert split.kept_tokens is not None
        assert split.sketch_bits == 2
        # Keys and values in 16 bits, codes and scales of each token, both means, and the balance.
        stored = split.kept_tokens * (4 * head_dim + 16 + 2) + 6 * head_dim
        assert share - 0.05 < stored / (prompt * 4 * head_dim) <= share


def test_settings_by_hand() -> None:
    # c = 1128 / 64 = 17.625: pages of 18, and 64 / 17.625 = 3.6 channels.
    assert METHODS["quest"].split(1000, 64, 64, 128).page_size == 18
    assert METHODS["sparq"].split(1000, 64, 64, 128).channels == 3
    # c = 282: less than one channel is one.
    assert METHODS["sparq"].split(1000, 4, 64, 128).channels == 1


def plus_bytes(split: BudgetSplit, stored: int, head_dim: int) -> float:
    """Return the bytes of a step of `rocketkv+`: codes and scales of all, keys and values of k, two means, balance."""
    assert split.sketch_bits is not None
    assert split.top_k is not None
    return stored * (math.ceil(head_dim * split.sketch_bits / 8) + 2) + (split.top_k + 1.5) * 4 * head_dim


def works(method: str, budget: int, window: int, reserve: int) -> bool:
    """Whether stage 1 can always keep more than what it must, and a step reads at least one token within its budget."""
    # Where the head dimension counts, it is the least that the method promises to work with.
    head_dim = 8 if method in SKETCHED else 16
    for prompt in range(1, 6 * (window + reserve)):
        split = METHODS[method].split(prompt, budget, head_dim, reserve)
        if split.sketch_bits is not None and split.kept_tokens is not None:
            stored = min(prompt, split.kept_tokens) + reserve
            if plus_bytes(split, stored, head_dim) > budget * 4 * head_dim:
                return False
        if split.kept_tokens is not None and prompt > split.kept_tokens:
            required = window if split.sinks is None else split.sinks
            if split.kept_tokens <= required:
                return False
        scores_counted = split.channels is not None and method != "exact-topk"
        if split.top_k is not None and split.top_k * (2 if scores_counted else 1) > budget:
            return False
    return True


@pytest.mark.parametrize(("window", "reserve"), [(32, 128), (32, 32), (32, 31), (5, 1), (8, 9), (17, 16), (1, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_the_least_budget_is_the_least_that_works(method: str, window: int, reserve: int) -> None:
    least = METHODS[method].least_budget(window, reserve)
    assert least >= 1
    assert all(works(method, budget, window, reserve) for budget in range(least, least + 5))
    assert least == 1 or not works(method, least - 1, window, reserve)


COUNTS = ["token_budget", "kept_tokens", "page_size", "channels", "sketch_bits", "top_k", "sinks"]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_a_split_must_be_positive(name: str) -> None:
    fields = {"token_budget": 8, "top_k": 4, "channels": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1.*got 0"):
        BudgetSplit(**fields)


@pytest.mark.parametrize("value", [1.5, True, "8"])
@pytest.mark.parametrize("name", [*COUNTS, "protected", "pool_offset"])
def test_counts_of_a_split_must_be_integers(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"token_budget": 8, "top_k": 4, "channels": 3, name: value}
    with pytest.raises(TypeError, match=rf"{name} must be an int.*{type(value).__name__}"):
        BudgetSplit(**fields)


@pytest.mark.parametrize("value", [1, "yes", None])
@pytest.mark.parametrize("name", ["oracle", "residual", "calibrated", "by_largest", "value_aware"])
def test_switches_of_a_split_must_be_bools(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"token_budget": 8, "kept_tokens": 8, "top_k": 4, "sketch_bits": 2, name: value}
    with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
        BudgetSplit(**fields)


def test_settings_of_a_split_must_go_together() -> None:
    with pytest.raises(ValueError, match="set top_k and leave sinks None"):
        BudgetSplit(token_budget=8, channels=3)
    with pytest.raises(ValueError, match="set top_k and leave sinks None"):
        BudgetSplit(token_budget=8, channels=3, top_k=4, sinks=2)
    with pytest.raises(ValueError, match="top_k needs a ranking"):
        BudgetSplit(token_budget=8, top_k=4)
    with pytest.raises(ValueError, match="set top_k and leave sinks None"):
        BudgetSplit(token_budget=8, sketch_bits=2)
    with pytest.raises(ValueError, match="set one of them"):
        BudgetSplit(token_budget=8, sketch_bits=2, channels=3, top_k=4)
    with pytest.raises(ValueError, match=r"sketch_bits must be 1, 2, 3 or 4.*got 5"):
        BudgetSplit(token_budget=8, sketch_bits=5, top_k=4)
    with pytest.raises(ValueError, match=r"of single tokens.*got 2 with page_size=3"):
        BudgetSplit(token_budget=8, sketch_bits=2, page_size=3, top_k=4)
    with pytest.raises(ValueError, match="residual needs the scores"):
        BudgetSplit(token_budget=8, kept_tokens=8, residual=True)
    for fields in ({"sketch_bits": 2, "top_k": 4}, {"channels": 2, "top_k": 4, "residual": True}):
        with pytest.raises(ValueError, match="calibrated is of a residual by sketched keys"):
            BudgetSplit(token_budget=8, calibrated=True, **fields)
    with pytest.raises(ValueError, match="by_largest is of a ranking by scores"):
        BudgetSplit(token_budget=8, kept_tokens=8, by_largest=True)
    for fields in ({}, {"kept_tokens": 8, "top_k": 4, "sinks": 1}):
        with pytest.raises(ValueError, match="value_aware is of stage 1, where it ranks by attention"):
            BudgetSplit(token_budget=8, value_aware=True, **fields)
        with pytest.raises(ValueError, match="pool_offset is of stage 1, where it ranks by attention"):
            BudgetSplit(token_budget=8, pool_offset=3, **fields)
    with pytest.raises(ValueError, match="pool_offset must be a number of tokens, 0 or more; got -1"):
        BudgetSplit(token_budget=8, kept_tokens=8, pool_offset=-1)
    with pytest.raises(ValueError, match=r"top_k must be at most token_budget=8.*got 9"):
        BudgetSplit(token_budget=8, channels=3, top_k=9)


def test_the_table_of_methods_is_read_only_and_takes_new_ones() -> None:
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["full"]  # type: ignore[index]
    with pytest.raises(ValueError, match="there is a method 'quest' already"):
        register_method(Method("quest", METHODS["quest"].split))
    with pytest.raises(TypeError, match="method must be a Method, got function"):
        register_method(METHODS["quest"].split)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel_size must be odd and at least 1, got 4 in method 'mine'"):
        Method("mine", METHODS["quest"].split, kernel_size=4)
    assert all(name == method.name for name, method in METHODS.items())


def test_what_a_split_does_is_read_from_it() -> None:
    long = {name: method.split(1 << 20, 512, 128, 128) for name, method in METHODS.items()}
    assert {name for name, split in long.items() if not split.ranked} == {"full", "streaming"}
    assert {name for name, split in long.items() if split.sketch_bits is not None} == SKETCHED
    assert {name for name, split in long.items() if split.residual} == SKETCHED
    assert {name for name, method in METHODS.items() if method.multi_turn} == {"rocketkv-mt", "rocketkv-mt+"}
