"""The baselines of `latency`: dense and compiled arms agree with what they stand for, and say what they ran on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval_case import made_cells, make_session, save
from rocketkv.eval.checks import WrongResultError
from rocketkv.eval.measures import dense
from rocketkv.eval.measures.arms import CompiledMethod, CompiledStock, find_arm
from rocketkv.eval.measures.dense import ATTENTIONS, Dense, PreallocatedLayer, fastest
from rocketkv.eval.measures.largest import MOST, largest_batch
from rocketkv.eval.measures.latency import LatencyResult, check_method, measure_latency
from rocketkv.eval.measures.memory import OutOfMemory
from rocketkv.eval.methods import Full
from rocketkv.eval.records import read_record, record_path
from rocketkv.eval.sweep import cells as cells_module
from rocketkv.eval.sweep.plan import Loaded, Plan, cells
from rocketkv.eval.sweep.run import run_cells
from tiny import SETTINGS, build, prompt

# Without a compiler of C++: what is tested is what runs, not how fast.
EAGER = {"backend": "eager"}
compiles = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="older PyTorch does not trace these models"
)


def arm(name: str, new_tokens: int = 6) -> Any:
    budget, settings = (48, SETTINGS) if name.endswith("rocketkv") else (None, {})
    made = find_arm(name, budget, settings, new_tokens=new_tokens)
    if isinstance(made, (CompiledMethod, CompiledStock)):
        made.options = EAGER
    return made


def measured(model: Any, method: Any, **fields: Any) -> LatencyResult:
    return measure_latency(model, method, **{"prompt_tokens": 90, "new_tokens": 6, "warmup": 1, "repeats": 2, **fields})


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "ran"),
    [
        ("full", {"cache": "DynamicCache", "attention": "sdpa", "backend": None, "compiled": False}),
        ("dense", {"cache": "preallocated", "backend": None, "compiled": False}),
        ("rocketkv", {"cache": "RocketKVCache", "attention": "rocketkv", "backend": ["torch"], "compiled": False}),
        pytest.param("compiled:full", {"cache": "StaticCache", "compiled": True}, marks=compiles),
        pytest.param("compiled:rocketkv", {"attention": "rocketkv", "compiled": True}, marks=compiles),
    ],
)
def test_an_arm_says_what_it_ran_on(name: str, ran: dict[str, Any]) -> None:
    details = measured(build(), arm(name), batch_size=2).details()
    assert ran.items() <= details["ran"].items()
    assert [position for position, _ in details["step_seconds_by_position"]] == [90, 91, 92, 93, 94]
    if name == "dense":
        assert details["ran"]["attention"] in ATTENTIONS
        assert details["ran"]["attention_milliseconds"].keys() == ATTENTIONS.keys()


def test_steps_are_those_of_their_positions() -> None:
    made = measured(build(), Full(), new_tokens=4)
    made = LatencyResult(**vars(made) | {"step_seconds": [1.0, 2.0, 3.0, 5.0, 6.0, 7.0]})  # of two repeats
    assert made.details()["step_seconds_by_position"] == [[90, 3.0], [91, 4.0], [92, 5.0]]
    long = LatencyResult(**vars(made) | {"new_tokens": 1001, "step_seconds": [0.5] * 2000})
    assert len(long.details()["step_seconds_by_position"]) == 32


@pytest.mark.integration
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mistral"])
def test_the_dense_arm_is_the_stock_model_and_leaves_it_as_it_was(family: str) -> None:
    model = build(family, attn_implementation="sdpa")
    method = arm("dense")
    before = {*ALL_ATTENTION_FUNCTIONS}
    check_method(model, method, prompt(90))
    assert method.attention in ATTENTIONS
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert {*ALL_ATTENTION_FUNCTIONS} == before


@pytest.mark.parametrize("name", ["dense", pytest.param("compiled:rocketkv", marks=compiles)])
def test_an_arm_that_differs_from_its_baseline_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = arm(name)
    if name == "dense":
        step = method._step
        monkeypatch.setattr(method, "_step", lambda *given: 1.5 * step(*given))
    else:
        method.baseline = find_arm("streaming", 48, {**SETTINGS, "decode_capacity": 6}, new_tokens=6)
        monkeypatch.setattr(method, "new_cache", arm("rocketkv").new_cache)
    with pytest.raises(WrongResultError, match=rf"logits of {method.name} is wrong by .*; nothing is timed"):
        measured(build(), method)


def test_an_attention_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"wrong": lambda *given: 1.1 * ATTENTIONS["SDPA enable_gqa"](*given), **ATTENTIONS}
    monkeypatch.setattr(dense, "ATTENTIONS", wrong)
    query, keys, values = torch.randn(2, 4, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
    name, tried = fastest(query, keys, values, 0.25)
    assert name.startswith("SDPA")
    assert "attention by wrong is wrong by" in tried["wrong"]


def test_preallocated_buffers_stay_and_hold_what_a_growing_cache_does() -> None:
    stock, method = DynamicCache(), Dense(new_tokens=3)
    ours = method.new_cache(build(), 5)
    places = set()
    for count in (5, 1, 1):
        key, value = torch.randn(2, 2, count, 16), torch.randn(2, 2, count, 16)
        for one, other in zip(stock.update(key, value, 0), ours.update(key, value, 0), strict=True):
            assert one.equal(other)
        layer = ours.layers[0]
        assert isinstance(layer, PreallocatedLayer)
        places.add(layer.keys.data_ptr())
    assert len(places) == 1
    assert ours.get_seq_length() == 7


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 37, 1000, 3 * MOST])
def test_the_largest_batch_is_close_to_the_limit(limit: int) -> None:
    tried = []

    def run(rows: int) -> None:
        tried.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError("no memory") if rows % 2 else OutOfMemory("no memory")

    found = largest_batch(run)
    assert 15 / 16 * min(limit, MOST) <= found <= limit
    assert len(tried) < 20
    with pytest.raises(RuntimeError, match="a bug"):
        largest_batch(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="found by running out of a GPU's memory; the model is on cpu"):
        measured(build(), arm("full"), batch_size="max")
    with pytest.raises(ValueError, match="compiled:dense has no static shapes; ask for compiled:full"):
        arm("compiled:dense")
    with pytest.raises(ValueError, match="'kvpress:KnormPress' takes no settings"):
        find_arm("compiled:kvpress:KnormPress", 8, {}, new_tokens=6)
    with pytest.raises(ValueError, match="'dense' takes neither a budget nor settings"):
        find_arm("dense", 8, {}, new_tokens=6)


def test_eager_attention_has_no_dense_arm() -> None:
    with pytest.raises(ValueError, match="dense takes its prompts from sdpa or flash attention, got 'eager'"):
        measured(build(attn_implementation="eager"), arm("dense"))


METHODS = ("full", "dense", "compiled:full", "rocketkv", "compiled:rocketkv")


def test_latency_has_arms_and_batches_that_other_tasks_have_not() -> None:
    asked = Plan(
        tasks=("kl", "latency"), methods=METHODS, budgets=(64,), lengths=(512,), batch_sizes=(1, "max"), samples=7,
        settings={"window_size": 16}, latency_tokens=9, max_new_tokens=5,
    )  # fmt: skip
    found = cells(asked, Loaded(chat=False))
    assert [(cell["method"], cell["batch_size"]) for cell in found if cell["task"] == "kl"] == [
        ("full", 1),
        ("rocketkv", 1),
    ]
    latency = [cell for cell in found if cell["task"] == "latency"]
    assert {(cell["method"], cell["token_budget"], cell["batch_size"]) for cell in latency} == {
        (name, 64 if name.endswith("rocketkv") else None, size) for name in METHODS for size in (1, "max")
    }
    assert {(cell["max_new_tokens"], cell["samples"]) for cell in latency} == {(9, 1)}
    assert {str(cell["settings"]) for cell in latency if cell["token_budget"]} == {"{'window_size': 16}"}
    with pytest.raises(ValueError, match="methods dense run in the task latency alone; add it, or leave them out"):
        Plan(methods=("full", "dense"))
    with pytest.raises(ValueError, match=r"batch_sizes must be numbers of at least 1, or max; got \(0,\)"):
        Plan(batch_sizes=(0,))


def test_a_record_says_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(save(tmp_path / "model"), tmp_path / "results")

    def here(**fields: Any) -> LatencyResult:
        method = find_arm(fields["method"], None, {}, new_tokens=fields["new_tokens"])
        names = ("prompt_tokens", "new_tokens", "batch_size", "seed")
        return measure_latency(session.model, method, warmup=1, repeats=1, **{name: fields[name] for name in names})

    monkeypatch.setattr(cells_module, "measure_apart", here)
    (cell,) = made_cells(
        tasks=("latency",), methods=("dense",), budgets=(), batch_sizes=(2,), latency_tokens=4, max_new_tokens=None
    )
    assert run_cells(session, [cell]).done == 1
    record = read_record(record_path(session.results, cell))
    assert record["details"]["ran"]["cache"] == "preallocated"
    cost: Any = record["cost"]
    assert (cost["prompt_tokens"], cost["new_tokens"], cost["batch_size"]) == (56, 4, 2)
    assert cost["tokens_per_second"] == pytest.approx(2 / record["score"])
