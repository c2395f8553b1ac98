"""Stacked instructions: every drawn set of rules can be kept, each rule counts its share, prompts fill their length."""

import json
import random
from typing import Any

import pytest

from rocketkv.eval.tasks.base import Preparation, Turn
from rocketkv.eval.tasks.instructions import RULES, TASKS, keeps
from rocketkv.eval.tasks.length import sample_tokens
from words import Words

(TASK,) = TASKS
FAMILIES = {
    "lower_case",
    "no_commas",
    "first_word",
    "last_word",
    "keyword",
    "word_range",
    "bullet_lines",
    "double_quotes",
    "number",
    "exclamation",
}


def prepare(count: int = 1, *, length: int = 1024, seed: int = 0, tokenizer: Any = None) -> Preparation:
    return Preparation(tokenizer=tokenizer or Words(), length=length, count=count, seed=seed)


def answer(rules: list[dict[str, Any]], broken: str = "") -> str:
    """Write an answer that keeps all rules but the one that is named."""
    by_name = {rule["rule"]: rule for rule in rules}

    def kept(name: str) -> bool:
        return name in by_name and name != broken

    words = ["Hello," if "no_commas" not in by_name or broken == "no_commas" else "Hello"]
    words += ["the", "old", "house"]
    if kept("keyword"):
        words += [by_name["keyword"]["word"]] * 2
    if kept("number"):
        words.append(str(by_name["number"]["number"]))
    if kept("exclamation"):
        words.append("yes!")
    lines = by_name.get("bullet_lines", {"count": 0})["count"] + (broken == "bullet_lines")
    body = "".join(f"\n- point {'abcde'[number]}" for number in range(lines))
    while broken != "word_range" and len(" ".join(words).split()) + 2 * lines < 38:
        words.append("filler")
    text = " ".join(words) + body + "\nclosing words"
    if "lower_case" in by_name and broken != "lower_case":
        text = text.lower()
    if kept("first_word"):
        text = f"{by_name['first_word']['word']} {text}"
    if kept("last_word"):
        text = f"{text} {by_name['last_word']['word']}."
    return f'"{text}"' if kept("double_quotes") else text


def test_an_ideal_answer_gets_100_and_each_broken_rule_costs_its_share() -> None:
    drawn = set()
    for seed in range(60):
        for sample in TASK.samples(prepare(5, length=600, seed=seed)):
            (turn,) = sample.turns
            rules = turn.extra["rules"]
            names = [rule["rule"] for rule in rules]
            drawn.add(tuple(sorted(names)))
            assert len(set(names)) == RULES == 6
            assert set(names) <= FAMILIES
            assert TASK.score(answer(rules), turn) == 100
            for name in names:
                assert TASK.score(answer(rules, broken=name), turn) == pytest.approx(500 / 6), name
    assert len(drawn) > 100  # of 210
    assert set().union(*drawn) == FAMILIES


@pytest.mark.parametrize("nothing", ["", " \n\t", "...", '""', "- \n- \n- "])
def test_an_answer_without_a_word_keeps_no_rule(nothing: str) -> None:
    for sample in TASK.samples(prepare(5)):
        assert TASK.score(nothing, sample.turns[0]) == 0


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"rule": "lower_case"}, "all small, é too 5", "all Small"),
        ({"rule": "no_commas"}, "one; two", "one, two"),
        ({"rule": "first_word", "word": "velvet"}, '"- Velvet, it was', "velvety it was"),
        ({"rule": "last_word", "word": "velvet"}, 'it was VELVET."', "velvet it was"),
        ({"rule": "keyword", "word": "velvet"}, "Velvet and velvet.", "velvet velvet velvet"),
        ({"rule": "keyword", "word": "velvet"}, "velvet velvets velvet", "velvet velvets"),
        ({"rule": "word_range", "least": 2, "most": 3}, "- one\n- two", "one"),
        ({"rule": "word_range", "least": 2, "most": 3}, "one two three", "one two three four"),
        ({"rule": "bullet_lines", "count": 2}, '"- a\n  - b"', "- a\n- b\n- c"),
        ({"rule": "bullet_lines", "count": 2}, "so:\n- a\n- b\nend", "-a\n-b"),
        ({"rule": "double_quotes"}, ' "yes"\n', '"yes" he said'),
        ({"rule": "double_quotes"}, '"a" and "b"', "'yes'"),
        ({"rule": "number", "number": 47}, "the 47th? no: 47.", "147 and 470"),
        ({"rule": "exclamation"}, "oh! well", "oh!!"),
    ],
)
def test_a_rule_is_kept_or_broken(rule: dict[str, Any], good: str, bad: str) -> None:
    assert keeps(good, rule)
    assert not keeps(bad, rule)


def test_the_score_is_the_share_of_the_rules() -> None:
    rules = [{"rule": "lower_case"}, {"rule": "no_commas"}, {"rule": "exclamation"}]
    turn = Turn(question="", answers=(), max_new_tokens=1, extra={"rules": rules})
    assert TASK.score("Well, no", turn) == 0
    assert TASK.score("well, no", turn) == pytest.approx(100 / 3)
    assert TASK.score("well no!", turn) == 100


def test_samples_are_decided_by_seed_and_index_alone() -> None:
    first = TASK.samples(prepare(3))
    random.seed(7)
    state = random.getstate()
    assert TASK.samples(prepare(6))[:3] == first
    assert random.getstate() == state
    assert TASK.samples(prepare(3, seed=1))[0] != first[0]
    assert len({sample.context for sample in first}) == len({sample.id for sample in first}) == 3


@pytest.mark.parametrize("length", [600, 1024, 5000])
def test_prompt_and_answer_fill_the_length(length: int) -> None:
    prepared = prepare(3, length=length)
    for sample in TASK.samples(prepared):
        room = length - sample.turns[0].max_new_tokens
        # 2 % may be left, or a sentence: the longest has 16 words
        assert min(0.98 * room, room - 16) <= sample_tokens(prepared, sample) <= room


def test_rules_lie_from_the_top_to_the_end() -> None:
    (sample,) = TASK.samples(prepare(length=4096))
    notes = sample.notes["rules"]
    assert [rule["rule"] for rule in notes] == [rule["rule"] for rule in sample.turns[0].extra["rules"]]
    assert [rule["depth"] for rule in notes] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1], abs=0.01)
    pieces = sample.context.split("\n\n")[1].split("Standing rule: ")
    before = [len(piece.split()) for piece in pieces]
    assert before[0] == 0  # the first rule opens the notes
    assert max(before[1:-1]) < 1.2 * min(before[1:-1])  # as much prose after each
    assert before[-1] < 20  # and none after the last
    for rule in sample.turns[0].extra["rules"]:
        for value in list(rule.values())[1:]:
            assert str(value) in sample.context
            assert str(value) not in sample.turns[0].question


def test_samples_are_of_json_types() -> None:
    (sample,) = TASK.samples(prepare())
    assert json.loads(json.dumps(sample.turns[0].extra)) == sample.turns[0].extra
    assert json.loads(json.dumps(sample.notes)) == sample.notes


@pytest.mark.parametrize("length", [100, 256, 400])
def test_a_length_without_room_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"length must .* got {length}"):
        TASK.samples(prepare(length=length))


def test_a_length_is_needed() -> None:
    with pytest.raises(ValueError, match="length must be a number of tokens"):
        TASK.samples(Preparation(tokenizer=prepare().tokenizer, length=None, count=1))
