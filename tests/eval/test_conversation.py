"""Questions on a context, aware and agnostic: what the model reads, that nothing it wrote stays, and what it costs."""

from __future__ import annotations

import gc
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from eval_case import END, model, sample, tokenizer, words
from rocketkv import patch
from rocketkv.eval.conversation import answer_sample, end_tokens
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.methods import Compressed, Full, Method, find_method
from rocketkv.eval.records import digest
from rocketkv.eval.tasks.base import Sample, Turn
from rocketkv.hf.cache import begin_prompt, cache_stats
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.hf.prompts import encode, render
from tiny import NEVER

BUDGET = 40
SETTINGS = {"window_size": 8, "decode_reserve": 8}
METHODS = ("full", "rocketkv", "streaming", "quest", "snapkv")
WORDS = tokenizer()
PLAIN = tokenizer(chat=False)


def method_of(name: str) -> Method:
    return find_method(name, None) if name == "full" else find_method(name, BUDGET, SETTINGS)


def ids_of(text: str) -> list[int]:
    return list(WORDS(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    made = model()
    made.generation_config.eos_token_id = NEVER
    return made


@dataclass
class Watched:
    """A method that notes the caches it makes and what the model is given and answers."""

    method: Method
    caches: list[Cache] = field(default_factory=list)
    prompts: list[int | None] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def token_budget(self) -> int | None:
        return self.method.token_budget

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return self.method.attached(model)

    def new_cache(self, model: PreTrainedModel, prompt_length: int | None) -> Cache:
        self.caches.append(self.method.new_cache(model, prompt_length))
        self.prompts.append(prompt_length)
        return self.caches[-1]


class Unending:
    """A tokenizer without an end token, so that answers have a length that a test knows."""

    eos_token_id = None
    chat_template = WORDS.chat_template

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return WORDS(text, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(WORDS, name)


UNENDING: PreTrainedTokenizerBase = Unending()  # type: ignore[assignment]


@torch.inference_mode()
def forwards(
    tiny: PreTrainedModel, method: Method, prompts: list[list[int]], count: int
) -> tuple[list[int], list[Tensor], Cache]:
    """Read prompts one after the other on a new cache, then generate greedily: the reference of `answer_sample`."""
    with method.attached(tiny):
        cache = method.new_cache(tiny, len(prompts[0]))
        seen = 0
        for prompt in prompts:
            seen += len(prompt)
            begin_prompt(cache, seen)
            logits = tiny(torch.tensor([prompt]), **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[0, -1]
        written, rows = [int(logits.argmax())], [logits]
        while len(written) < count:
            rows.append(tiny(torch.tensor([[written[-1]]]), **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[0, -1])
            written.append(int(rows[-1].argmax()))
    return written, rows, cache


def spied(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[Tensor]]:
    """Record the prompts of decode loops, and the logits of every forward."""
    prompts: list[list[int]] = []
    rows: list[Tensor] = []
    prefill, step = DecodeLoop.prefill, DecodeLoop.step

    def recorded_prefill(self: DecodeLoop, ids: list[list[int]]) -> Tensor:
        prompts.append(list(ids[0]))
        return prefill(self, ids)

    def recorded_step(self: DecodeLoop, ids: Any) -> Tensor:
        rows.append(step(self, ids)[0].clone())
        return self.logits

    monkeypatch.setattr(DecodeLoop, "prefill", recorded_prefill)
    monkeypatch.setattr(DecodeLoop, "step", recorded_step)
    return prompts, rows


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chat", [False, True])
def test_agnostic_questions_are_each_asked_of_the_context_alone(
    name: str, chat: bool, tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, rows = spied(monkeypatch)
    made = sample(turns=3)
    answers = answer_sample(tiny, UNENDING, method_of(name), made, mode="agnostic", chat=chat)
    context, *questions = prompts
    before, end = ("<|user|>", f"{END}<|assistant|>") if chat else ("", "")
    assert context == ids_of(before + made.context)
    assert questions == [ids_of(f"{turn.question}{end}{turn.answer_prefix}") for turn in made.turns]
    at = 1  # the first row is the context's
    for question, prediction in zip(questions, answers.predictions, strict=True):
        written, expected, cache = forwards(tiny, method_of(name), [context, question], 6)
        assert prediction == WORDS.decode(written, skip_special_tokens=True)
        for row in expected:
            assert torch.equal(rows[at], row)
            at += 1
    assert at == len(rows)
    assert answers.prompt_sha256 == digest([context + question for question in questions])
    assert answers.cost["kv_bytes"] == cache_stats(cache).total_bytes


def test_agnostic_answers_do_not_depend_on_the_questions_before(tiny: PreTrainedModel) -> None:
    made = sample(turns=3)
    made = replace(made, turns=tuple(replace(turn, answer_prefix=f" {n}") for n, turn in enumerate(made.turns)))
    backwards = replace(made, turns=made.turns[::-1])
    for name in METHODS:
        forth = answer_sample(tiny, UNENDING, method_of(name), made, mode="agnostic").predictions
        back = answer_sample(tiny, UNENDING, method_of(name), backwards, mode="agnostic").predictions
        assert forth == back[::-1]
        assert len(set(forth)) > 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chat", [False, True])
def test_a_further_question_follows_the_right_answer(
    name: str, chat: bool, tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, rows = spied(monkeypatch)
    made = sample(turns=3)
    answers = answer_sample(tiny, UNENDING, method_of(name), made, chat=chat)
    one, two, three = made.turns
    if chat:
        first = f"<|user|>{made.context}{one.question}{END}<|assistant|>{one.answer_prefix}"
        further = [f"{END}<|user|>{turn.question}{END}<|assistant|>{turn.answer_prefix}" for turn in (two, three)]
    else:
        first = f"{made.context}{one.question}{one.answer_prefix}"
        further = [f"\n\n{turn.question}{turn.answer_prefix}" for turn in (two, three)]
    right = [ids_of(" 00"), ids_of(" 01")]
    assert prompts == [ids_of(first), *(gold + ids_of(text) for gold, text in zip(right, further, strict=True))]
    at = 0
    for turn in range(3):
        written, expected, cache = forwards(tiny, method_of(name), prompts[: turn + 1], 6)
        assert answers.predictions[turn] == WORDS.decode(written, skip_special_tokens=True)
        assert torch.equal(rows[at], expected[0])
        at += len(expected)
        assert torch.equal(rows[at - 1], expected[-1])
    assert answers.prompt_sha256 == digest(
        [[token for prompt in prompts[: turn + 1] for token in prompt] for turn in range(3)]
    )
    assert answers.cost["kv_bytes"] == cache_stats(cache).total_bytes


def test_without_an_answer_prefix_the_right_answer_is_as_it_is(
    tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, _ = spied(monkeypatch)
    answer_sample(tiny, UNENDING, Full(), sample(turns=2, answer_prefix=""))
    assert prompts[1][: len(ids_of("00"))] == ids_of("00")


def test_what_the_model_wrote_changes_no_further_answer(tiny: PreTrainedModel) -> None:
    made = sample(turns=2)
    for name in METHODS:
        long, short = (
            answer_sample(
                tiny,
                UNENDING,
                method_of(name),
                replace(made, turns=(replace(made.turns[0], max_new_tokens=n), made.turns[1])),
            )
            for n in (12, 1)
        )
        assert long.predictions[0] != short.predictions[0]
        assert long.predictions[1] == short.predictions[1]


@pytest.mark.parametrize("chat", [False, True])
def test_asked_aware_the_full_cache_is_stock_generate(chat: bool, tiny: PreTrainedModel) -> None:
    made = sample(max_new_tokens=20)
    prompt = render(WORDS, made.context, made.turns[0].question, made.turns[0].answer_prefix, chat=chat)
    ids = torch.tensor([encode(WORDS, prompt)[0]])
    expected = tiny.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    answers = answer_sample(tiny, UNENDING, Full(), made, chat=chat)
    assert answers.predictions == (WORDS.decode(expected[0, ids.shape[1] :], skip_special_tokens=True),)
    assert answers.cost["new_tokens"] == 20
    assert answers.cost["prompt_tokens"] == ids.shape[1]


@pytest.mark.parametrize("name", METHODS[1:])
def test_asked_aware_a_method_is_the_patched_models_generate(name: str, tiny: PreTrainedModel) -> None:
    made = sample(max_new_tokens=20)
    prompt = render(WORDS, made.context, made.turns[0].question, made.turns[0].answer_prefix)
    ids = torch.tensor([encode(WORDS, prompt)[0]])
    method = method_of(name)
    assert isinstance(method, Compressed)
    with patch(tiny, method.config):
        expected = tiny.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    full = answer_sample(tiny, UNENDING, Full(), made)
    answers = answer_sample(tiny, UNENDING, method, made)
    assert answers.predictions == (WORDS.decode(expected[0, ids.shape[1] :], skip_special_tokens=True),)
    assert answers.predictions != full.predictions


def test_an_end_token_ends_an_answer_and_is_no_part_of_it(tiny: PreTrainedModel) -> None:
    made = sample(max_new_tokens=10)
    prompt = encode(WORDS, render(WORDS, made.context, made.turns[0].question, made.turns[0].answer_prefix))[0]
    written, _, _ = forwards(tiny, Full(), [prompt], 10)
    end = next(token for token in written[2:] if token not in written[:2])
    until = written[: written.index(end)]
    configured = tiny.generation_config.eos_token_id
    try:
        for ends in (end, [NEVER, end]):
            tiny.generation_config.eos_token_id = ends
            answers = answer_sample(tiny, UNENDING, Full(), made)
            assert answers.predictions == (WORDS.decode(until, skip_special_tokens=True),)
            assert answers.cost["new_tokens"] == len(until)
    finally:
        tiny.generation_config.eos_token_id = configured


def test_end_tokens_are_the_models_and_the_tokenizers(tiny: PreTrainedModel) -> None:
    assert end_tokens(tiny, WORDS) == {NEVER, WORDS.eos_token_id}
    assert WORDS.decode([WORDS.eos_token_id]) == END
    assert end_tokens(tiny, UNENDING) == {NEVER}


@pytest.mark.parametrize(("own", "given", "expected"), [(6, None, 6), (6, 4, 4), (6, 9, 6), (1, None, 1)])
def test_at_most_so_many_tokens(own: int, given: int | None, expected: int, tiny: PreTrainedModel) -> None:
    for mode in ("aware", "agnostic"):
        made = sample(turns=2, max_new_tokens=own)
        answers = answer_sample(tiny, UNENDING, Full(), made, mode=mode, max_new_tokens=given)
        assert answers.cost["new_tokens"] == 2 * expected


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
@pytest.mark.parametrize("name", METHODS)
def test_the_cost_is_the_caches_own_count(name: str, mode: str, tiny: PreTrainedModel) -> None:
    made = sample(max_new_tokens=8)
    watched = Watched(method_of(name))
    answers = answer_sample(tiny, UNENDING, watched, made, mode=mode)
    (cache,) = watched.caches  # a single turn is asked on the cache itself
    stats, cost = cache_stats(cache), answers.cost
    expected = {"kv_bytes": stats.total_bytes} | {
        f"{cost_name}_bytes": stats.total(f"{name}_bytes")  # type: ignore[arg-type]
        for cost_name, name in (
            ("index", "index"), ("full_kv", "full"), ("step", "step"), ("dense_step", "dense_step"),
            ("nominal_step", "nominal_step"), ("nominal_dense_step", "nominal_dense_step"),
        )
    }  # fmt: skip
    assert {key: cost[key] for key in expected} == expected  # type: ignore[literal-required]
    head = len(ids_of(made.context))
    assert watched.prompts == [head if mode == "agnostic" else cost["prompt_tokens"]]
    read = int(cost["prompt_tokens"]) + 8 - 1  # the last token is written and not read
    assert cost["full_kv_bytes"] == read * 2 * 2 * 2 * 16 * 4  # layers, heads, keys and values, channels, float32
    assert 0 < cost["step_seconds"] <= cost["step_seconds_p95"]
    # Methods may share a prefill, so that its time and the peaks of memory are of `latency` alone.
    times = {"step_seconds", "step_seconds_p95"}
    assert set(cost) == {*expected, *times, "prompt_tokens", "new_tokens"}


def stock(tiny: PreTrainedModel) -> tuple[Any, ...]:
    attention = tiny.config._attn_implementation, [type(layer.self_attn) for layer in tiny.model.layers]
    return type(tiny), tiny.forward.__func__, tiny.generate.__func__, dict(vars(tiny)), attention


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_as_it_was(name: str, fails: bool, tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stock(tiny)
    given = torch.tensor([ids_of(words(0, 60))])
    logits = tiny(given).logits
    if fails:

        def failing(*_: Any) -> None:
            raise MemoryError("no more")

        monkeypatch.setattr(DecodeLoop, "greedy", failing)
        with pytest.raises(MemoryError, match="no more"):
            answer_sample(tiny, UNENDING, method_of(name), sample())
    else:
        answer_sample(tiny, UNENDING, method_of(name), sample())
    assert stock(tiny) == before
    assert torch.equal(tiny(given).logits, logits)


def test_what_cannot_be_asked_is_refused(tiny: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="mode must be 'aware' or 'agnostic', got 'both'"):
        answer_sample(tiny, UNENDING, Full(), sample(), mode="both")
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template.*--no-chat"):
        answer_sample(tiny, PLAIN, Full(), sample(), chat=True)
    with pytest.raises(ValueError, match="at most the 4096 tokens that the model takes, got"):
        answer_sample(tiny, UNENDING, Full(), sample(length=4100))


def test_a_turn_without_a_right_answer_is_followed_by_the_question(
    tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, _ = spied(monkeypatch)
    answer_sample(tiny, UNENDING, Full(), sample(turns=2, answers=(), answer_prefix=""))
    assert prompts[1] == ids_of("\n\n\nquestion 1: what is the number?")


def test_a_sample_may_have_turns_of_its_own_length(tiny: PreTrainedModel) -> None:
    turns = tuple(Turn(question=f"\n{n}?", answers=("a",), max_new_tokens=n) for n in (1, 4))
    made = Sample(id="a", context=words(1, 50), turns=turns)
    assert answer_sample(tiny, UNENDING, Full(), made).cost["new_tokens"] == 5


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_caches_do_not_wait_for_the_garbage_collector(tiny: PreTrainedModel, mode: str) -> None:
    made = sample()
    live = []
    method = Watched(method_of("rocketkv"))
    gc.collect()
    gc.disable()
    try:
        answer_sample(tiny, UNENDING, method, made, mode=mode)
        live = [weakref.ref(cache.layers[0]) for cache in method.caches]
        method.caches.clear()
        assert [reference() for reference in live] == [None] * len(live)
        assert not [found for found in gc.get_objects() if issubclass(type(found), RocketKVLayer)]
    finally:
        gc.enable()
