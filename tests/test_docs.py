"""The Python blocks of docs/ run on a tiny model, a page in one namespace; those that cannot say why, and compile."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import rocketkv
from chatml import CHATML, tokenizer_of
from rocketkv.cli.main import COMMANDS
from tiny import build, prompt

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: ([^>]*?) -->\n")
REASONS = {"needs a GPU", "needs the hub", "needs torchao", "needs torchrun", "the file of a task"}
COMMAND = re.compile(r"(?:^|[\s'\"])rocketkv ([a-z][\w-]*)", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str | None, int]]:
    """Return each Python block's code, the reason that it is not run (or None), and its first line's number."""
    found = []
    for match in FENCE.finditer(text):
        if match[2] == "python":
            before = list(NOT_RUN.finditer(text, 0, match.start()))
            marked = before and before[-1].end() == match.start()
            line = text.count("\n", 0, match.start(3))
            found.append((textwrap.dedent(match[3]), before[-1][1] if marked else None, line))
    return found


def namespace() -> dict[str, Any]:
    """Return what pages may take for granted: a model, its inputs, questions on them, and the imports of page one."""
    model = build("llama", num_hidden_layers=2)
    ids = prompt(1600)
    return {
        "__name__": "page",
        "model": model,
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "ids": ids,
        "questions": [prompt(9, seed=seed) for seed in (2, 3)],
        "tokenizer": tokenizer_of(CHATML),
        "rocketkv": rocketkv,
        "torch": torch,
        "cache": cache_of(model, ids),
        "n": 3,
    }


def cache_of(model: Any, ids: Tensor) -> Any:
    """Return a compressed cache of a prompt."""
    with rocketkv.patch(model, token_budget=64) as handle:
        model.generate(ids, max_new_tokens=2)
        return handle.cache


def run(code: str, names: dict[str, Any], place: str, line: int) -> None:
    """Run a block; a traceback names the page and its line."""
    exec(compile("\n" * line + code, place, "exec"), names)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text("utf-8")], ids=lambda p: p.stem
)
@pytest.mark.filterwarnings("ignore:RocketKV. no budget up to:UserWarning")  # random weights attend to all tokens
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = namespace()
    for code, reason, line in blocks(page.read_text(encoding="utf-8")):
        if reason is None:
            run(code, names, page.name, line)
        else:
            compile(code, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_marks_precede_blocks_and_have_a_known_reason(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reasons = [reason for _, reason, _ in blocks(text) if reason is not None]
    assert len(reasons) == len(NOT_RUN.findall(text)) == text.count("<!-- not run")
    assert set(reasons) <= REASONS


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_exist(page: Path) -> None:
    code = "\n".join(match[3] for match in FENCE.finditer(page.read_text(encoding="utf-8")) if match[2] != "python")
    assert set(COMMAND.findall(code)) <= set(COMMANDS)


def test_a_wrong_block_fails() -> None:
    text = "text\n\n```python\nfirst = 1\n```\n\n<!-- not run: needs a GPU -->\n```python\nsecond(\n```\n"
    text += "\n```python\nfirst / 0\n```\n"
    [(first, none, line), (second, reason, _), (third, _, _)] = blocks(text)
    assert (none, reason, line) == (None, "needs a GPU", 3)
    names: dict[str, Any] = {}
    run(first, names, "page.md", line)
    with pytest.raises(ZeroDivisionError):
        run(third, names, "page.md", line)
    with pytest.raises(SyntaxError):
        compile(second, "page.md", "exec")


def test_the_site_has_every_page_and_every_public_name() -> None:
    settings = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w-]+\.md", str(settings["nav"]))
    assert sorted(listed) == [page.name for page in PAGES]
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: rocketkv\.(\w+)$", api, re.MULTILINE)) == sorted(rocketkv.__all__)


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv+"])
def test_the_drawing_of_the_budget_has_the_numbers_of_the_split(method: str) -> None:
    kept = rocketkv.RocketKVConfig(method=method, token_budget=512).split_for(8192, 64).kept_tokens
    drawn = (DOCS / "img" / "budget.svg").read_text(encoding="utf-8")
    row = drawn.split(f">{method}<")[1]
    assert re.search(r"stores (\d+) \((\d+) %\)", row).groups() == (str(kept), f"{100 * kept / 8192:.0f}")
