"""The retention study: its documents and conversations, its table, and that a batch's figures are those of a loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rocketkv
from rocketkv.eval.intervals import paired_interval
from rocketkv.eval.methods import Compressed, Full, Method
from rocketkv.eval.prefill import read_prompt
from rocketkv.hf.cache import begin_prompt
from rocketkv.hf.models import CACHE_ARGUMENT
from studies import retention
from studies.fact_documents import document
from studies.retention import (
    ARMS,
    ScoreDict,
    Settings,
    Turn,
    batches,
    fitted,
    markdown,
    rows,
    scores,
    study,
    turns,
)
from tiny import SKETCH_SPLIT, SMALL, build, prompt

METHODS: dict[str, Method] = {
    "full": Full(),
    **{name: Compressed(rocketkv.RocketKVConfig(**SMALL, method=name)) for name in ("rocketkv", "rocketkv-mt")},
    "rocketkv-mt+": Compressed(rocketkv.RocketKVConfig(**{**SMALL, "split": SKETCH_SPLIT}, method="rocketkv-mt+")),
}


@pytest.mark.parametrize("facts", [1, 3, 8, 12])
@pytest.mark.parametrize("seed", range(3))
def test_a_document_holds_each_fact_once_and_no_other_number(seed: int, facts: int) -> None:
    made = document(seed, facts, 40)
    assert made == document(seed, facts, 40)
    assert made != document(seed + 3, facts, 40)
    assert sorted(re.findall(r"\d+", made.text)) == sorted(fact.number for fact in made.facts)
    assert len({fact.question for fact in made.facts}) == facts
    for fact in made.facts:
        assert made.text.count(fact.begin) == made.text.count(f"{fact.sentence}.") == 1
        assert len(set(fact.number)) == 7
        assert "0" not in fact.number
    assert made.text.endswith(".")
    assert ".." not in made.text
    # Spread evenly: a fact in every part of the text.
    lines = made.text.removesuffix(".").split(". ")
    assert len(lines) == 40 + facts
    at = [number for number, line in enumerate(lines) if re.search(r"\d", line)]
    assert [place * facts // len(lines) for place in at] == list(range(facts))


def test_the_order_of_the_questions_is_not_that_of_the_facts() -> None:
    orders = set()
    for seed in range(10):
        made = document(seed, 4, 20)
        depths = [made.text.index(fact.number) for fact in made.facts]
        orders.add(tuple(sorted(range(4), key=depths.__getitem__)))
    assert len(orders) > 5


@pytest.mark.parametrize(("facts", "sentences"), [(0, 20), (13, 20), (5, 4)])
def test_an_impossible_number_of_facts_is_refused(facts: int, sentences: int) -> None:
    with pytest.raises(ValueError, match=f"facts must be from 1 to {min(12, sentences)}.*got {facts}"):
        document(0, facts, sentences)


def test_a_conversation_in_the_chat_template(smollm2_tokenizer: Any) -> None:
    made = fitted(smollm2_tokenizer, 0, 3, 400)
    talk = turns(smollm2_tokenizer, made)
    assert 380 < len(talk[0].given) <= 400
    with pytest.raises(ValueError, match=r"tokens must leave room for 3 facts.*got 50"):
        fitted(smollm2_tokenizer, 0, 3, 50)
    text = ""
    for fact, turn in zip(made.facts, talk, strict=True):
        text += smollm2_tokenizer.decode([*turn.given, *turn.answer])
        assert text.endswith(f"{fact.question}<|im_end|>\n<|im_start|>assistant\n{fact.begin} {fact.number}")
        digits = [token for token, counts in zip(turn.answer, turn.counted, strict=True) if counts]
        assert smollm2_tokenizer.decode(digits) == fact.number
    # What the turns give, one after the other, is the conversation as the template writes it.
    messages = []
    for number, fact in enumerate(made.facts):
        context = f"{retention._HEAD}{made.text}\n\n" if not number else ""
        messages.append({"role": "user", "content": context + fact.question})
        messages.append({"role": "assistant", "content": f"{fact.sentence}."})
    whole = smollm2_tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(text)
    assert smollm2_tokenizer(text, add_special_tokens=False).input_ids == [
        token for turn in talk for token in (*turn.given, *turn.answer)
    ]


def talk(row: int) -> list[Turn]:
    """Return a made-up conversation of three turns, whose prompts are of different lengths in every row."""
    lengths = ((100 + 9 * row, 3), (10 + row, 4), (21 - 2 * row, 3))
    made = []
    for number, (given, answer) in enumerate(lengths):
        ids = prompt(given + answer, seed=10 * row + number + 1)[0].tolist()
        made.append(Turn(ids[:given], ids[given:], [bool(i) for i in range(answer)]))
    return made


def loop(model: Any, method: Method, conversation: list[Turn]) -> ScoreDict:
    """Hold one conversation in the plainest of ways."""
    found: ScoreDict = {"nll": [], "right": []}
    with method.attached(model), torch.inference_mode():
        cache: Any = method.new_cache(model, None)
        unread: list[int] = []
        for turn in conversation:
            logits = []
            unread += turn.given
            begin_prompt(cache, cache.get_seq_length() + len(unread))
            for token in turn.answer:
                out = model(torch.tensor([unread]), **{CACHE_ARGUMENT: cache}).logits[0, -1]
                logits.append(out.log_softmax(-1))
                unread = [token]
            pairs = list(zip(logits, turn.answer, strict=True))[1:]  # the first of an answer does not count here
            found["nll"].append(sum(-float(row[token]) for row, token in pairs) / len(pairs))
            found["right"].append(all(int(row.argmax()) == token for row, token in pairs))
    return found


@pytest.mark.integration
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_conversations_is_each_in_a_loop(method: str) -> None:
    model = build()
    talks = [talk(row) for row in range(3)]
    head = read_prompt(model, [each[0].given for each in talks])
    found = scores(model, METHODS[method], head, talks)
    for score, each in zip(found, talks, strict=True):
        expected = loop(model, METHODS[method], each)
        assert score["nll"] == pytest.approx(expected["nll"], abs=1e-4)
        assert score["right"] == expected["right"]
    # The head is as it was: every arm starts from it.
    again = scores(model, METHODS[method], head, talks)
    assert again == found


def test_right_is_when_every_digit_is_the_most_likely() -> None:
    model = build()
    (score,) = scores(model, Full(), read_prompt(model, [talk(0)[0].given]), [talk(0)])
    assert score["right"] == [False] * 3
    conversation = [talk(0)[0]]
    ids = torch.tensor([conversation[0].given])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)[0, -3:]
    told = [Turn(conversation[0].given, written.tolist(), [True] * 3)]
    (score,) = scores(model, Full(), read_prompt(model, [told[0].given]), [told])
    assert score["right"] == [True]


def test_conversations_with_answers_of_one_length_go_together() -> None:
    def of(*lengths: int) -> list[Turn]:
        return [Turn([1], [2] * length, [True] * length) for length in lengths]

    talks = [of(3, 3), of(3, 4), of(3, 3), of(3, 3), of(3, 4), of(3, 3)]
    assert batches(talks, 2) == [[0, 2], [1, 4], [3, 5]]
    assert batches(talks, 1) == [[number] for number in range(6)]
    assert batches(talks, 9) == [[0, 2, 3, 5], [1, 4]]


FOUND: dict[str, list[ScoreDict]] = {
    "full": [{"nll": [0.1, 0.2, 0.3, 0.5], "right": [True] * 4}, {"nll": [0.3, 0.4, 0.5, 0.3], "right": [True] * 4}],
    "rocketkv": [
        {"nll": [0.1, 1.2, 1.3, 1.5], "right": [True, False, False, False]},
        {"nll": [0.3, 1.0, 2.5, 1.5], "right": [True, True, False, True]},
    ],
    "rocketkv-mt": [
        {"nll": [0.1, 0.3, 0.3, 0.5], "right": [True, True, True, False]},
        {"nll": [0.3, 0.4, 0.6, 0.4], "right": [True] * 4},
    ],
}


def test_the_table_pairs_documents() -> None:
    table = rows(FOUND)
    assert [row["turns"] for row in table] == [[1, 1], [2, 2], [3, 3], [4, 4], [3, 4]]
    third, last = table[2], table[-1]
    assert third["arms"]["rocketkv"]["nll"] == pytest.approx(1.9)
    assert third["arms"]["rocketkv"]["right"] == 0
    assert list(third["differences"]) == ["rocketkv - full", "rocketkv-mt - full", "rocketkv-mt - rocketkv"]
    difference = third["differences"]["rocketkv-mt - rocketkv"]
    assert difference["mean"] == pytest.approx(-1.45)
    assert difference["interval"] == pytest.approx(paired_interval([0.3, 0.6], [1.3, 2.5]))
    # Both late turns of a document are one value: documents are what is sampled.
    assert last["arms"]["full"]["nll"] == pytest.approx(0.4)
    assert last["differences"]["rocketkv-mt - full"]["interval"] == pytest.approx(
        paired_interval([0.4, 0.5], [0.4, 0.4])
    )
    assert (last["arms"]["rocketkv-mt"]["right"], last["arms"]["rocketkv-mt"]["asked"]) == (3, 4)
    assert [row["turns"] for row in rows({"full": [{"nll": [0.1, 0.2], "right": [True, True]}]})] == [[1, 1], [2, 2]]
    for wrong in ({}, {"full": []}, {"full": FOUND["full"], "rocketkv": FOUND["rocketkv"][:1]}):
        with pytest.raises(ValueError, match="every arm must have the same documents"):
            rows(wrong)


def test_the_table_in_markdown() -> None:
    lines = markdown({"table": rows(FOUND)}).splitlines()
    widths = {line.count("|") for line in lines}
    assert widths == {11}
    assert lines[0].startswith("| turn | full | rocketkv | rocketkv-mt | rocketkv - full |")
    assert lines[4].startswith("| 3 | 0.400 | 1.900 | 0.450 | +1.500 (+1.000 to +2.000) |")
    assert lines[4].endswith("| 2/2 (0.34-1.00) | 0/2 (0.00-0.66) | 2/2 (0.34-1.00) |")
    assert lines[-1].startswith("| 3-4 | 0.400 |")
    assert lines[-1].endswith("| 4/4 | 1/4 | 3/4 |")
    alone = markdown({"table": rows({name: samples[:1] for name, samples in FOUND.items()})})
    assert "| +1.000 |" in alone  # a single document shows no spread


def test_a_study_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    talks = iter(range(3))
    monkeypatch.setattr(retention, "fitted", lambda *given: next(talks))
    monkeypatch.setattr(retention, "turns", lambda tokenizer, row: talk(row))
    monkeypatch.setattr(retention, "find_method", lambda name, budget, fields: METHODS[name])
    held: list[tuple[str, int]] = []
    hold = retention.scores

    def counted(model: Any, method: Method, head: Any, group: list[list[Turn]]) -> list[ScoreDict]:
        if len(held) == len(ARMS):
            raise KeyboardInterrupt
        held.append((method.name, len(group)))
        return hold(model, method, head, group)

    monkeypatch.setattr(retention, "scores", counted)
    settings = Settings(documents=3, batch=2)
    with pytest.raises(KeyboardInterrupt):
        study(model, None, settings, tmp_path)  # type: ignore[arg-type]
    assert held == [(arm, 2) for arm in ARMS]
    held.clear()
    talks = iter(range(3))
    result = study(model, None, settings, tmp_path)  # type: ignore[arg-type]
    assert held == [(arm, 1) for arm in ARMS]
    assert result["prompt_tokens"] == [100, 109, 118]
    head = read_prompt(model, [talk(2)[0].given])
    for arm in ARMS:
        assert len(result["documents"][arm]) == 3
        assert result["documents"][arm][2] == hold(model, METHODS[arm], head, [talk(2)])[0]
