"""LongBench v1 and v2: official templates and numbers, cuts in the middle, where a prompt is split, where data lie."""

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rocketkv.eval.tasks import longbench, longbench_v2, sources
from rocketkv.eval.tasks.base import Preparation, Sample, Task, Turn
from rocketkv.eval.tasks.length import truncate
from rocketkv.hf.prompts import encode, render, truncate_middle

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden", "longbench_prompts.json").read_text(encoding="utf-8"))
TASKS = {task.name: task for task in longbench.TASKS}
V2 = longbench_v2.TASKS[0]
DOCUMENT = " ".join(f"word{number}" for number in range(400))
QUESTION = "Who came second, and why?"
ROW = {
    "_id": "a1",
    "context": DOCUMENT,
    "input": QUESTION,
    "answers": ["Ann", "Anna"],
    "all_classes": ["x", "y"],
    "length": 400,
    "dataset": "made",
}
ROW_V2 = {
    "_id": "b1",
    "context": f"\n{DOCUMENT}\n",
    "question": " Which word is third? ",
    "choice_A": "word1",
    "choice_B": "word2 ",
    "choice_C": "$C_A$",
    "choice_D": "none",
    "answer": "B",
    "difficulty": "easy",
    "length": "short",
    "domain": "made",
    "sub_domain": "words",
}
USERS = "Read $DOC$ and say: $Q$ A $C_A$ B $C_B$ C $C_C$ D $C_D$"


class Words:
    """A tokenizer of words with the white space before them; the first token is special."""

    chat_template = "made"

    def __init__(self) -> None:
        self.known = ["<s>"]

    def pieces(self, text: str) -> list[str]:
        return re.findall(r"\s*\S+|\s+$", text)

    def __call__(self, text: str, *, truncation: bool = False, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not truncation
        pieces = self.pieces(text)
        self.known += [piece for piece in dict.fromkeys(pieces) if piece not in self.known]
        return {"input_ids": [0] * add_special_tokens + [self.known.index(piece) for piece in pieces]}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(self.known[number] for number in ids if number)

    def apply_chat_template(
        self, talk: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **_: Any
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<s> user {talk[0]['content']} end assistant"


class Tidying(Words):
    """Leaves one space of several when it decodes."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return re.sub(r"\s+", " ", super().decode(ids, skip_special_tokens=skip_special_tokens))


class Spelling(Words):
    """Spells words that it does not know: those that arise where halves meet."""

    def pieces(self, text: str) -> list[str]:
        return [
            piece
            for word in re.findall(r"\w+|\s", text)
            for piece in ([word] if re.fullmatch(r"\s|word\d{1,3}|[A-Za-z]+", word) else word)
        ]


def byte_level(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it loses nothing, and cuts characters not in the text into bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = "User: {{ messages[0]['content'] }}\nAssistant:"
    return tokenizer


def prepared(data_dir: Path | None, tokenizer: Any = None, **more: Any) -> Preparation:
    return Preparation(tokenizer=tokenizer or Words(), data_dir=data_dir, **{"length": None, "count": 9} | more)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made(folder: Path, task: Task = TASKS["hotpotqa"], tokenizer: Any = None, **more: Any) -> Sample:
    """Return the one sample that a task makes of `ROW`."""
    write(folder / f"{task.name}.jsonl", ROW)
    return task.samples(prepared(folder, tokenizer, **more))[0]


def whole(sample: Sample) -> str:
    return sample.context + sample.turns[0].question


# Official definition


@pytest.mark.parametrize("name", GOLDEN["tasks"])
def test_templates_are_the_official_ones_to_the_byte(name: str) -> None:
    template = sources.templates("longbench")[name]["template"]
    assert hashlib.sha256(template.encode()).hexdigest() == GOLDEN["tasks"][name]["template_sha256"]
    assert len(template) == GOLDEN["tasks"][name]["template_chars"]
    assert "{input}" not in template.split("{context}")[0]


@pytest.mark.parametrize("name", GOLDEN["tasks"])
def test_samples_are_the_filled_in_template_split_after_the_document(name: str, tmp_path: Path) -> None:
    sample = made(tmp_path, TASKS[name])
    turn = sample.turns[0]
    template = sources.templates("longbench")[name]["template"]
    assert whole(sample) == template.format(context=DOCUMENT, input=QUESTION)
    assert sample.context.endswith("word399")
    assert (QUESTION in turn.question) == ("{input}" in template)
    assert turn.max_new_tokens == GOLDEN["tasks"][name]["max_new_tokens"]
    assert turn.answers == ("Ann", "Anna")
    assert turn.extra == {"all_classes": ["x", "y"]}
    assert (sample.id, sample.notes["tokens_cut"], sample.notes["words"]) == ("a1", 0, 400)


def test_the_16_english_tasks_and_their_chat_templates_are_the_official_ones() -> None:
    assert {name: task.chat for name, task in TASKS.items()} == {
        name: official["chat_template"] for name, official in GOLDEN["tasks"].items()
    }
    assert {(task.group, task.sized) for task in longbench.TASKS} == {("longbench", False)}


# Truncation and split


@pytest.mark.parametrize("length", [100, 101])
def test_truncation_keeps_the_first_half_and_the_last(length: int, tmp_path: Path) -> None:
    text = whole(made(tmp_path))
    words = re.findall(r"\s*\S+", text)
    sample = made(tmp_path, length=length)
    # One of the first 50 tokens is special, and not decoded.
    assert whole(sample) == "".join(words[:49] + words[-50:])
    assert sample.notes["tokens_cut"] == 1 + len(words) - 100
    assert sample.notes["tokens_kept"] == length
    assert sample.context.endswith("word399")
    assert sample.turns[0].question == made(tmp_path).turns[0].question


def test_a_question_longer_than_the_last_half_begins_where_the_prompt_was_cut(tmp_path: Path) -> None:
    words = re.findall(r"\s*\S+", whole(made(tmp_path)))
    sample = made(tmp_path, length=20)
    assert sample.context == "".join(words[:9])
    assert sample.turns[0].question == "".join(words[-10:])


@pytest.mark.parametrize("length", [40, 41, 300])
def test_the_split_is_found_where_decoding_changes_white_space(length: int) -> None:
    question = "\n\nNow,   answer  this:\n who was   it?"
    fitted = truncate(prepared(None, Tidying(), length=length), DOCUMENT, question, 8)
    assert fitted.tokens_cut == 401 + 6 - 2 * (length // 2)
    assert fitted.question == " Now, answer this: who was it?"
    assert fitted.context.endswith(" word399")


def test_the_split_is_found_inside_a_token() -> None:
    fitted = truncate(prepared(None, length=100), DOCUMENT, "Next line of code:\n", 8)
    assert fitted.tokens_cut
    assert fitted.question == "Next line of code:\n"
    assert fitted.context.endswith(" word399")


def test_without_a_length_the_answer_and_the_chat_template_are_given_room(tmp_path: Path) -> None:
    plain = truncate(prepared(None, max_length=100), DOCUMENT, QUESTION, 32)
    chat = truncate(prepared(None, max_length=100, chat=True), DOCUMENT, QUESTION, 32)
    assert plain.tokens_kept == 100 - 32
    assert chat.tokens_kept == 100 - 32 - 4  # <s>, user, end, assistant
    tokenizer: Any = Words()
    prompt = render(tokenizer, chat.context, chat.question, chat=True)
    assert len(encode(tokenizer, prompt)[0]) <= 100 - 32


def test_a_length_beyond_the_models_is_cut_at_the_models() -> None:
    assert truncate(prepared(None, length=5000, max_length=100), DOCUMENT, QUESTION, 32).tokens_kept == 68


def test_a_prompt_fits_when_it_is_encoded_again_too() -> None:
    tokenizer: Any = Spelling()
    room = 101 - 8
    cut_once, _ = truncate_middle(tokenizer, DOCUMENT + QUESTION, room)
    assert len(tokenizer(cut_once)["input_ids"]) > room  # the case is one
    fitted = truncate(prepared(None, tokenizer, max_length=101), DOCUMENT, QUESTION, 8)
    assert fitted.tokens_kept < room
    assert len(tokenizer(fitted.context + fitted.question)["input_ids"]) <= room


def test_no_room_for_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be at least 2"):
        truncate(prepared(None, max_length=32), DOCUMENT, QUESTION, 32)


def test_with_a_byte_level_tokenizer_halves_question_and_length_are_kept() -> None:
    document = "".join(f"Line {number}: naïve café — “{number * 7919}”, 数据.\n" for number in range(100))
    question = f"\n\nNow, answer.\n\nQuestion: {QUESTION}\nAnswer:"
    tokenizer = byte_level(DOCUMENT)
    ids = tokenizer(document + question)["input_ids"]
    torn = 0
    for length in range(500, 510):
        fitted = truncate(prepared(None, tokenizer, length=length), document, question, 32)
        first, last = (tokenizer.decode(part) for part in (ids[: length // 2], ids[-(length // 2) :]))
        torn += "\ufffd" in first + last
        assert fitted.context + fitted.question == first + last
        assert fitted.question == question
        assert fitted.tokens_cut == len(ids) - 2 * (length // 2)
    assert torn  # some cuts fall inside a character
    for most in range(600, 610):
        fitted = truncate(prepared(None, tokenizer, max_length=most, chat=True), document, question, 32)
        prompt = render(tokenizer, fitted.context, fitted.question, chat=True)
        assert most - 32 - 8 < len(encode(tokenizer, prompt)[0]) <= most - 32


# Data


def test_a_data_folder_may_have_three_forms(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"_id": "a2", "input": "Where?"}]
    flat, nested, zipped = (tmp_path / name for name in ("flat", "nested", "zipped"))
    write(flat / "trec.jsonl", *rows)
    path = write(nested / "data" / "trec.jsonl", *rows)
    zipped.mkdir()
    with zipfile.ZipFile(zipped / "data.zip", "w") as archive:
        archive.write(path, "data/trec.jsonl")
    first = TASKS["trec"].samples(prepared(flat))
    assert [sample.id for sample in first] == ["a1", "a2"]
    assert first == TASKS["trec"].samples(prepared(nested)) == TASKS["trec"].samples(prepared(zipped))
    assert TASKS["trec"].samples(prepared(flat, count=1)) == first[:1]
    with pytest.raises(ValueError, match=r"must hold data/qasper\.jsonl"):
        TASKS["qasper"].samples(prepared(zipped))


@pytest.mark.parametrize(("task", "wanted"), [(TASKS["trec"], r"data/trec\.jsonl or data\.zip"), (V2, r"data\.json")])
def test_missing_data_are_named(task: Task, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=wanted):
        task.samples(prepared(tmp_path))
    with pytest.raises(FileNotFoundError, match="a folder that exists"):
        task.samples(prepared(tmp_path / "none"))


def test_a_row_without_its_fields_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "trec.jsonl", ROW, {"_id": "a2", "context": "x", "length": 1})
    with pytest.raises(ValueError, match=r"row 2 of trec .* input, answers, all_classes missing"):
        TASKS["trec"].samples(prepared(tmp_path))


@pytest.mark.parametrize("task", [TASKS["trec"], V2])
def test_without_a_network_the_folder_is_pointed_to(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in (longbench, longbench_v2):
        monkeypatch.setattr(module, "_REPO", "nobody/nothing")  # in nobody's cache
    with pytest.raises(OSError, match=r"data\.\w+ of the data set nobody/nothing .* --data-dir"):
        task.samples(prepared(None))


# LongBench v2


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("The correct answer is B.", "B"),
        ("Well. The correct answer is **(C)**, since", "C"),
        ("The correct answer is A. No: The correct answer is (D)", "D"),  # brackets go first
        ("The correct answer is (B), or The correct answer is (C)", "B"),
        ("the correct answer is (B)", None),
        ("The correct answer is (b)", None),
        ("The correct answer is (E)", None),
        ("The correct answer is: B", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_choice_is_found_by_the_official_pattern(prediction: str, letter: str | None) -> None:
    assert longbench_v2.choice(prediction) == letter
    for right in "ABCD":
        turn = Turn(question="", answers=(right,), max_new_tokens=1)
        assert V2.score(prediction, turn) == (100 if right == letter else 0)


def made_v2(folder: Path, **more: Any) -> Sample:
    (folder / "data.json").write_text(json.dumps([ROW_V2, ROW_V2 | {"_id": "b2"}]), encoding="utf-8")
    (sample,) = V2.samples(prepared(folder, count=1, **more))
    return sample


@pytest.mark.parametrize("place", ["0shot.txt", "prompts/0shot.txt"])
def test_v2_fills_in_the_users_template(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / place).write_text(USERS, encoding="utf-8")
    sample = made_v2(tmp_path)
    assert sample.context == f"Read {DOCUMENT}"
    # What stands in the data is not taken for a placeholder.
    assert sample.turns[0].question == " and say: Which word is third? A word1 B word2 C $C_A$ D none"
    assert sample.turns[0].answers == ("B",)
    assert sample.turns[0].max_new_tokens == 128
    assert sample.notes["template"] == "user's"
    official = {"longbench_v2": {"official_sha256": hashlib.sha256(USERS.encode()).hexdigest()}}
    monkeypatch.setattr(longbench_v2, "templates", official.get)
    assert made_v2(tmp_path).notes["template"] == "official"


def test_v2_knows_the_official_template_by_its_hash() -> None:
    official = sources.templates("longbench_v2")["official_sha256"]
    assert GOLDEN["longbench_v2"]["zero_shot_template_sha256"] == official


def test_v2_without_a_template_uses_words_that_the_score_understands(tmp_path: Path) -> None:
    sample = made_v2(tmp_path)
    notes = {"template": "ours", "difficulty": "easy", "length": "short", "domain": "made", "sub_domain": "words"}
    assert notes.items() <= sample.notes.items()
    assert sample.context.endswith("\n\n" + DOCUMENT)
    question = sample.turns[0].question
    assert re.search(r"Which word is third\?\n\nA: word1\nB: word2\nC: \$C_A\$\nD: none\n", question)
    asked = re.search(r"The correct answer is \(X\)", question)
    assert asked is not None
    assert longbench_v2.choice(asked.group().replace("X", "B")) == "B"


def test_v2_is_cut_in_the_middle_and_keeps_its_question(tmp_path: Path) -> None:
    full, cut = made_v2(tmp_path), made_v2(tmp_path, length=120)
    words = re.findall(r"\s*\S+", whole(full))
    assert whole(cut) == "".join(words[:59] + words[-60:])
    assert cut.turns == full.turns
    assert cut.notes["tokens_cut"] == 1 + len(words) - 120


@pytest.mark.parametrize("template", ["$Q$ $DOC$ $C_A$ $C_B$ $C_C$ $C_D$", USERS.replace("$C_D$", ""), USERS + "$DOC$"])
def test_v2_refuses_a_template_that_asks_before_the_document_or_lacks_a_part(template: str, tmp_path: Path) -> None:
    (tmp_path / "0shot.txt").write_text(template, encoding="utf-8")
    with pytest.raises(ValueError, match=r"must have \$DOC\$ once"):
        made_v2(tmp_path)


def test_v2_refuses_data_of_another_shape(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a JSON list of objects"):
        V2.samples(prepared(tmp_path))


# Sources


@pytest.mark.parametrize(("text", "reason"), [('{"a": 1}\n\n{"a"', "line 3 of .* not JSON"), ("[1]", "JSON object")])
def test_lines_that_are_no_objects_are_named(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        list(sources.read_jsonl(path))


def test_a_damaged_archive_or_json_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="not a whole zip archive"):
        list(sources.read_jsonl(path, "data/trec.jsonl"))
    with pytest.raises(ValueError, match=r"data\.zip is not JSON"):
        sources.read_json(path)
