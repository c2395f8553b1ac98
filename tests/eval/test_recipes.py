"""Recipes: the sweeps that they ask for, what overrides them, and a run of `quick` that ends in its report."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rocketkv.cli.main import main
from rocketkv.eval.cli import add_arguments, given_plans
from rocketkv.eval.recipes import RECIPES
from rocketkv.eval.records import Record, digest, records
from rocketkv.eval.sweep.plan import Loaded, Plan, cells
from rocketkv.eval.tasks.base import Sample, Turn, catalogue
from rocketkv.hf.prompts import PLAIN, encode, render
from thinkers import save, tokenizer

ROOT = Path(__file__).resolve().parents[2]
LOADED = Loaded(chat=True, sampling={"do_sample": True})


def plans(*arguments: str) -> tuple[Plan, ...]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return given_plans(parser.parse_args(["run", *arguments]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_asks_for_cells_of_known_tasks_and_methods(name: str) -> None:
    for plan in plans("--recipe", name):
        found = cells(plan, LOADED)
        assert {cell["method"] for cell in found} == set(plan.methods)
        assert plan.methods[0] == "full"


def test_quick_compares_four_methods_at_two_budgets_in_both_modes() -> None:
    found = [cell for plan in plans("--recipe", "quick") for cell in cells(plan, Loaded(chat=True))]
    arms = {(cell["method"], cell["token_budget"]) for cell in found}
    assert arms == {("full", None), *((m, b) for m in ("rocketkv+", "rocketkv", "snapkv") for b in (64, 256))}
    assert {(cell["task"], cell["mode"]) for cell in found} == {
        *(("needle_grid", mode) for mode in ("aware", "agnostic")), ("niah_single_1", "aware"), ("kl", "aware"),
    }  # fmt: skip
    assert {cell["model"] for cell in found} == {"smollm2"}


def test_papers_reserve_is_what_a_task_generates() -> None:
    official = json.loads((ROOT / "eval" / "tasks" / "templates.json").read_text(encoding="utf-8"))["longbench"]
    reserves = {
        task: plan.settings["decode_reserve"]
        for plan in plans("--recipe", "paper")
        for task in plan.tasks
        if "decode_reserve" in plan.settings
    }
    groups = {name: task.group for name, task in catalogue().items()}
    assert {task: n for task, n in reserves.items() if groups[task] == "longbench"} == {
        task: entry["max_new_tokens"] for task, entry in official.items()
    }
    from rocketkv.eval.tasks.ruler import niah, qa, synthetic

    ruler = {
        "vt": synthetic.VT_NEW_TOKENS, "cwe": synthetic.CWE_NEW_TOKENS, "fwe": synthetic.FWE_NEW_TOKENS,
        "qa_1": qa.NEW_TOKENS, "qa_2": qa.NEW_TOKENS,
    }  # fmt: skip
    expected = {task: ruler.get(task, niah.NEW_TOKENS) for task in catalogue() if groups[task] == "ruler"}
    assert {task: n for task, n in reserves.items() if groups[task] == "ruler"} == expected


def test_flags_and_the_file_override_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("budgets: [32]\nsamples: 9\n", encoding="utf-8")
    first, kl, agnostic = plans("--recipe", "quick", "--sweep", str(file), "--samples", "3", "--set", "window_size=8")
    assert {(plan.budgets, plan.samples, plan.lengths) for plan in (first, kl, agnostic)} == {((32,), 3, (2048,))}
    assert kl.settings == {"window_size": 8}
    assert (first.agnostic, agnostic.agnostic) == (False, True)


def test_tasks_choose_among_a_recipes_and_settings_are_merged() -> None:
    chosen = plans("--recipe", "paper", "--tasks", "ruler,lcc", "--set", "window_size=8")
    tasks = [task for plan in chosen for task in plan.tasks]
    assert len(tasks) == len(set(tasks)) == 14
    assert next(p.settings for p in chosen if "lcc" in p.tasks) == {"decode_reserve": 64, "window_size": 8}
    assert next(p.lengths for p in chosen if "vt" in p.tasks) == (16000, 32000, 64000, 96000)
    (more,) = plans("--recipe", "quick", "--tasks", "niah_single_1,latency")
    assert more.tasks == ("niah_single_1", "latency")
    with pytest.raises(ValueError, match="there is no task or group 'niah_singel_1'"):
        cells(plans("--recipe", "quick", "--tasks", "niah_singel_1")[0], Loaded(chat=True))


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["eval", "run", "--help"])
    text = capsys.readouterr().out
    documented = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for recipe in RECIPES.values():
        assert f"  {recipe.name:12} {recipe.purpose}" in text
        assert f"| `{recipe.name}` |" in documented


def test_commands_of_the_documentation_are_valid() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [re.sub(r".*rocketkv(\.cli\.main)? eval |'$", "", line) for line in lines if " eval run" in line]
    assert len(commands) > 12
    for command in commands:
        arguments = shlex.split(re.sub(r"--shard \$\(\(.*?\)\)/", "--shard 1/", command))
        for plan in plans(*arguments[1:]):
            assert cells(plan, LOADED)


def prepared(results: Path, record: Record) -> list[Sample]:
    """Return the samples that a run has written for a cell."""
    for path in (results / "data").glob("*.jsonl"):
        head, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        if head == record["data"]["sha256"]:
            made = [json.loads(line) for line in lines]
            return [Sample(**fields | {"turns": tuple(Turn(**turn) for turn in fields["turns"])}) for fields in made]
    raise AssertionError("no samples")


@pytest.mark.parametrize(
    ("family", "start"),
    [("qwen3", "<|im_start|>assistant\n"), ("gpt-oss", "<|start|>assistant<|channel|>final<|message|>")],
)
def test_quick_runs_a_thinking_model_in_its_template(family: str, start: str, tmp_path: Path) -> None:
    folder, results, log = save(tmp_path / "model", family), tmp_path / "results", tmp_path / "log"
    arguments = ["--lengths", "900", "--budgets", "40", "--samples", "1", "--max-new-tokens", "3", "--device", "cpu"]
    with log.open("w") as stderr, contextlib.redirect_stderr(stderr):
        assert main(["eval", "run", "--recipe", "quick", "--model", str(folder), *arguments, "-o", str(results)]) == 0
    found = list(records(results))
    assert len(found) == 4 * 4
    assert {record["status"] for record in found} == {"complete"}
    words, asked = tokenizer(family), 0
    for record in found:
        if record["cell"]["task"] == "kl":
            assert record["cell"]["chat"] is False
            continue
        assert record["cell"]["chat"] is True
        (sample,), (turn,) = prepared(results, record), prepared(results, record)[0].turns
        prompt = render(words, sample.context, turn.question, turn.answer_prefix, chat=True, options=PLAIN)
        assert prompt.tail.endswith(f"{start}{turn.answer_prefix}")
        ids, _ = encode(words, prompt, apart=record["cell"]["mode"] == "agnostic")
        assert record["samples"][0]["prompt_sha256"] == digest([ids])
        asked += 1
    assert asked == 3 * 4
    lines = log.read_text().splitlines()
    named = [line for line in lines if re.match(r"(needle_grid|niah_single_1|kl) 900 ", line)]
    assert len(named) == len(found)  # a line a cell, though stderr is a file
    assert lines[-2:] == [f"report: {results / 'report.html'}", f"16 cells done, 0 were before; records in {results}"]
    page: Any = (results / "report.html").read_text(encoding="utf-8")
    assert "query-agnostic" in page
    assert "Score by mode, 900 tokens: needle_grid" in page
