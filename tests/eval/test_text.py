"""Text that prompts are filled with: prose, haystacks, words, and as much of them as the length takes."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from rocketkv.eval.tasks.base import Preparation, Sample, Turn
from rocketkv.eval.tasks.length import fill
from rocketkv.eval.tasks.text import english, haystack, prose, split_sentences, toy_haystack


class Fours:
    """A tokenizer that cuts words into pieces of four characters."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        return {"input_ids": re.findall(r"\S{1,4}", text)}


def test_prose_is_sentences_without_digits() -> None:
    text = prose(seed=3, sentences=500)
    assert re.fullmatch(r"(?:[A-Z][a-z ]+\.(?: |$))+", text)
    assert text.count(".") == 500
    assert max(len(sentence.split()) for sentence in text.split(". ")) <= 16


def test_prose_varies() -> None:
    sentences = prose(seed=3, sentences=500).split(". ")
    assert len(set(sentences)) > 450


def test_prose_is_decided_by_its_seed() -> None:
    assert prose(seed=5, sentences=40) == prose(seed=5, sentences=40)
    assert prose(seed=5, sentences=40) != prose(seed=6, sentences=40)
    assert prose(seed=5, sentences=40).startswith(prose(seed=5, sentences=39))
    assert prose(seed=5, sentences=0) == ""


def test_prose_is_the_same_on_every_machine() -> None:
    # Measured figures belong to prompts: should these change, so do the figures.
    assert prose(seed=1, sentences=3) == (
        "On market day the teacher moved the old lamp. The donkey played outside the school."
        " After lunch the musician carried the garden tools."
    )


def test_prose_refuses() -> None:
    with pytest.raises(ValueError, match="islice"):
        prose(seed=1, sentences=-1)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -2"):
        prose(seed=-2, sentences=1)


@pytest.mark.parametrize("pieces", [[1], [7], [30], [1, 40, 3], [5] * 90 + [60] * 40, [50] * 9 + [2] * 400])
def test_filler_fills_whatever_its_pieces(pieces: list[int]) -> None:
    def build(count: int) -> Sample:
        text = " ".join("a" * 4 for piece in islice(cycle(pieces), count) for _ in range(piece))
        return Sample(id=str(count), context=text, turns=(Turn(question=" b", answers=("c",), max_new_tokens=10),))

    tokenizer: Any = Fours()
    for length in range(120, 1500, 23):
        room = length - 10 - 1  # the answer's, the question's
        sample = fill(Preparation(tokenizer=tokenizer, length=length, count=1), build, least=1)
        assert len(sample.context.split()) <= room
        assert len(sample.context.split()) >= 0.97 * room or len(build(int(sample.id) + 1).context.split()) > room


def test_words_want_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    english.cache_clear()
    with pytest.raises(ImportError, match=r"rocketkv\[eval\]"):
        english()


@pytest.mark.skipif(importlib.util.find_spec("wonderwords") is None, reason="needs wonderwords")
def test_words_are_wonderwords_lists() -> None:
    english.cache_clear()
    lists = english()
    assert {"compass", "river"} <= set(lists.nouns)
    assert "bright" in lists.adjectives
    assert "arrive" in lists.verbs
    assert len(lists.all) == len(set(lists.nouns) | set(lists.adjectives) | set(lists.verbs))


def test_sentences_lose_no_word() -> None:
    text = "One is\nhere. Is two?  Yes! 3.5 is\tone number.\n\n" + "on and " * 100
    pieces = split_sentences(text)
    assert " ".join(pieces) == " ".join(text.split())
    assert pieces[:4] == ("One is here.", "Is two?", "Yes!", "3.5 is one number.")
    assert max(len(piece.split()) for piece in pieces) == 60


def test_the_haystack_is_the_best_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rocketkv.eval.tasks.text.ruler_package", lambda: None)
    for folder in (tmp_path, None):
        with pytest.raises(FileNotFoundError, match="take generated prose with --toy-haystack"):
            haystack(folder)
    assert toy_haystack(0).kind == "generated"
    assert toy_haystack(0) != toy_haystack(1)
    (tmp_path / "haystack.txt").write_text("A text. It is short.")
    mine = haystack(tmp_path)
    assert mine == ("text", ("A text.", "It is short."))
    assert mine.take(3) == ["A text.", "It is short.", "A text."]
    (tmp_path / "PaulGrahamEssays.json").write_text('{"text": "An essay.\\nIt ends."}')
    assert haystack(tmp_path) == ("essays", ("An essay.", "It ends."))


@pytest.mark.parametrize("content", ['{"text": "  "}', "[]", '{"text": 3}', "{", "{}"])
def test_a_haystack_without_text_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "PaulGrahamEssays.json").write_text(content)
    with pytest.raises(ValueError, match="PaulGrahamEssays"):
        haystack(tmp_path)
