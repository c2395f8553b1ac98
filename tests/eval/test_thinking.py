"""Models that think: their chat templates, their answers without the thinking, and sampling by their card."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from eval_case import know_tasks, made_task, sample
from rocketkv.cli.main import main
from rocketkv.eval.answers import Thought, read_answer
from rocketkv.eval.records import Record, digest, records
from rocketkv.eval.sampling import Sampler, card_settings
from rocketkv.hf.loading import load_model
from rocketkv.hf.prompts import ChatOptions, check_chat_arguments, encode, follow_up, render
from rocketkv.hf.thinking import ThinkingTags, thinking_tags
from thinkers import OPEN, save, tokenizer

QWEN, OSS = tokenizer("qwen3"), tokenizer("gpt-oss")
FINAL = "<|channel|>final<|message|>"


def test_tags_come_from_the_tokenizer() -> None:
    assert thinking_tags(QWEN) == ThinkingTags("<think>", "</think>")
    assert thinking_tags(OSS) == ThinkingTags("<|channel|>", FINAL)
    plain = tokenizer("gpt-oss")
    for tokens, tags in (
        (["[THINK]", "[/THINK]"], ("[THINK]", "[/THINK]")),
        (["<|START_THINKING|>", "<|END_THINKING|>"], ("<|START_THINKING|>", "<|END_THINKING|>")),
        (["</think>"], None),  # alone it closes nothing
    ):
        plain.get_added_vocab = lambda tokens=tokens: dict.fromkeys(tokens, 0)
        plain.chat_template = "{{ messages }}"
        assert thinking_tags(plain) == tags
    plain.chat_template = "{{ message.content.split('</think>')[-1] }}"
    assert thinking_tags(plain) == ThinkingTags("<think>", "</think>")


@pytest.mark.parametrize(
    ("words", "options", "end"),
    [
        (QWEN, ChatOptions(), "<|im_start|>assistant\n it is"),
        (QWEN, ChatOptions({"enable_thinking": False}), "<|im_start|>assistant\n<think>\n\n</think>\n\n it is"),
        (QWEN, ChatOptions(thinking=True), "<|im_start|>assistant\n"),
        (tokenizer("qwen3", OPEN), ChatOptions(), "<|im_start|>assistant\n<think>\n\n</think>\n\n it is"),
        (tokenizer("qwen3", OPEN), ChatOptions(thinking=True), "<|im_start|>assistant\n<think>\n"),
        (OSS, ChatOptions(), f"<|start|>assistant{FINAL} it is"),
        (OSS, ChatOptions(thinking=True), "<|start|>assistant"),
    ],
    ids=["qwen3", "qwen3-no-thinking", "qwen3-thinks", "open", "open-thinks", "gpt-oss", "gpt-oss-thinks"],
)
def test_an_answer_begins_outside_of_a_thinking_block(words: Any, options: ChatOptions, end: str) -> None:
    assert render(words, "the context", " a question", " it is", chat=True, options=options).tail.endswith(end)
    assert follow_up(words, " a question", " it is", chat=True, options=options).endswith(end)


def test_variables_reach_a_template_and_unknown_ones_are_refused() -> None:
    low = render(OSS, "the", " grass", chat=True, options=ChatOptions({"reasoning_effort": "low"}))
    assert low.head.startswith("<|start|>system<|message|>Current date: 2026-01-01\nReasoning: low<|end|>")
    check_chat_arguments(OSS, {"reasoning_effort": "low"})
    for name in ("enable_thinking", "messages", "tokenize"):
        with pytest.raises(ValueError, match=f"must be a variable of the model's chat template, got '{name}'"):
            check_chat_arguments(OSS, {name: False})


@pytest.mark.parametrize(
    ("words", "text", "inside", "limit", "answer", "thought"),
    [
        (QWEN, "the number is 5", False, 90, "the number is 5", None),
        (QWEN, "the number", False, 2, "the nu", None),
        (QWEN, "<think>\nthe grass\n</think>\n\nit is 5", False, 90, "it is 5", (True, "\nthe grass\n")),
        (QWEN, "the grass</think>\n5 5", True, 3, "5 ", (True, "the grass")),
        (QWEN, "<think>the grass", False, 1, "", (False, "the grass")),
        (QWEN, "the grass", True, 1, "", (False, "the grass")),
        (OSS, f"<|channel|>analysis<|message|>grass<|end|><|start|>assistant{FINAL}it is", False, 90, "it is", True),
        (OSS, "<|channel|>analysis<|message|>the grass is green", False, 2, "", False),
        (OSS, "the grass", False, 90, "the grass", None),
    ],
)  # fmt: skip
def test_an_answer_is_what_follows_the_thinking(
    words: Any, text: str, inside: bool, limit: int, answer: str, thought: Any
) -> None:
    ids = words(text, add_special_tokens=False)["input_ids"]
    written = read_answer(iter(ids), words, thinking_tags(words), limit=limit, inside=inside)
    assert written.answer == answer
    if thought is None:
        assert written.thought is None
        assert written.tokens == min(limit, len(ids))
        return
    assert isinstance(written.thought, Thought)
    closed, inner = thought if isinstance(thought, tuple) else (thought, None)
    assert written.thought.closed is closed
    assert written.tokens - (written.thought.tokens if closed else 0) <= max(limit, len(ids))
    if inner is not None:
        assert inner in written.thought.text
    if not closed:
        assert written.tokens == written.thought.tokens == len(ids)  # thinking does not use up the answer's tokens


def test_sampling_follows_the_card_and_its_seed() -> None:
    card = GenerationConfig(do_sample=True, temperature=0.6, top_k=2, top_p=0.95, repetition_penalty=1.1)
    settings = card_settings(card)
    assert settings == {"do_sample": True, "temperature": 0.6, "top_k": 2, "top_p": 0.95, "repetition_penalty": 1.1}
    assert card_settings(GenerationConfig(temperature=0.6)) == {}  # a card without do_sample is greedy
    with pytest.raises(ValueError, match="the model's card sets num_beams to 4"):
        card_settings(GenerationConfig(num_beams=4))
    logits = torch.zeros(1, 8)
    logits[0, [3, 5]] = 4.0

    def drawn(seed: Any) -> list[int]:
        sampler = Sampler({"do_sample": True, "temperature": 0.6, "top_k": 2}, [1], seed)
        return [int(sampler(logits)) for _ in range(24)]

    assert drawn([0, "s0", 0]) == drawn([0, "s0", 0]) != drawn([1, "s0", 0])
    assert set(drawn([0, "s0", 0])) == {3, 5}
    penalty = Sampler({"repetition_penalty": 100.0}, [3], 0)
    assert [int(penalty(logits)) for _ in range(2)] == [5, 3]  # greedy, among what has not been written


def run(folder: Path, results: Path, *more: str) -> list[Record]:
    """Run a sweep with stderr in a file; return its records."""
    flags = ["--methods", "full,rocketkv", "--budgets", "48", "--tasks", "made", "--lengths", "90", "--samples", "2"]
    with (results.with_suffix(".log")).open("w") as log, contextlib.redirect_stderr(log):
        code = main(["eval", "run", "--model", str(folder), *flags, "--device", "cpu", *more, "-o", str(results)])
    assert code == 0
    return list(records(results))


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    know_tasks(monkeypatch, made_task(group="made"))


@pytest.mark.parametrize(
    ("family", "arguments"), [("qwen3", {"enable_thinking": False}), ("gpt-oss", {"reasoning_effort": "low"})]
)
def test_a_thinking_model_runs_a_sweep_in_its_template(family: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    folder, results = save(tmp_path / "model", family), tmp_path / "results"
    flags = [f"--chat-template-arg={name}={str(value).lower()}" for name, value in arguments.items()]
    full, ours = run(folder, results, *flags, "--attn", "eager", "--thinking-tokens", "3")
    words = tokenizer(family)
    for record in (full, ours):
        cell = record["cell"]
        assert (cell["dtype"], cell["attention"], cell["thinking_tokens"]) == ("float32", "eager", 3)
        assert (cell["chat"], cell["chat_arguments"], cell["sampling"]) == (True, arguments, {})
        for number, made in enumerate(record["samples"]):
            asked = sample(number, length=90)
            options = {"chat": True, "options": ChatOptions(arguments, thinking=True)}
            prompt = render(words, asked.context, asked.turns[0].question, asked.turns[0].answer_prefix, **options)
            assert made["prompt_sha256"] == digest([encode(words, prompt)[0]])
    lines = results.with_suffix(".log").read_text().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("made")] == ["made 90 full", "made 90 rocketkv 48"]
    assert lines[-1].startswith("2 cells done, 0 were before")


def test_an_unclosed_block_is_recorded_and_sampled_answers_are_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = save(tmp_path / "model", "qwen3"), tmp_path / "results"
    (think,) = QWEN("<think>", add_special_tokens=False)["input_ids"]
    draw = Sampler.__call__

    def begin_block(self: Sampler, logits: Tensor) -> Tensor:
        if think in self._ids:
            return draw(self, logits)
        self._ids.append(think)
        return torch.tensor([[think]])

    monkeypatch.setattr(Sampler, "__call__", begin_block)  # each answer begins a block and does not end it
    flags = ["--thinking-tokens", "5", "--generation", "card", "--budgets", "4096", "--seed", "2"]
    full, ours = run(folder, results, *flags)
    assert full["cell"]["sampling"] == {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    for one, other in zip(full["samples"], ours["samples"], strict=True):
        assert one["turns"][0]["prediction"] == ""
        (thought,) = one["notes"]["thinking"]
        assert (thought["tokens"], thought["closed"]) == (6 + 5, False)
        assert one["notes"] == other["notes"]  # the same random numbers at a full budget
    assert full["samples"][0]["notes"] != full["samples"][1]["notes"]


def test_weights_load_as_transformers_loads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model", "qwen3")
    asked: list[dict[str, Any]] = []
    real = load_model.__globals__["AutoModelForCausalLM"].from_pretrained

    def loaded(name: str, **options: Any) -> Any:
        asked.append(options)
        if getattr(options["config"], "quantization_config", None) is None:
            return real(name, **options)
        options["config"].quantization_config = None  # its packages are not here
        model = real(name, **options | {"device_map": None})
        monkeypatch.setattr(model, "to", lambda *_: pytest.fail("quantized weights are not to be moved or cast"))
        return model

    monkeypatch.setattr("rocketkv.hf.loading.AutoModelForCausalLM.from_pretrained", loaded)
    assert load_model(str(folder), attention="eager", revision="main")[0].config._attn_implementation == "eager"
    assert (asked[-1]["dtype"], asked[-1]["revision"]) == (torch.float32, "main")
    assert load_model(str(folder), "auto", device_map={"": "cpu"})[0].dtype == torch.bfloat16
    configuration = folder / "config.json"
    quantized = '{"quantization_config": {"quant_method": "gptq", "bits": 4}, '
    configuration.write_text(configuration.read_text().replace("{", quantized, 1))
    monkeypatch.setattr("rocketkv.hf.loading._check_device", lambda device: None)
    load_model(str(folder), "auto", "cuda:1")
    assert (asked[-1]["dtype"], asked[-1]["device_map"]) == ("auto", {"": "cuda:1"})
    load_model(str(folder), "float16", "cpu")
    assert asked[-1]["dtype"] == torch.float16
    assert "device_map" not in asked[-1]
    with pytest.raises(ValueError, match="leave out revision, device_map and tp, got 'v1', None and 1"):
        load_model("smollm2", revision="v1")


@pytest.mark.parametrize(
    ("settings", "package"),
    [({"quant_method": "gptq", "bits": 4}, "optimum"), ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
     ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes")],
)  # fmt: skip
def test_quantized_weights_without_their_package_are_refused_by_its_name(
    settings: dict[str, Any], package: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    configuration = save(tmp_path, "qwen3") / "config.json"
    configuration.write_text(json.dumps(json.loads(configuration.read_text()) | {"quantization_config": settings}))
    with pytest.raises(ImportError, match=package):
        load_model(str(tmp_path))
