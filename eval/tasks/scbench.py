"""SCBench, the nine English tasks that need no parser of code: up to five questions, in turn, on one long context.

Follows the official definition (microsoft/MInference, MIT, `scbench`): data, numbers of turns and of new tokens,
truncation in the middle of the first prompt, and scores. Left out are `scbench_qa_chn`, which is in Chinese, and
`scbench_repoqa` and `scbench_repoqa_and_kv`, whose scores need a parser of code. Three things differ. Truncation also
leaves room for the later questions and for longer right answers, so that no turn exceeds the model's length. The score
of `scbench_summary_with_needles` is the mean over its turns of both kinds, which are officially reported apart. In the
chat template each turn of `scbench_mf` has its own question; officially later turns share the last one's.

Five of the official templates are nothing but a context and a question. The other four are read from SCBench's
`eval_utils.py` in the user's folder. Without it templates of this project are used, `notes["template"]` of each sample
is `ours`, and scores do not compare with published ones.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ...hf.prompts import follow_up
from ..records import digest
from . import metrics
from .base import Preparation, Sample, Task, Turn
from .length import truncate
from .sources import data_file, hub_file, read_jsonl, seeded_rows, templates

_REPO = "microsoft/SCBench"
_MOST_TURNS = 5
_NEEDLES = "scbench_summary_with_needles"
_OFFICIAL = templates("scbench")
_NAMES = ("multiturn_templates", "multiturn_follow_up_templates", "multiturn_follow_up_templates_in_chat_tempate")
_OPTIONS = ("OPTION_A", "OPTION_B", "OPTION_C", "OPTION_D")
_ANSWER = "{pre_ans}\n\n"  # start of a later turn, added by `prompts.follow_up`


class _Templates(NamedTuple):
    """A task's templates, with fields in braces.

    Attributes:
        before: text before the context.
        first: first question, after the context.
        later: later questions, after an answer.
        origin: `official`, `user's` or `ours`.
    """

    before: str
    first: str
    later: str
    origin: str


def _templates(name: str, prepared: Preparation) -> _Templates:
    """Return a task's templates.

    Raises:
        ValueError: the user's file has no such template, or one that lacks a required field.
    """
    entry = _OFFICIAL[name]
    path = None if prepared.data_dir is None else prepared.data_dir / "eval_utils.py"
    if path is None or not path.is_file():
        before, first = entry["first"].split("{context}")
        return _Templates(before, first, entry["later"], entry["origin"])
    try:
        first, later, later_chat = texts = [str(_python_constant(path, key)[name]) for key in _NAMES]
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"{path} must hold the dictionaries {', '.join(_NAMES)}, each with a template of {name};"
            " take SCBench's own eval_utils.py"
        ) from error
    if first.count("{context}") != 1 or not later.startswith(_ANSWER):
        raise ValueError(
            f"{path} must have {{context}} once in the first template of {name}, and begin the later one with"
            " {pre_ans} and an empty line; take SCBench's own eval_utils.py"
        )
    origin = "official" if digest(texts) == entry["official_sha256"] else "user's"
    before, first = first.split("{context}")
    return _Templates(before, first, later_chat if prepared.chat else later.removeprefix(_ANSWER), origin)


def _python_constant(path: Path, name: str) -> Any:
    """Return a literal that a Python file assigns to a name at its top level; the file does not run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                return ast.literal_eval(value)
    raise KeyError(name)


def _fill_in(template: str, turn: Mapping[str, Any]) -> str:
    """Fill the fields of a template, in one pass: the values may themselves contain braces."""

    def field(match: re.Match[str]) -> str:
        name = match[1]
        if name in ("input", "question"):
            return str(turn["input"])
        if name == "prefix":
            return _mf_question(str(turn["input"]))
        if name in _OPTIONS:
            return str(turn["options"][_OPTIONS.index(name)])
        raise ValueError(f"a template of SCBench has no field {{{name}}}; take SCBench's own eval_utils.py")

    return re.sub(r"\{(\w+)\}", field, template)


def _mf_question(text: str) -> str:
    """Return the question before a prompt of `scbench_mf`: `What is the largest number?` of `The largest number is`."""
    asked = re.findall(r"The .+ is", text)[0]
    return f"What is {asked.lower()[:-3]}?"


def _answers(name: str, turn: Mapping[str, Any]) -> tuple[str, ...]:
    answer = turn["answer"]
    if name == "scbench_choice_eng":
        return str(answer), "ABCD"[turn["options"].index(answer)]
    answers = tuple(map(str, answer if isinstance(answer, list) else [answer]))
    if not answers:
        raise ValueError("no answer")
    return answers


def _turns(name: str, texts: _Templates, row: Mapping[str, Any], *, chat: bool) -> list[Turn]:
    turns: list[Turn] = []
    for entry in row["multi_turns"][:_MOST_TURNS]:
        kind = entry["task"] if name == _NEEDLES else name
        turns.append(
            Turn(
                question=_fill_in(texts.later if turns else texts.first, entry),
                answers=_answers(name, entry),
                max_new_tokens=_OFFICIAL[name]["turns"][kind]["max_new_tokens"],
                # The official program begins these answers itself.
                answer_prefix="This paper" if turns and chat and name == "scbench_summary" else "",
                # given_back: the right answer as it precedes the next question
                extra={"kind": kind, "given_back": str(entry["answer"])},
            )
        )
    return turns


def _tokens_after(prepared: Preparation, turns: Sequence[Turn]) -> int:
    """Return the tokens that may follow the first prompt: all answers, right or generated, and all later questions."""

    def tokens(text: str) -> int:
        return len(prepared.tokenizer(text, add_special_tokens=False)["input_ids"])

    total = turns[-1].max_new_tokens
    for turn, later in pairwise(turns):
        total += max(turn.max_new_tokens, tokens(turn.extra["given_back"]))
        options: dict[str, Any] = {"chat": prepared.chat, "options": prepared.chat_options}
        total += tokens(follow_up(prepared.tokenizer, later.question, later.answer_prefix, **options))
    return total


def _rows(name: str, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    member = f"data/{name}.jsonl"
    return read_jsonl(hub_file(_REPO, member) if data_dir is None else data_file(data_dir, f"{name}.jsonl", member))


def _samples(name: str, prepared: Preparation) -> Sequence[Sample]:
    """Make `prepared.count` samples of random rows, or as many as the data have; their length is that of all turns.

    Raises:
        ValueError: a row is not of SCBench's form, or its turns do not fit the length.
    """
    texts = _templates(name, prepared)
    most = prepared.max_length if prepared.length is None else min(prepared.length, prepared.max_length)
    unsized = replace(prepared, length=None, max_length=most)
    samples = []
    for number, row in seeded_rows(_rows(name, prepared.data_dir), name, prepared.seed, prepared.count):
        try:
            first, *later = _turns(name, texts, row, chat=prepared.chat)
            before = _fill_in(texts.before, row["multi_turns"][0])
            context = before + str(row["context"] if "context" in row else row["input"])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"row {number + 1} of {name} is not of SCBench's form ({error!r}); take the official file"
            ) from error
        prompt = truncate(unsized, context, first.question, _tokens_after(prepared, [first, *later]))
        samples.append(
            Sample(
                id=str(number),
                context=prompt.context,
                turns=(replace(first, question=prompt.question), *later),
                notes={"template": texts.origin, "tokens_cut": prompt.tokens_cut, "tokens_kept": prompt.tokens_kept},
            )
        )
    return samples


def _score(name: str, prediction: str, turn: Turn) -> float:
    """Score an answer by the official rule of its turn."""
    metric: metrics.Metric = getattr(metrics, _OFFICIAL[name]["turns"][turn.extra["kind"]]["score"])
    return metric(prediction, turn.answers)


TASKS = tuple(
    Task(
        name=name,
        group="scbench",
        version=2,
        source="microsoft/MInference, scbench (MIT)",
        metric=official["metric"],
        samples=functools.partial(_samples, name),
        score=functools.partial(_score, name),
        sized=False,
    )
    for name, official in _OFFICIAL.items()
)
