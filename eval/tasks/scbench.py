"""SCBench, the nine tasks in English that need no parser of code: up to five questions, in turn, on one long context.

The official definition is followed (microsoft/MInference, MIT, `scbench`): its data, its numbers of turns and of new
tokens, truncation in the middle of the first prompt, and scores. `scbench_qa_chn`, which is in Chinese, and
`scbench_repoqa` and `scbench_repoqa_and_kv`, whose scores need a parser of code, are left out. Three things differ.
The cut keeps room for the later questions and for longer right answers too, so that no turn goes beyond the model's
length. The score of `scbench_summary_with_needles` is the mean over its turns of both kinds, which are officially
reported apart. In the chat template, each turn of `scbench_mf` has its own question; officially later turns share the
last one's.

The official templates are read from the user's folder: SCBench's `eval_utils.py`, or `scbench_templates.json` with the
same dictionaries. Without them four of the templates are in words of ours, and the notes of each sample say so: such
scores are not those of the literature. (The other five are nothing but a context and a question.)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ...hf.prompts import follow_up
from ..records import digest
from . import scbench_metrics as metrics
from .base import Preparation, Sample, Task, Turn
from .longbench import fit
from .sources import check_fields, data_file, hub_file, python_constant, read_json, read_jsonl

_REPO = "microsoft/SCBench"
_MOST_TURNS = 5
_NEEDLES = "scbench_summary_with_needles"


class _Kind(NamedTuple):
    """What the official program has on a kind of turn."""

    max_new_tokens: int
    score: Callable[[str, Sequence[str]], float]


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "scbench_kv": _Kind(150, metrics.held),
        "scbench_prefix_suffix": _Kind(150, metrics.held),
        "scbench_vt": _Kind(30, metrics.share_held),
        "scbench_qa_eng": _Kind(40, metrics.any_held),
        "scbench_choice_eng": _Kind(40, metrics.choice),
        "scbench_mf": _Kind(5, metrics.first_number),
        "scbench_many_shot": _Kind(10, metrics.any_held),
        "scbench_summary": _Kind(200, metrics.rouge_lsum),
    }
)
_NEEDLES_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {"scbench_summary": _Kind(800, metrics.rouge_lsum), "scbench_passkey": _Kind(15, metrics.first_digits)}
)
_METRICS: Mapping[str, str] = MappingProxyType({"scbench_summary": "rouge_lsum", _NEEDLES: "score"})  # else accuracy


class _Templates(NamedTuple):
    """A task's templates, with fields in braces.

    Attributes:
        first: of the first turn, with the field {context}.
        later: of the later turns, after the answer {pre_ans}.
        later_chat: of the later turns in a chat template.
    """

    first: str
    later: str
    later_chat: str


_NAMES = _Templates(
    "multiturn_templates", "multiturn_follow_up_templates", "multiturn_follow_up_templates_in_chat_tempate"
)
_OPTIONS = ("OPTION_A", "OPTION_B", "OPTION_C", "OPTION_D")
_ANSWER = "{pre_ans}\n\n"  # what a later turn follows: put there by `prompts.follow_up`

# The digests of the official templates, to know them by.
_OFFICIAL: Mapping[str, str] = MappingProxyType(
    {
        "scbench_kv": "f2c376890c15252a6f5362d9b8aeaa7be0e8f0e5f9a1817c6e7a9c085984b3dd",
        "scbench_prefix_suffix": "64bbf06cffdb9a45086bc55c6f2c34e7c803af4ae7c7d4f937f7eb4cc52fe66b",
        "scbench_vt": "64bbf06cffdb9a45086bc55c6f2c34e7c803af4ae7c7d4f937f7eb4cc52fe66b",
        "scbench_qa_eng": "01397593b60f377b37c41efae6c07454ee659434764bd429a4ef9c6bd3241b2b",
        "scbench_choice_eng": "0079491363e9daac15f33c4178da3bc747456a18390d58b7fdc38858d38db624",
        "scbench_mf": "b7338f6743010fd96cfb258bf884be804390ba1954407e4675dec94af04b0d66",
        "scbench_many_shot": "64bbf06cffdb9a45086bc55c6f2c34e7c803af4ae7c7d4f937f7eb4cc52fe66b",
        "scbench_summary": "64bbf06cffdb9a45086bc55c6f2c34e7c803af4ae7c7d4f937f7eb4cc52fe66b",
        "scbench_summary_with_needles": "64bbf06cffdb9a45086bc55c6f2c34e7c803af4ae7c7d4f937f7eb4cc52fe66b",
    }
)

_CHOICE = "Question: {input}\nA. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n\nThe right choice is"
_OURS: Mapping[str, _Templates] = MappingProxyType(
    {
        "scbench_kv": _Templates(
            "Below is a JSON object. Look up the keys that are asked for and answer with their values.\n\n{context}\n\n"
            "{input}",
            _ANSWER + "{input}",
            "{input}",
        ),
        "scbench_qa_eng": _Templates(
            "Below is a book. Answer the questions about it with as few words as possible.\n\n{context}\n\n"
            "Question: {input}\nAnswer:",
            _ANSWER + "Question: {input}\nAnswer:",
            "Question: {input}\nAnswer:",
        ),
        "scbench_choice_eng": _Templates(
            "Below is a book. Answer each question about it with the letter of the right choice.\n\n{context}\n\n"
            + _CHOICE,
            _ANSWER + _CHOICE,
            _CHOICE,
        ),
        "scbench_mf": _Templates(
            "Below is a list of numbers. Answer each question about it with a number.\n\n{context}\n\n{input}",
            _ANSWER + "{input}",
            "{input}",
        ),
    }
)
_PLAIN = _Templates("{context}\n\n{input}", _ANSWER + "{input}", "{input}")


def _templates(name: str, data_dir: Path | None) -> tuple[_Templates, str]:
    """Return a task's templates, and whose they are: `official`, `user's` or `ours`.

    Raises:
        ValueError: the user's file has no such template, or one that lacks a field which it must have.
    """
    paths = [] if data_dir is None else [data_dir / file for file in ("eval_utils.py", "scbench_templates.json")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        templates = _OURS.get(name, _PLAIN)
    else:
        try:
            read = read_json(path) if path.suffix == ".json" else {key: python_constant(path, key) for key in _NAMES}
            templates = _Templates(*(str(read[key][name]) for key in _NAMES))
        except (ValueError, KeyError, TypeError, SyntaxError) as error:
            raise ValueError(
                f"{path} must hold the dictionaries {', '.join(_NAMES)}, each with a template of {name};"
                " take SCBench's own eval_utils.py"
            ) from error
        if templates.first.count("{context}") != 1 or not templates.later.startswith(_ANSWER):
            raise ValueError(
                f"{path} must have {{context}} once in the first template of {name}, and begin the later one with"
                " {pre_ans} and an empty line; take SCBench's own eval_utils.py"
            )
    if digest(list(templates)) == _OFFICIAL[name]:
        return templates, "official"
    return templates, "ours" if path is None else "user's"


def _filled(template: str, turn: Mapping[str, Any]) -> str:
    """Fill the fields of a template, in one pass: what fills them may itself hold braces."""

    def field(match: re.Match[str]) -> str:
        name = match[1]
        if name in ("input", "question"):
            return str(turn["input"])
        if name == "prefix":
            return _asked_number(str(turn["input"]))
        if name in _OPTIONS:
            return str(turn["options"][_OPTIONS.index(name)])
        raise ValueError(f"a template of SCBench has no field {{{name}}}; take SCBench's own eval_utils.py")

    return re.sub(r"\{(\w+)\}", field, template)


def _asked_number(question: str) -> str:
    """Return the question that goes before a prompt of `scbench_mf`, made of its last line: `The largest number is`."""
    found = re.search(r"The .+ is", question)
    if found is None:
        raise ValueError(f"a question of scbench_mf must say `The ... is`, got {question!r}; take the official file")
    return f"What is {found[0].lower()[:-3]}?"


def _answers(name: str, turn: Mapping[str, Any], where: str) -> tuple[str, ...]:
    answer = turn["answer"]
    if name == "scbench_choice_eng":
        check_fields(turn, ("options",), where)
        if len(turn["options"]) != 4 or answer not in turn["options"]:
            raise ValueError(f"{where} must have four options, the answer among them; take the official file")
        return (str(answer), "ABCD"[turn["options"].index(answer)])
    answers = answer if isinstance(answer, list) else [answer]
    if not answers:
        raise ValueError(f"{where} must have an answer, got none; take the official file")
    if name == "scbench_mf" and not isinstance(answers[0], int | float):
        raise ValueError(f"{where} must have a number as its answer, got {answers[0]!r}; take the official file")
    return tuple(map(str, answers))


def _turns(name: str, templates: _Templates, row: Mapping[str, Any], *, chat: bool, where: str) -> list[Turn]:
    turns: list[Turn] = []
    for number, asked in enumerate(row["multi_turns"][:_MOST_TURNS], start=1):
        place = f"turn {number} of {where}"
        check_fields(asked, ("input", "answer", "task") if name == _NEEDLES else ("input", "answer"), place)
        kind = asked["task"] if name == _NEEDLES else name
        kinds = _NEEDLES_KINDS if name == _NEEDLES else _KINDS
        if kind not in kinds:
            raise ValueError(f"{place} must be of the task {' or '.join(kinds)}, got {kind!r}; take the official file")
        answers = _answers(name, asked, place)
        if not turns:
            template = templates.first.split("{context}")[1]
        else:
            template = templates.later_chat if chat else templates.later.removeprefix(_ANSWER)
        turns.append(
            Turn(
                question=_filled(template, asked),
                answers=answers,
                max_new_tokens=kinds[kind].max_new_tokens,
                # The official program begins these answers itself.
                answer_prefix="This paper" if turns and chat and name == "scbench_summary" else "",
                # given_back: the right answer as it precedes the next question, where that is not the model's own
                extra={"kind": kind, "given_back": str(asked["answer"])},
            )
        )
    if not turns:
        raise ValueError(f"{where} must have a turn, got none; take the official file")
    return turns


def _tokens_after(prepared: Preparation, turns: Sequence[Turn]) -> int:
    """Return the tokens that may follow the first prompt: all answers, right or generated, and all later questions."""

    def tokens(text: str) -> int:
        return len(prepared.tokenizer(text, add_special_tokens=False)["input_ids"])

    total = turns[-1].max_new_tokens
    for turn, later in pairwise(turns):
        total += max(turn.max_new_tokens, tokens(turn.extra["given_back"]))
        total += tokens(follow_up(prepared.tokenizer, later.question, later.answer_prefix, chat=prepared.chat))
    return total


def _rows(name: str, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    member = f"data/{name}.jsonl"
    return read_jsonl(hub_file(_REPO, member) if data_dir is None else data_file(data_dir, f"{name}.jsonl", member))


def _samples(name: str, prepared: Preparation) -> Sequence[Sample]:
    """Make the first `prepared.count` samples, or as many as the data have; their length is that of all turns."""
    rows = list(islice(_rows(name, prepared.data_dir), prepared.count))
    templates, whose = _templates(name, prepared.data_dir)
    most = prepared.max_length if prepared.length is None else min(prepared.length, prepared.max_length)
    whole = replace(prepared, length=None, max_length=most)
    samples = []
    for number, row in enumerate(rows):
        where = f"row {number + 1} of {name}"
        check_fields(row, ("multi_turns",) if "input" in row else ("context", "multi_turns"), where)
        first, *later = _turns(name, templates, row, chat=prepared.chat, where=where)
        before = _filled(templates.first.split("{context}")[0], row["multi_turns"][0])
        context = before + str(row["context"] if "context" in row else row["input"])
        fitted = fit(whole, context, first.question, _tokens_after(prepared, [first, *later]))
        samples.append(
            Sample(
                id=str(number),
                context=fitted.context,
                turns=(replace(first, question=fitted.question), *later),
                notes={"template": whose, "tokens_cut": fitted.tokens_cut, "tokens_kept": fitted.tokens_kept},
            )
        )
    return samples


def _score(name: str, prediction: str, turn: Turn) -> float:
    """Score an answer by the official rule of its turn."""
    kinds = _NEEDLES_KINDS if name == _NEEDLES else _KINDS
    return kinds[turn.extra["kind"]].score(prediction, turn.answers)


TASKS = tuple(
    Task(
        name=name,
        group="scbench",
        version=1,
        source="microsoft/MInference, scbench (MIT)",
        metric=_METRICS.get(name, "accuracy"),
        samples=functools.partial(_samples, name),
        score=functools.partial(_score, name),
        sized=False,
    )
    for name in (*_KINDS, _NEEDLES)
)
