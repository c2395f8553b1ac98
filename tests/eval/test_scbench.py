"""SCBench: scores as the official program gives them, and samples of several turns that fit the model's length."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rocketkv.eval.tasks import metrics
from rocketkv.eval.tasks.base import Preparation, Sample, Task
from rocketkv.eval.tasks.length import sample_tokens
from rocketkv.eval.tasks.scbench import TASKS
from rocketkv.hf.prompts import follow_up

BY_NAME = {task.name: task for task in TASKS}
LETTERS = ("the red house", "B")


class Pieces:
    """A tokenizer whose tokens are words with the white space before them; it has a chat template."""

    chat_template = "there is one"

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def get_added_vocab(self) -> Mapping[str, int]:
        return {}

    def __call__(self, text: str, *, add_special_tokens: bool = True, truncation: bool = False) -> Mapping[str, Any]:
        found = re.findall(r"\s*\S+|\s+$", text)
        self.pieces += [piece for piece in dict.fromkeys(found) if piece not in self.pieces]
        return {"input_ids": [self.pieces.index(piece) for piece in found]}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(self.pieces[each] for each in ids)

    def apply_chat_template(
        self, talk: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **_: Any
    ) -> str:
        return "".join(f"<{part['role']}> {part['content']} </>" for part in talk) + "<assistant>"


def prepare(
    folder: Path, count: int = 9, *, max_length: int = 8192, length: int | None = None, chat: bool = False
) -> Preparation:
    tokenizer: Any = Pieces()
    return Preparation(
        tokenizer=tokenizer, length=length, count=count, data_dir=folder, chat=chat, max_length=max_length
    )


def write(folder: Path, task: Task, *rows: dict[str, Any]) -> None:
    (folder / f"{task.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def record(answers: Sequence[Any] = ("one", "two"), context: str = "some context", **turn: Any) -> dict[str, Any]:
    turns = [{"input": f"question {number}?", "answer": answer, **turn} for number, answer in enumerate(answers)]
    return {"id": 7, "context": context, "multi_turns": turns}


def only(task: Task, prepared: Preparation) -> Sample:
    (sample,) = task.samples(prepared)
    return sample


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the value is 7f-9.", ["7f-9"], 100),
        ("\n\n7f-9", ["7f-9"], 100),
        ("x7f-90", ["7f-9"], 100),  # inside longer words too
        ("7F-9", ["7f-9"], 0),  # case counts
        ("7f- 9", ["7f-9"], 0),
        ("", ["7f-9"], 0),
        ("?!...", ["7f-9"], 0),
    ],
)
def test_contains(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.contains(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("it was mrs. dalloway, i think", ["Mrs. Dalloway"], 100),
        ("\n SAINT-EX", ["saint-ex"], 100),
        ("the second", ["first", "second"], 100),
        ("(B) and more", ["(B)"], 100),
        ("(C)", ["(B)"], 0),  # the brackets alone are nothing
        ("Mrs Dalloway", ["Mrs. Dalloway"], 0),  # punctuation counts
        ("", ["a"], 0),
        (".,!", ["a"], 0),
    ],
)
def test_contains_any(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.contains_any(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("ABC, DEF and GHI", ["ABC", "DEF", "GHI"], 100),
        ("\nabc", ["ABC", "DEF"], 50),
        ("ABC", ["ABC", "DEF", "GHI"], 33),  # rounded to per cents
        ("ABC DEF", ["ABC", "DEF", "GHI"], 67),
        ("xABCx", ["ABC"], 100),
        ("A B C", ["ABC"], 0),
        ("", ["ABC"], 0),
        ("...", ["ABC"], 0),
    ],
)
def test_share_contained(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.share_contained(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("B", 100),
        ("\n B. because of A", 100),
        ("A, not B", 0),
        ("Because of the colour", 100),  # its first letter is a B
        ("Certainly: B", 0),  # its first letter is a C
        ("the red house", 100),
        ("the red house.", 0),  # neither all of it nor behind a lead
        ("so the answer is: B", 100),
        ("so the answer is B", 100),
        ("so the answer is:B", 0),  # the character after the lead is passed over
        ("so the answer is  the red house", 100),
        ("so the answer is 'B'", 100),  # the quote becomes a space, and two spaces one, which is passed over
        ("my answer: A or B", 0),
        ("the option is B", 100),
        ("the answer is", 0),
        ("I would say B or A", 100),
        ("I would say A or B", 0),
        ("I would say AB then B", 0),  # a part of ABCD, and not the letter
        ("neither", 0),
        ("", 0),
        (" \n", 0),
        ("?!.,", 0),
    ],
)
def test_choice(prediction: str, score: float) -> None:
    assert metrics.choice(prediction, LETTERS) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        (" 42 is the largest, not 43", ["42"], 100),
        ("\n\n42.9", ["42"], 100),  # cut to a whole number
        ("it is -42", ["42"], 100),  # the sign is no part of a number
        ("-42", ["-42"], 0),
        ("4.5", ["4.5"], 100),
        ("4.50", ["4.5"], 100),
        ("4", ["4.5"], 0),
        ("4", ["4.0"], 100),
        ("4,500", ["4500"], 0),
        ("1 42", ["42"], 0),
        ("9" * 400, ["9"], 0),  # beyond all floats
        ("", ["42"], 0),
        ("...", ["42"], 0),
    ],
)
def test_first_number(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.first_number(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("The pass key is 71432. Remember 71433.", ["71432"], 100),
        ("\n71432", ["71432"], 100),
        ("a71432b", ["71432"], 100),
        ("1 71432", ["71432"], 0),
        ("71,432", ["71432"], 0),
        ("071432", ["71432"], 0),
        ("\u0667", ["7"], 0),  # an Arabic seven
        ("", ["71432"], 0),
        ("?", ["71432"], 0),
    ],
)
def test_first_digits(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.first_digits(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the cat sat", ["the cat sat"], 100),
        ("The CAT sat!", ["the cat, sat."], 100),  # lower case, letters and digits only
        # Of 3 words in the prediction, all are in the answer, which has 6: 2 * 1 * 0.5 / 1.5.
        ("the cat sat", ["the cat sat on the mat"], 100 * 2 / 3),
        # One sentence on each side: the longest common subsequence is two words of three.
        ("sat cat the", ["the cat the"], 100 * 2 / 3),
        # By lines: both are found, in whatever order.
        ("b b\na a", ["a a\nb b"], 100),
        ("b b a a", ["a a b b"], 50),
        ("runs", ["running"], 0),  # no stemming
        ("cat", ["dog", "cat"], 100),  # the best of several
        ("\ncat", ["cat"], 100),
        ("", ["cat"], 0),
        ("?!", ["cat"], 0),
    ],
)
def test_rouge_lsum(prediction: str, answers: list[str], score: float) -> None:
    assert metrics.rouge_lsum(prediction, answers) == pytest.approx(score)


def test_rouge_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"rocketkv\[eval\]"):
        metrics.rouge_lsum("a", ["a"])


# One record a task: its answers, what else its turns have, and a right and a wrong prediction for its first turn.
CASES: dict[str, tuple[list[Any], dict[str, Any], str, str, int]] = {
    "scbench_kv": (["ab-1", "cd-2"], {}, "it is ab-1", "cd-2", 150),
    "scbench_prefix_suffix": (["abxyz", "cdxyz"], {}, "abxyz", "ABXYZ", 150),
    "scbench_vt": ([["X1", "X2"], ["Y1", "Y2"]], {}, "x1 x2", "y1 y2", 30),
    "scbench_qa_eng": (["Emma", "Paris"], {}, "emma", "Paris", 40),
    "scbench_choice_eng": (["blue", "red"], {"options": ["red", "green", "blue", "white"]}, "C", "A", 40),
    "scbench_mf": ([31, 4.5], {"input": "You should answer. The largest number of the list is"}, "31", "13", 5),
    "scbench_many_shot": (["(B)", "(C)"], {}, "(B)", "(C)", 10),
    "scbench_summary": (["a story", "a poem"], {}, "A story.", "nothing", 200),
    "scbench_summary_with_needles": (["71432", "9"], {"task": "scbench_passkey"}, "71432", "9", 15),
}


def test_every_task_has_a_case() -> None:
    assert set(CASES) == set(BY_NAME)
    assert {task.group for task in TASKS} == {"scbench"}
    assert not any(task.sized or task.chat is not None for task in TASKS)


@pytest.mark.parametrize("name", CASES)
def test_a_record_becomes_a_sample_of_several_turns(tmp_path: Path, name: str) -> None:
    task, (answers, turn, right, wrong, new_tokens) = BY_NAME[name], CASES[name]
    write(tmp_path, task, record(answers, **turn), record(answers, **turn))
    samples = task.samples(prepare(tmp_path))
    assert [sample.id for sample in samples] == ["0", "1"]
    first, second = samples[0].turns
    assert first.max_new_tokens == second.max_new_tokens == new_tokens
    assert task.score(right, first) == 100
    assert task.score(wrong, first) == 0
    assert task.score("", first) == 0
    assert [turn.extra["given_back"] for turn in samples[0].turns] == [str(answer) for answer in answers]
    asked = turn.get("input", "question 0?")
    assert asked in first.question
    assert asked not in samples[0].context
    assert "some context" in samples[0].context
    assert "some context" not in first.question
    plain = (
        "scbench_vt",
        "scbench_prefix_suffix",
        "scbench_many_shot",
        "scbench_summary",
        "scbench_summary_with_needles",
    )
    assert samples[0].notes["template"] == ("official" if name in plain else "ours")
    assert samples[0].notes["tokens_cut"] == 0
    assert json.loads(json.dumps(dict(first.extra))) == first.extra
    for option in turn.get("options", ()):
        assert option in first.question
        assert option in second.question
    assert task.samples(prepare(tmp_path, 1))[0] in samples


def test_at_most_five_turns_are_asked(tmp_path: Path) -> None:
    task = BY_NAME["scbench_kv"]
    write(tmp_path, task, record([str(number) for number in range(8)]))
    assert [turn.answers for turn in only(task, prepare(tmp_path)).turns] == [(str(number),) for number in range(5)]


def test_both_kinds_of_turns_with_needles(tmp_path: Path) -> None:
    task = BY_NAME["scbench_summary_with_needles"]
    row = record(["a story about a dog", "71432"], task="scbench_summary")
    row["multi_turns"][1]["task"] = "scbench_passkey"
    write(tmp_path, task, row)
    summary, needle = only(task, prepare(tmp_path)).turns
    assert (summary.max_new_tokens, needle.max_new_tokens) == (800, 15)
    assert task.score("a story", summary) == pytest.approx(100 * 4 / 7)  # precision 1, recall 2/5
    assert task.score("it is 71432", needle) == 100


# In the form of SCBench's eval_utils.py.
THEIRS = """
import nowhere  # the file is read and not run
multiturn_templates = {
    "scbench_kv": "Look: {context} Find: {input}",
    "scbench_choice_eng": "{context} | {question} | {OPTION_A} {OPTION_B} {OPTION_C} {OPTION_D}",
    "scbench_mf": "{prefix}\\n\\n{context}\\n\\n{input}",
    "scbench_summary": "{context}\\n\\n{input}",
}
multiturn_follow_up_templates = {
    "scbench_kv": "{pre_ans}\\n\\nNext: {input}",
    "scbench_choice_eng": "{pre_ans}\\n\\n{question} {OPTION_D}",
    "scbench_mf": "{pre_ans}\\n\\n{prefix}\\n\\n{input}",
    "scbench_summary": "{pre_ans}\\n\\n{input}",
}
multiturn_follow_up_templates_in_chat_tempate = {
    "scbench_kv": "Then: {input}",
    "scbench_choice_eng": "{question} {OPTION_A}",
    "scbench_mf": "{prefix}\\n\\n{input}",
    "scbench_summary": "{input}",
}
"""


def test_templates_of_the_user_are_read(tmp_path: Path) -> None:
    (tmp_path / "eval_utils.py").write_text(THEIRS, encoding="utf-8")
    kv, choice = BY_NAME["scbench_kv"], BY_NAME["scbench_choice_eng"]
    write(tmp_path, kv, record(context="{input} {nothing}"))  # braces in the data are no fields
    sample = only(kv, prepare(tmp_path))
    assert sample.context == "Look: {input} {nothing}"
    assert [turn.question for turn in sample.turns] == [" Find: question 0?", "Next: question 1?"]
    assert sample.notes["template"] == "user's"
    assert only(kv, prepare(tmp_path, chat=True)).turns[1].question == "Then: question 1?"
    write(tmp_path, choice, record(["c", "a"], options=["a", "b", "c", "d"]))
    first, second = only(choice, prepare(tmp_path)).turns
    assert (first.question, second.question) == (" | question 0? | a b c d", "question 1? d")
    assert first.answers == ("c", "C")


def test_official_templates_are_known(tmp_path: Path) -> None:
    (tmp_path / "eval_utils.py").write_text(THEIRS, encoding="utf-8")
    task = BY_NAME["scbench_mf"]
    write(tmp_path, task, record([9, 2], input="Find it! The 2nd Largest number is"))
    sample = only(task, prepare(tmp_path))
    assert sample.notes["template"] == "official"
    assert sample.context == "What is the 2nd largest number?\n\nsome context"
    assert sample.turns[0].question == "\n\nFind it! The 2nd Largest number is"
    assert sample.turns[1].question == "What is the 2nd largest number?\n\nFind it! The 2nd Largest number is"


def test_later_summaries_begin_officially_in_a_chat_template(tmp_path: Path) -> None:
    task = BY_NAME["scbench_summary"]
    write(tmp_path, task, record())
    assert [turn.answer_prefix for turn in only(task, prepare(tmp_path, chat=True)).turns] == ["", "This paper"]
    assert [turn.answer_prefix for turn in only(task, prepare(tmp_path)).turns] == ["", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must hold the dictionaries multiturn_templates"),
        (THEIRS.replace("scbench_kv", "scbench_no"), "with a template of scbench_kv"),
        (THEIRS.replace("{context} Find", "Find"), r"\{context\} once"),
        (THEIRS.replace("{pre_ans}", "{answer}"), r"\{pre_ans\} and an empty line"),
        (THEIRS.replace("Find: {input}", "{other}"), r"no field \{other\}"),
        ("not python", "must hold the dictionaries"),
    ],
)
def test_other_templates_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "eval_utils.py").write_text(text, encoding="utf-8")
    write(tmp_path, BY_NAME["scbench_kv"], record())
    with pytest.raises(ValueError, match=message):
        BY_NAME["scbench_kv"].samples(prepare(tmp_path))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("length", [None, 600])
def test_a_long_context_is_cut_in_its_middle_so_that_all_turns_fit(
    tmp_path: Path, chat: bool, length: int | None
) -> None:
    task = BY_NAME["scbench_qa_eng"]
    answers = ["yes", "long " * 90, "no"]
    write(tmp_path, task, record(answers, context=" ".join(f"w{number}" for number in range(3000))))
    prepared = prepare(tmp_path, max_length=800, length=length, chat=chat)
    sample = only(task, prepared)
    tokenizer = prepared.tokenizer
    later = [follow_up(tokenizer, turn.question, chat=chat) for turn in sample.turns[1:]]
    after = 40 + 90 + 40 + sum(len(tokenizer(text)["input_ids"]) for text in later)  # the second answer is given back
    room = (length or 800) - after
    assert room - 3 <= sample_tokens(prepared, sample) <= room
    assert sample.notes["tokens_cut"] > 2000
    assert sample.turns[0].question == "\n\nQuestion: question 0?\nAnswer:"
    kept = [int(word[1:]) for word in sample.context.split() if re.fullmatch(r"w\d+", word)]
    assert kept[0] == 0
    assert kept[-1] == 2999
    gap = max(range(1, len(kept)), key=lambda place: kept[place] - kept[place - 1])
    assert kept[:gap] == list(range(gap))
    assert kept[gap:] == list(range(3000 - len(kept) + gap, 3000))
    place = sample.context.split().index(f"w{gap - 1}") + 1
    assert place == sample.notes["tokens_kept"] // 2  # the middle of the prompt, not of the context


def test_no_room_for_the_turns_is_refused(tmp_path: Path) -> None:
    write(tmp_path, BY_NAME["scbench_kv"], record(context="word " * 400))
    with pytest.raises(ValueError, match="more room"):
        BY_NAME["scbench_kv"].samples(prepare(tmp_path, max_length=300))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("scbench_kv", {"context": "c"}, "'multi_turns'"),
        ("scbench_kv", {"multi_turns": [{"input": "q", "answer": "a"}]}, "'input'"),
        ("scbench_kv", record([]), "not enough values"),
        ("scbench_kv", {"context": "c", "multi_turns": [{"input": "q"}]}, "'answer'"),
        ("scbench_vt", record([[]]), "no answer"),
        ("scbench_choice_eng", record(["e"], options=["a", "b", "c", "d"]), "'e' is not in list"),
        ("scbench_choice_eng", record(["a"]), "'options'"),
        ("scbench_summary_with_needles", record(["a"]), "'task'"),
        ("scbench_summary_with_needles", record(["a"], task="scbench_kv"), "'scbench_kv'"),
    ],
)
def test_data_of_another_form_are_refused(tmp_path: Path, name: str, row: dict[str, Any], message: str) -> None:
    write(tmp_path, BY_NAME[name], row)
    with pytest.raises(ValueError, match=rf"row 1 of {name} is not of SCBench's form \(.*{message}"):
        BY_NAME[name].samples(prepare(tmp_path))


def test_questions_of_mf_must_name_a_number(tmp_path: Path) -> None:
    (tmp_path / "eval_utils.py").write_text(THEIRS, encoding="utf-8")
    write(tmp_path, BY_NAME["scbench_mf"], record([9], input="Which one?"))
    with pytest.raises(ValueError, match="row 1 of scbench_mf is not of SCBench's form"):
        BY_NAME["scbench_mf"].samples(prepare(tmp_path))


def test_data_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"scbench_vt\.jsonl"):
        BY_NAME["scbench_vt"].samples(prepare(tmp_path))


def test_the_context_may_be_called_input(tmp_path: Path) -> None:
    row = record()
    row["input"] = row.pop("context")
    write(tmp_path, BY_NAME["scbench_many_shot"], row)
    assert only(BY_NAME["scbench_many_shot"], prepare(tmp_path)).context == "some context"
