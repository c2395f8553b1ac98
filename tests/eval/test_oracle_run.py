"""Oracles over a model: what layers are given, a method's parts against the method itself, resumption, the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eval_case
from rocketkv import METHODS, RocketKVConfig, patch
from rocketkv.cli.main import main
from rocketkv.eval.journal import Journal
from rocketkv.eval.measures.kl import Window
from rocketkv.eval.oracle import run as oracle_run
from rocketkv.eval.oracle.bounds import PARTS
from rocketkv.eval.oracle.document import document, markdown
from rocketkv.eval.oracle.heatmaps import heat_maps
from rocketkv.eval.oracle.run import LayerTensors, Settings, each_layer, layer_figures, layer_numbers, measure, stages
from rocketkv.eval.progress import Progress
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import build, prompt

pytestmark = pytest.mark.integration

CONTEXT, STEPS = 300, 6
BUDGET = 64
SETTINGS = Settings(
    model="tiny",
    dtype="float32",
    method="rocketkv",
    token_budget=BUDGET,
    context=CONTEXT,
    steps=STEPS,
    error=0.2,
    bandwidth=100.0,
)


def text(seed: int = 0) -> list[int]:
    found: list[int] = prompt(CONTEXT + STEPS, seed=seed)[0].tolist()
    return found


def taken(model: Any, ids: list[int]) -> list[LayerTensors]:
    found: list[LayerTensors] = []
    each_layer(model, ids, found.append)
    return found


@pytest.mark.parametrize(
    ("family", "numbers"), [("llama", [0, 1]), ("qwen3", [0, 1]), ("gemma2", [1, 3]), ("gpt-oss", [1, 3])]
)
def test_layers_are_given_what_the_models_own_attention_comes_of(family: str, numbers: list[int]) -> None:
    model = build(family)
    with torch.no_grad():
        before = model(torch.tensor([text()]), use_cache=False).logits
    config = RocketKVConfig(method="rocketkv", token_budget=BUDGET)
    assert layer_numbers(model) == numbers
    found = taken(model, text())
    assert [layer.number for layer in found] == numbers
    for layer in found:
        assert layer.query.shape == (1, 4, CONTEXT + STEPS, 16)
        figures = layer_figures(layer, config, CONTEXT, 0.2)
        assert figures["capture_gap"] < 1e-5
        assert max(head["gap"] for head in figures["heads"]) < 1e-5
        assert len(figures["heads"]) == 2
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([text()]), use_cache=False).logits, before)


def first_layer_outputs(model: Any, config: RocketKVConfig, ids: list[int]) -> Tensor:
    """Return the attention of a patched model's first layer in decode steps, [m, H * Dv]: its input is the tokens'."""
    rows: list[Tensor] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: rows.append(args[0][0, -1:])
    )
    cache = RocketKVCache(model.config, config, prompt_length=CONTEXT)
    with patch(model, config), torch.inference_mode():
        model(torch.tensor([ids[:CONTEXT]]), **{CACHE_ARGUMENT: cache})
        for token in ids[CONTEXT:]:
            model(torch.tensor([[token]]), **{CACHE_ARGUMENT: cache})
    hook.remove()
    return torch.cat(rows[1:])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_last_stage_is_the_method_itself_and_the_parts_lead_there(method: str) -> None:
    model = build()
    config = RocketKVConfig(method=method, token_budget=BUDGET)
    layer = taken(model, text())[0]
    run = stages(layer, config, CONTEXT)
    own = first_layer_outputs(model, config, text())
    torch.testing.assert_close(run.outputs[-1].flatten(1), own, atol=1e-5, rtol=0)
    figures = layer_figures(layer, config, CONTEXT, 0.2)
    for head in figures["heads"]:
        assert sum(head["products"]) == pytest.approx(head["square"], rel=1e-5, abs=1e-12)
    if method == "full":
        assert figures["method_bytes"] == figures["dense_bytes"]
        assert all(head["square"] < 1e-10 for head in figures["heads"])
    else:
        assert figures["method_bytes"] < 0.5 * figures["dense_bytes"]
        assert all(head["method_error"] > 0.01 for head in figures["heads"])


def products(method: str, **fields: Any) -> Tensor:
    """Return each part's share, [Hkv, parts], of the first layer."""
    config = RocketKVConfig(method=method, token_budget=BUDGET, **fields)
    heads = layer_figures(taken(build(), text())[0], config, CONTEXT, 0.2)["heads"]
    return torch.tensor([head["products"] for head in heads]) / torch.tensor([[head["square"]] for head in heads])


def test_parts_are_nothing_where_a_method_has_no_such_part() -> None:
    eviction, k, index, residual = range(4)
    assert PARTS == ("eviction", "k", "index", "residual")
    plain = products("rocketkv")
    assert (plain[:, [eviction, k, index]].abs() > 0.01).all()
    assert not plain[:, residual].any()
    # All that stage 1 keeps is attended to; everything is kept; the index is exact.
    assert (products("snapkv")[:, eviction] == 1).all()
    for method in ("quest", "sparq", "exact-topk"):
        assert (products(method)[:, eviction].abs() < 1e-4).all()
    for method in ("exact-topk", "stored-topk"):
        assert (products(method)[:, index].abs() < 1e-4).all()
    assert (products("rocketkv+").abs() > 0.01).all()


def test_where_the_budget_holds_all_that_is_stored_all_error_is_evictions() -> None:
    config = RocketKVConfig(method="rocketkv", token_budget=CONTEXT)
    for head in layer_figures(taken(build(), text())[0], config, CONTEXT, 0.2)["heads"]:
        assert head["evicted_error"] == head["selected_error"] == pytest.approx(head["method_error"], abs=1e-6)
        assert head["method_error"] > 0.01


def test_dense_bytes_and_needed_tokens_are_of_the_steps_own_lengths() -> None:
    figures = layer_figures(taken(build(), text())[0], RocketKVConfig(token_budget=BUDGET), CONTEXT, 1e-6)
    lengths = [CONTEXT + step + 1 for step in range(STEPS)]
    assert figures["token_bytes"] == 2 * (16 + 16)
    assert figures["dense_bytes"] == sum(lengths) / STEPS * 2 * figures["token_bytes"]
    for head in figures["heads"]:
        assert all(size <= length for size, length in zip(head["needed"], lengths, strict=True))
        assert max(head["needed"]) <= head["stored"] <= lengths[-1]
        assert head["stored_prompt"] <= min(head["stored"], CONTEXT)


def windows() -> list[Window]:
    return [Window(str(seed), text(seed), {"seed": seed}) for seed in (0, 1)]


def measured(folder: Path, settings: Settings = SETTINGS) -> dict[str, Any]:
    with Progress("", total=1) as progress:
        found = measure(build(), windows(), settings, Journal(folder / "journal"), progress)
    return document(settings, windows(), found)


class Stopping:
    """Stands in for `layer_figures`: counts, and stops after some."""

    def __init__(self, most: int) -> None:
        self.left = most
        self.seen: list[int] = []

    def __call__(self, layer: LayerTensors, *args: Any) -> Any:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen.append(layer.number)
        return layer_figures(layer, *args)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(tmp_path / "whole")
    stopping = Stopping(3)
    monkeypatch.setattr(oracle_run, "layer_figures", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "stopped")
    stopping.left = 9
    assert measured(tmp_path / "stopped") == whole
    assert stopping.seen == [0, 1, 0, 1]
    # Done: not even the model is run. What the bound is reckoned with is not measured.
    monkeypatch.setattr(oracle_run, "each_layer", None)
    fast = Settings(**{**vars(SETTINGS), "bandwidth": 200.0})
    bytes_ = measured(tmp_path / "stopped", fast)["bytes"]
    assert bytes_["dense"]["microseconds"] == pytest.approx(whole["bytes"]["dense"]["microseconds"] / 2)
    # Another error is another measurement.
    with pytest.raises(TypeError):
        measured(tmp_path / "stopped", Settings(**{**vars(SETTINGS), "error": 0.3}))


def test_the_document_adds_up(tmp_path: Path) -> None:
    result = measured(tmp_path)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    heads = [head for layer in result["layers"] for head in layer["heads"]]
    for figures in (result["total"], *result["layers"], *heads, *result["texts"]):
        for found in (figures["shares"], figures["pooled_shares"]):
            assert list(found) == list(PARTS)
            assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    for name in ("stored", "needed_mean", "method_error"):
        means = [sum(part[name] for part in parts) / len(parts) for parts in (heads, result["layers"], result["texts"])]
        assert means == pytest.approx([result["total"][name]] * 3)
    rows = result["bytes"]
    assert rows["dense"]["of_dense"] == 1
    assert rows["dense"]["tokens_stored"] == rows["compute oracle"]["tokens_stored"] == CONTEXT + STEPS
    assert rows["storage oracle"]["tokens_stored"] == pytest.approx(result["total"]["stored"])
    assert rows["method"]["tokens_stored"] == result["layers"][0]["method_stored"] < 0.8 * CONTEXT
    assert rows["dense"]["microseconds"] == pytest.approx(rows["dense"]["step_bytes"] / 100e9 * 1e6)
    assert 0 < rows["compute oracle"]["of_dense"] < rows["storage oracle"]["of_dense"] <= 306 / 303.5
    assert rows["compute oracle"]["of_dense"] == pytest.approx(result["total"]["needed_mean"] / 303.5)
    assert max(result["gaps"].values()) < 1e-5


def test_tables_and_heat_maps_show_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(tmp_path)
    result["settings"]["model"] = "<script>|"
    lines = markdown(result).splitlines()
    assert lines[0].startswith(r"\<script\>\|, 2 texts of 300 tokens and 6 steps; rocketkv 64")
    by_layer, by_method = ([line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {name} |")]
                           for name in ("all", "compute oracle"))  # fmt: skip
    total, read = result["total"], result["bytes"]["compute oracle"]
    assert by_layer[0][:3] == ["all", f"{total['stored']:.0f}", f"{total['needed_mean']:.0f}"]
    assert by_layer[0][8:10] == [f"{total['method_error']:.3f}", f"{100 * total['shares']['eviction']:.0f}"]
    assert by_method[0][3:] == [f"{read['of_dense']:.3f}", f"{read['microseconds']:.1f}"]
    # No method here has a residual: its map would be empty.
    names = ["stored", "needed-mean", "evicted-error", "selected-error", "method-error"]
    names += [f"share-{part}" for part in PARTS[:-1]]
    pictures = heat_maps(result)
    assert sorted(pictures) == sorted(f"{name}.png" for name in names)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"rocketkv\[eval\]"):
        heat_maps(result)


def test_a_method_without_error_has_no_shares(tmp_path: Path) -> None:
    result = measured(tmp_path, Settings(**{**vars(SETTINGS), "method": "full"}))
    assert result["total"]["shares"] is None
    assert markdown(result).count(" - ") >= 3
    assert "share-k.png" not in heat_maps(result)


def test_texts_must_fit(tmp_path: Path) -> None:
    long = Settings(**{**vars(SETTINGS), "context": 5000})
    for settings, message in (
        (long, "at most 4096 tokens"),
        (Settings(**{**vars(SETTINGS), "steps": 7}), "307 tokens"),
    ):
        with pytest.raises(ValueError, match=message), Progress("", total=1) as progress:
            measure(build(), windows(), settings, Journal(tmp_path / "journal"), progress)


def run(folder: Path, output: Path, *more: str) -> int:
    given = ["--model", folder, "--context", "200", "--steps", "4", "--budget", "64", "--method", "snapkv", *more]
    return main(["oracle", *map(str, given), "-o", str(output)])


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], dict[str, bytes]]:
    return lambda name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}


def test_the_command_writes_the_same_files_every_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: Callable[[str], dict[str, bytes]]
) -> None:
    folder = eval_case.save(tmp_path / "model")
    capsys.readouterr()
    for name in ("one", "two", "one"):
        assert run(folder, tmp_path / name) == 0
        assert "2 texts of 200 tokens and 4 steps; snapkv 64" in capsys.readouterr().out
    first = files("one")
    assert first == files("two")
    assert {"oracle.json", "oracle.md", "stored.png", "journal.jsonl"} <= set(first)
    assert len(first["journal.jsonl"].splitlines()) == 4
    (tmp_path / "words.txt").write_text(eval_case.words(3, 400), encoding="utf-8")
    assert run(folder, tmp_path / "own", "--texts", str(tmp_path / "words.txt"), "--samples", "1") == 0
    [own] = json.loads(files("own")["oracle.json"])["texts"]
    assert own["notes"]["text"] == "words.txt"


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = eval_case.save(tmp_path / "model")
    (tmp_path / "short.txt").write_text("the grass is green", encoding="utf-8")
    for more, message in (
        (["--texts", str(tmp_path / "none.txt")], "No such file"),
        (["--texts", str(tmp_path / "short.txt")], "must have at least 204 tokens"),
        (["--error", "2"], "error must be between 0 and 1"),
        (["--budget", "8"], "token_budget must be at least 33"),
    ):
        assert run(folder, tmp_path / "out", *more) == 2
        [line] = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("rocketkv oracle: error: ")
        assert message in line
