"""`rocketkv compress` and `rocketkv ask`: a text that is read once, and questions about it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import rocketkv
from rocketkv.cli.main import main
from rocketkv.hf.models import CACHE_ARGUMENT
from tiny import build

pytestmark = pytest.mark.integration

CHAT = "{% for message in messages %}<user> {{ message.content }} <end> {% endfor %}<assistant>"
WORDS = ["<pad>", "<bos>", "<unk>", "<user>", "<end>", "<assistant>", *(f"w{i}" for i in range(90))]
TEXT = " ".join(f"w{(7 * i * i + 3 * i) % 90}" for i in range(300))
BUDGET = ["--budget", "200", "--method", "rocketkv"]


@pytest.fixture(params=[None, CHAT], ids=["plain", "chat"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a model and its tokenizer, and a text."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(tmp_path / "model")
    build("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def expected(folder: Path, question: str, new_tokens: int) -> str:
    """Return the answer of a model that reads text and question in two prompts on one cache."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    chat = tokenizer.chat_template is not None
    head = f"<user> {TEXT}" if chat else TEXT
    tail = f"{question} <end> <assistant>" if chat else question
    ids = [torch.tensor([tokenizer(part)["input_ids"]]) for part in (head, tail)]
    with rocketkv.patch(model, method="rocketkv", token_budget=200), torch.no_grad():
        cache = rocketkv.RocketKVCache(model.config, method="rocketkv", token_budget=200, prompt_length=ids[0].shape[1])
        model(ids[0], **{CACHE_ARGUMENT: cache}, use_cache=True)
        cache.begin_turn()
        found = []
        given = ids[1]
        for _ in range(new_tokens):
            given = model(given, **{CACHE_ARGUMENT: cache}, use_cache=True).logits[:, -1:].argmax(-1)
            found.append(int(given))
    return str(tokenizer.decode(found, skip_special_tokens=True))


def test_a_text_is_read_once_and_asked_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = folder / "text.txt.safetensors"  # the default output
    out = run(capsys, "compress", folder / "text.txt", "--model", folder / "model", *BUDGET)
    seen = 300 + (folder / "model" / "chat_template.jinja").exists()
    assert out.startswith(f"{seen} tokens seen, ")
    assert str(cache) in out
    assert rocketkv.load_inputs(cache)["input_ids"].shape == (1, seen)
    digest = hashlib.sha256(cache.read_bytes()).digest()
    (folder / "text.txt").unlink()
    for question in ("w5 w17 w3", "w80", "w5 w17 w3"):
        arguments = ["ask", cache, question, "--model", folder / "model", "--new-tokens", 12]
        assert run(capsys, *arguments) == f"{expected(folder, question, 12)}\n"
    assert hashlib.sha256(cache.read_bytes()).digest() == digest


def test_a_page_shows_what_is_kept_and_what_an_answer_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, model = folder / "text.txt.safetensors", ["--model", folder / "model"]
    run(capsys, "compress", folder / "text.txt", *model, *BUDGET)
    assert run(capsys, "show", cache, *model) == f"{cache}.html\n"
    kept = shown(folder / "text.txt.safetensors.html")
    assert sorted(kept) == ["figures", "tokens"]
    assert sorted(kept["figures"]) == ["kept"]
    assert "".join(kept["tokens"]["tokens"]).endswith(TEXT[-200:])
    stored = rocketkv.load_cache(cache, AutoModelForCausalLM.from_pretrained(folder / "model")).positions()
    views = [view["name"] for view in kept["tokens"]["views"]]
    assert views == ["by all layers", "by layer 0, 2 KV heads", "by layer 1, 2 KV heads"]
    # The runs of the view of layer 1: levels, and how many tokens have them.
    runs = kept["tokens"]["views"][2]["runs"]
    levels = [level for level, count in zip(runs[::2], runs[1::2], strict=True) for _ in range(count)]
    heads = [sum(place in head.tolist() for head in stored[1][0]) for place in range(len(levels))]
    assert levels == [-(-9 * count // 2) for count in heads]

    (folder / "text.txt").unlink()
    page = folder / "answer.html"
    out = run(capsys, "show", cache, "w5 w17 w3", *model, "--new-tokens", 12, "-o", page)
    assert out == f"{expected(folder, 'w5 w17 w3', 12)}\n{page}\n"
    answered = shown(page)
    assert sorted(answered["figures"]) == ["kept", "missed", "reads", "step"]
    groups = [view["group"] for view in answered["tokens"]["views"]]
    assert groups == ["Kept"] * 3 + ["Read by the step of"] * 11


def shown(page: Path) -> dict[str, Any]:
    """Return the data of a page."""
    found = re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script>', page.read_text(encoding="utf-8"))
    return {name: json.loads(text) for name, text in found}


def test_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, model = folder / "text.safetensors", folder / "model"
    run(capsys, "compress", folder / "text.txt", "--model", model, "-o", cache, *BUDGET)
    (folder / "empty.txt").write_text("\n", encoding="utf-8")
    build("llama", seed=1).save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "other")
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(cache.read_bytes()[:-1])
    compress = ["compress", "--model", model, "-o", folder / "new"]
    for arguments, message in (
        ([*compress, folder / "none.txt"], "No such file"),
        ([*compress, folder / "text.txt", "--device", "cuda:99"], "device 'cuda:99' cannot be used on this machine"),
        ([*compress, folder / "empty.txt"], "is empty"),
        ([*compress, folder / "text.txt", "--budget", "1"], "token_budget must be at least"),
        (["ask", folder / "none", "w1", "--model", model], "no file"),
        (["show", folder / "none"], "no file"),
        (["show", damaged, "w1", "--model", model], "damaged or cut short"),
        (["ask", damaged, "w1", "--model", model], "damaged or cut short"),
        (["ask", cache, "w1", "--model", model, "--dtype", "bfloat16"], "model.dtype is 'torch.float32'"),
        (["ask", cache, "w1", "--model", folder / "other"], "model.weights_sha256"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        [line] = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith(f"rocketkv {arguments[0]}: error: ")
        assert message in line
    assert not (folder / "new").exists()
