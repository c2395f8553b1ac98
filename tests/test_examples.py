"""Each example, run as its reader would, on a tiny model in a local folder."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rocketkv.cli import compress, serve
from serving import model, serving, tokenizer
from tiny import COMMON, sharpened

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
STATS = re.compile(r"(\d+) tokens seen, (\d+) stored a head; .* MiB live .* a step reads .* MiB, a dense one .* MiB")
NEW_TOKENS = 12
CAPACITY = 64
NAMES = ("generate", "manual_loop", "chat", "document_qa", "long_output")
# Of one example, beside those that all have.
OPTIONS = {"long_output": ["--new-tokens", str(3 * CAPACITY), "--capacity", str(CAPACITY)]}
RUN = """
import json, runpy, sys
names, folder, own, *common = sys.argv[1:]
for name in names.split(","):
    sys.argv[:] = [f"{folder}/{name}.py", *common, *json.loads(own).get(name, ())]
    print("\\fexample\\f", end="", flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of one token a byte and a chat template."""
    path = tmp_path_factory.mktemp("model")
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    made = LlamaConfig(**{**COMMON, "vocab_size": len(alphabet), "eos_token_id": special.index("<|end|>")})
    sharpened(LlamaForCausalLM, made).save_pretrained(path)
    (path / "text.txt").write_text("The harbour was quiet, and the boats lay still. " * 8, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, str]:
    """What each example prints, one after the other in a process of their own: to import is most of their time."""
    options = ["--model", folder, "--file", folder / "text.txt", "--budget", 64, "--new-tokens", NEW_TOKENS]
    done = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(NAMES), EXAMPLES, json.dumps(OPTIONS), *map(str, options)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return dict(zip(NAMES, done.stdout.split("\fexample\f")[1:], strict=True))


def stats_of(printed: str) -> list[tuple[int, int]]:
    """Return the tokens seen and stored of each line of statistics."""
    return [(int(seen), int(stored)) for seen, stored in STATS.findall(printed)]


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == {"what_it_keeps.ipynb"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NAMES, "serve_client"}
    assert {path.name for path in EXAMPLES.glob("*.sh")} == {"serve.sh", "vllm_serve.sh"}


def test_a_client_asks_a_server(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model(), tokenizer()) as url:
        options = ["--url", f"{url}/v1", "--file", str(folder / "text.txt"), "--new-tokens", "8"]
        monkeypatch.setattr(sys, "argv", ["serve_client.py", *options])
        runpy.run_path(str(EXAMPLES / "serve_client.py"), run_name="__main__")
    read = re.findall(r"\[(\d+) tokens read, (\d+) not read again; first token after", capsys.readouterr().out)
    prompt = len((folder / "text.txt").read_text(encoding="utf-8"))
    assert [int(new) > prompt for new, _ in read] == [True, False, False]
    assert [int(again) > prompt for _, again in read] == [False, True, True]


def test_the_commands_of_a_server_are_those_of_the_command_line(tmp_path: Path) -> None:
    said = tmp_path / "said"
    stub = tmp_path / "rocketkv"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {said}\n', encoding="utf-8")
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONTEXTS": str(tmp_path / "contexts")}
    subprocess.run(["sh", EXAMPLES / "serve.sh", "MODEL", "TEXT"], env=environment, check=True)
    for line, command in zip(said.read_text(encoding="utf-8").splitlines(), (compress, serve), strict=True):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        given = parser.parse_args(line.split()[1:])
        assert (given.model, given.method, given.budget) == ("MODEL", "rocketkv-mt+", 512)


def test_the_notebook_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its outputs: PLOTLY_RENDERER=png jupyter nbconvert --execute --inplace examples/what_it_keeps.ipynb (with kaleido)
    monkeypatch.chdir(tmp_path)
    book = json.loads((EXAMPLES / "what_it_keeps.ipynb").read_text(encoding="utf-8"))
    space: dict[str, Any] = {}
    shown = []
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), space)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), space))
        if "parameters" in cell["metadata"].get("tags", ()):
            # Tokens of the tiny model are bytes.
            assert {"MODEL", "METHOD", "TOKEN_BUDGET", "PROMPT_TOKENS", "NEW_TOKENS"} <= set(space)
            space |= {"MODEL": str(folder), "PROMPT_TOKENS": 1200, "NEW_TOKENS": 4, "TOKEN_BUDGET": 64}
    drawn = [figure for figure in shown if figure is not None]
    assert [len(figure.data) for figure in drawn] == [2, 2, 2, 3]
    assert all(type(figure).__name__ == "Figure" for figure in drawn)
    assert "".join(space["tokens"][space["begin"] : space["end"]]).endswith(space["hidden"].answer)
    assert (tmp_path / "what_it_keeps.html").stat().st_size > 100_000


@pytest.mark.parametrize("example", ["generate", "manual_loop"])
def test_the_text_is_continued_and_compressed(example: str, folder: Path, printed: dict[str, str]) -> None:
    [(seen, stored)] = stats_of(printed[example])
    prompt = len((folder / "text.txt").read_text(encoding="utf-8"))
    assert prompt < seen < prompt + NEW_TOKENS, "the last new token is never cached"
    assert stored < prompt


def test_the_second_turn_goes_on_where_the_first_ended(folder: Path, printed: dict[str, str]) -> None:
    (first, _), (second, stored) = stats_of(printed["chat"])
    prompt = len((folder / "text.txt").read_text(encoding="utf-8"))
    assert prompt < first < second < first + NEW_TOKENS + 100, "the text was not read twice"
    assert stored < prompt


def test_a_document_is_asked_in_three_ways(printed: dict[str, str]) -> None:
    lines = printed["document_qa"].splitlines()
    assert sum("[the same each time]" in line for line in lines) == 5
    assert [line.split(":")[0] for line in lines if line.endswith(" s")][:2] == [
        "a new cache for each question",
        "one cache, rolled back",
    ]


def test_a_long_output_stays_in_its_memory(folder: Path, printed: dict[str, str]) -> None:
    found = stats_of(printed["long_output"])
    prompt = len((folder / "text.txt").read_text(encoding="utf-8"))
    assert [seen for seen, _ in found] == [prompt + 3 * CAPACITY // 4 - 1, prompt + 3 * CAPACITY - 1]
    (_, first), (_, second) = found
    assert second <= first - (3 * CAPACITY // 4 - 1) + CAPACITY
    live = re.findall(r"; ([\d.]+) MiB live", printed["long_output"])
    assert live[0] == live[1]
