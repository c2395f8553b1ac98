"""What a server answers, through OpenAI's own client: the tokens of `generate`, and no token read twice."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

import rocketkv
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.hf.prompts import continued, question_prompt
from serving import FIELDS, NAME, TEXT, Gate, model, serving, split_generate, tokenizer

pytestmark = pytest.mark.integration

SYSTEM = "Count the doors."
NEW = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[openai.OpenAI, Gate]]:
    made = model()
    gate = Gate(made)
    limits: dict[str, Any] = {"methods": ("rocketkv",), "token_budget": 64, "output_tokens": 64}
    with (
        serving(made, tokenizer(), contexts=folder, **limits) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client, gate


@pytest.fixture(scope="module")
def client(served: tuple[openai.OpenAI, Gate]) -> openai.OpenAI:
    return served[0]


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    made = model()
    rocketkv.patch(made, **FIELDS)
    yield made
    rocketkv.unpatch(made)


def ids(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def ask(client: openai.OpenAI, messages: list[dict[str, Any]], count: int = NEW, **more: Any) -> tuple[Any, Any, Any]:
    """Return the text of a greedy answer, its token ids, and the server's own part of the usage."""
    extra = {"return_token_ids": True, **more}
    given: Any = messages
    done = client.chat.completions.create(model=NAME, messages=given, max_tokens=count, temperature=0, extra_body=extra)
    choice: Any = done.choices[0]
    usage: Any = done.usage
    assert usage.completion_tokens == len(choice.token_ids)
    assert usage.prompt_tokens_details.cached_tokens == usage.rocketkv["prefix_tokens"]
    return choice.message.content, choice.token_ids, usage.rocketkv


def test_a_conversation_of_twenty_turns(client: openai.OpenAI, reference: Any) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    cache = rocketkv.RocketKVCache(reference.config, reference._rocketkv.config)
    before: list[int] = []
    turn = [ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")]
    said = ""
    for number in range(20):
        question = f"{number}: {TEXT[40 * number : 40 * number + 60]}"
        messages.append({"role": "user", "content": question})
        text, found, usage = ask(client, messages)
        opening = said if number == 0 else f"{said}<|im_end|>\n<|im_start|>user\n"
        turn.append(ids(f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n"))
        # A copy answers, and the cache goes on to the prompt's end: as if rolled back after the answer.
        assert found == split_generate(reference, turn, NEW, copy.deepcopy(cache), before)
        split_generate(reference, turn, 1, cache, before)
        assert usage["read_tokens"] == sum(map(len, turn))
        before += [token for part in turn for token in part]
        turn = []
        said = text
        messages.append({"role": "assistant", "content": text})
    assert len(before) > 1000
    # A server that has forgotten everything reads the whole conversation, and answers the same.
    other = ask(client, messages[:-1], rocketkv={"token_budget": 47})[2]
    assert other["prefix_tokens"] == 0


def test_ten_questions_on_one_document(client: openai.OpenAI, reference: Any) -> None:
    head = ids(f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{TEXT}")
    for number in range(10):
        question = f" How many doors has the library, and the mill? {number}"
        parts = [{"type": "text", "text": TEXT}, {"type": "text", "text": question}]
        _, found, usage = ask(client, [{"role": "user", "content": parts}])
        tail = ids(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        assert found == split_generate(reference, [head, tail], NEW)
        assert usage["read_tokens"] == len(tail) + (0 if number else len(head))
        assert 0 < usage["cache_bytes"] < usage["full_cache_bytes"] / 2
        assert usage["saved_bytes"] == usage["full_cache_bytes"] - usage["cache_bytes"]
        assert 0 < usage["missed_mass"] < 1


def test_settings_of_a_request_have_their_own_snapshots(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": TEXT}, {"role": "user", "content": "How many?"}]
    fields = {**FIELDS, "method": "rocketkv", "token_budget": 64}
    other = model()
    tail = ids("How many?<|im_end|>\n<|im_start|>assistant\n")
    head = ids(
        f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>user\n"
    )
    asked = {"method": "rocketkv", "token_budget": 64}
    with rocketkv.patch(other, **fields):
        expected = split_generate(other, [head, tail], NEW)
    for read in (len(head) + len(tail), len(tail)):
        _, found, usage = ask(client, messages, rocketkv=asked)
        assert found == expected
        assert usage["read_tokens"] == read
        assert (usage["method"], usage["token_budget"]) == ("rocketkv", 64)
        assert usage["missed_mass"] is None
    for refused in ({"method": "snapkv"}, {"token_budget": 65}, {"max_error": 0.1}, {"token_budget": 1}):
        with pytest.raises(openai.BadRequestError, match=next(iter(refused))):
            ask(client, messages, rocketkv=refused)


def test_a_stream_begins_before_the_answer_ends(served: tuple[openai.OpenAI, Gate]) -> None:
    client, gate = served
    question: Any = [{"role": "user", "content": "How many doors?"}]
    whole, _, _ = ask(client, question, 40)
    gate.close(after=12)  # enough for a whole character
    texts, usage, reasons = [], [], []
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.chat.completions.create(
        model=NAME, messages=question, max_tokens=40, temperature=0, stream=True, stream_options=options
    )
    for chunk in stream:
        gate.open()  # the first text has come while a token waits
        usage += [] if chunk.usage is None else [chunk.usage]
        texts += [choice.delta.content or "" for choice in chunk.choices]
        reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
    assert "".join(texts) == whole
    assert len([text for text in texts if text]) > 5
    assert reasons == ["length"]
    assert len(usage) >= 2
    assert usage[-1].completion_tokens == 40
    assert usage[0].completion_tokens < 40


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": "How many doors has the mill?"}]
    whole, _, _ = ask(client, question, 40)
    stop = whole[20:23]
    done = client.chat.completions.create(
        model=NAME, messages=question, max_tokens=40, temperature=0, stop=["@@@", stop]
    )
    assert done.choices[0].message.content == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == "stop"


def test_seeds_repeat_an_answer(client: openai.OpenAI) -> None:
    def sampled(seed: int | None) -> str:
        done = client.completions.create(model=NAME, prompt="The doors ", max_tokens=24, temperature=1, seed=seed)
        assert done.choices[0].finish_reason == "length"
        return done.choices[0].text

    assert sampled(5) == sampled(5) != sampled(6)
    assert sampled(None) != sampled(None)


def save_context(folder: Path, name: str, seed: int = 0) -> tuple[Path, list[int]]:
    """Write a context file as `rocketkv compress` does; return its path and tokens."""
    made = model(seed=seed)
    head = ids(f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{TEXT}")
    fields = {**FIELDS, "token_budget": 56}
    with rocketkv.patch(made, **fields), torch.inference_mode():
        cache = rocketkv.RocketKVCache(made.config, prompt_length=len(head), **fields)
        made(torch.tensor([head]), **{CACHE_ARGUMENT: cache}, use_cache=True)
        path = folder / f"{name}.safetensors"
        rocketkv.save_cache(cache, path, model=made, ids=torch.tensor([head]))
    return path, head


def test_a_context_file_is_asked_by_its_id(client: openai.OpenAI, folder: Path, reference: Any) -> None:
    path, head = save_context(folder, "doors")
    tail = continued(tokenizer(), question_prompt(tokenizer(), "", "How many?").tail)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "How many?"}]
    with rocketkv.patch(reference, token_budget=56, **{k: v for k, v in FIELDS.items() if k != "token_budget"}):
        cache = rocketkv.load_cache(path, reference)
        expected = split_generate(reference, [tail], NEW, cache, head)
    for _ in range(2):
        text, found, usage = ask(client, messages, context="doors")
        assert found == expected
        assert (usage["prefix_tokens"], usage["read_tokens"]) == (len(head), len(tail))
        assert usage["token_budget"] == 56
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And the inn?"}]
    follow = ask(client, messages, context="doors")[2]
    assert follow["prefix_tokens"] == len(head) + len(tail)
    # Another file under the same name is another context.
    path.unlink()
    with pytest.raises(openai.NotFoundError, match="no context 'doors'"):
        ask(client, messages[:1], context="doors")
    listed = httpx.get(f"{client.base_url}contexts").json()
    assert listed["data"] == []


def test_contexts_that_do_not_fit_are_refused_by_name(client: openai.OpenAI, folder: Path) -> None:
    message: list[dict[str, Any]] = [{"role": "user", "content": "How many?"}]
    save_context(folder, "other-model", seed=1)
    damaged, _ = save_context(folder, "damaged")
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    (folder / "pickle.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch hit'\ntR.")
    (folder / "link.safetensors").symlink_to("/etc/passwd")
    for name, reason in (
        ("other-model", "weights_sha256"),
        ("damaged", "'damaged'.*sha256"),
        ("pickle", "no safetensors file"),
    ):
        with pytest.raises(openai.UnprocessableEntityError, match=reason) as raised:
            ask(client, message, context=name)
        assert name in str(raised.value)
        assert str(folder) not in str(raised.value)
    for trick in ("../damaged", "/etc/passwd", "..", ".", "a/../damaged", "damaged\0", "..%2fdamaged", "", "a" * 200):
        with pytest.raises(openai.BadRequestError):
            ask(client, message, context=trick)
        answer = httpx.get(f"{client.base_url}contexts/{trick.replace(chr(0), '%00')}")
        assert answer.status_code in (200, 307, 404, 400)
        assert "passwd" not in answer.text or answer.status_code != 200
    with pytest.raises(openai.NotFoundError):
        ask(client, message, context="link")
    assert {each["id"] for each in httpx.get(f"{client.base_url}contexts").json()["data"]} == {
        *("other-model", "damaged", "pickle"),
    }


def test_the_system_message_is_protected() -> None:
    made, names = model(), tokenizer()
    system = "Always say the word harbour, and never say how many doors there are in it."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": TEXT}]
    head = ids(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
    tail = ids(f"{TEXT}<|im_end|>\n<|im_start|>assistant\n")
    fields = {**FIELDS, "protect": "system"}
    with rocketkv.patch(made, tokenizer=names, **fields):
        cache = rocketkv.RocketKVCache(made.config, **fields)
        expected = split_generate(made, [head, tail], NEW, cache)
        stored: Any = cache.layers[0]
        assert stored.store.marks[0].protected == ((0, len(head)),)
    with (
        serving(made, names, {**fields, "tokenizer": names}) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert ask(client, messages)[1] == expected
