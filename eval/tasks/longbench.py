"""LongBench, the 16 English tasks: questions, summaries, few-shot examples and code on documents of 5K to 15K words.

The official definition is followed (THUDM/LongBench, `LongBench/pred.py`, MIT): its data, templates, truncation in the
middle, numbers of new tokens, metrics, and the chat template for all tasks but trec, triviaqa, samsum, lcc and
repobench-p. One thing differs: generation of samsum is officially stopped at the first line feed, which may not come
first; here it runs on, and the first line that is not empty counts.

Templates are read from the lm-eval package. Six of them lost white space there, which is put back; none is used that is
not the official one to the byte. In all 16 the question, where there is one, comes after the document.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ...hf.prompts import encode, render, truncate_middle
from . import metrics
from .base import Preparation, Sample, Task, Turn
from .sources import check_fields, data_file, hub_file, lm_eval_file, read_jsonl, yaml_field

_REPO = "zai-org/LongBench"  # THUDM/LongBench before
_FIELDS = ("_id", "context", "input", "answers", "all_classes", "length")


class _Official(NamedTuple):
    """What the official program has on a task."""

    metric: str
    max_new_tokens: int
    chat: bool
    template_sha256: str  # of its UTF-8, with its fields {context} and {input}


# One task a line.
# fmt: off
_OFFICIAL: Mapping[str, _Official] = MappingProxyType({
    "narrativeqa": _Official("qa_f1", 128, True, "aada7ed24b06abace5b0045ac3bcfe06fc831a6cf434f0ecfd99fb7b3d299e1c"),
    "qasper": _Official("qa_f1", 128, True, "0fbdd123fe7f83d6d6a9c583ca28cb29d68e523bf8fec01a0cf2dcd11037775d"),
    "multifieldqa_en": _Official("qa_f1", 64, True, "20b4666a2de8a1f701bdb6c4e015fa9f8758d64b361d841f7766df6c9ceba770"),
    "hotpotqa": _Official("qa_f1", 32, True, "9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb"),
    "2wikimqa": _Official("qa_f1", 32, True, "9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb"),
    "musique": _Official("qa_f1", 32, True, "9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb"),
    "gov_report": _Official("rouge_l", 512, True, "91c25d585b189ced91c9280efcb4ecb5dcff9548cd4e3bfae66c68025b569e95"),
    "qmsum": _Official("rouge_l", 512, True, "dca23b678fe0183bbd9555b57947022aed1b85739da5ad7e1b4708dd0c71c409"),
    "multi_news": _Official("rouge_l", 512, True, "2af3f28c40b902e6535d4910510d51653613c49de9b2fc287c5958395061101d"),
    "trec": _Official("classification", 64, False, "0eff8bebdba99d91e9d7d91b6ab39455ac74648bea92c9255c9f68c62175b2db"),
    "triviaqa": _Official("qa_f1", 32, False, "00a802e6377e72fca39b169cf6c28893bedf23ba7286b03ecd15867c3e27a7c4"),
    "samsum": _Official("rouge_l", 128, False, "a68d884234907eefcaa0eacf7b2997f60fa46603988dceae6a44f9b49f045b3f"),
    "passage_count": _Official("count", 32, True, "986550b6c61009c629a4535766d94b7b51e2b2b9e1ed169e4ecb54417466e964"),
    "passage_retrieval_en":
        _Official("retrieval", 32, True, "39b96b7fa52bdd2aa2bde34ea199158505201b9a0a2c3ce94e80249293f60431"),
    "lcc": _Official("code_sim", 64, False, "6a1f24cf0bb83cd90f1fca8f0dd24801626c2aaea29db834ddc83b950e71190e"),
    "repobench-p": _Official("code_sim", 64, False, "ee9ec182ea5ffeb70a7140d55baea97264a8612d88226d323afa90859c36240c"),
})
# fmt: on

_FIRST_LINE = frozenset({"trec", "triviaqa", "samsum"})  # only the first line of an answer is scored

# White space that lm-eval's templates lack: what stands there, and officially.
_MENDED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "triviaqa": ("{context}\n{input}", "{context}\n\n{input}"),
        "samsum": ("{context}\n{input}", "{context}\n\n{input}"),
        "passage_count": ("answer is:", "answer is: "),
        "passage_retrieval_en": ("answer is:", "answer is: "),
        "lcc": ("line of code:", "line of code:\n"),
        "repobench-p": ("line of code:", "line of code:\n"),
    }
)


def official_template(name: str) -> str:
    """Return a task's official template, with its fields {context} and {input}.

    Raises:
        ImportError: lm-eval, whose templates are read, is not installed.
        ValueError: the installed lm-eval has another template, which white space alone does not mend.
    """
    path = lm_eval_file(f"tasks/longbench/{name}.yaml")
    read = str(yaml_field(path, "doc_to_text"))
    for field, ours in (("context", "context"), ("question", "input"), ("input", "input")):
        read = read.replace(f"{{{{{field}}}}}", f"{{{ours}}}")
    found = [read, read.replace(*_MENDED[name])] if name in _MENDED else [read]
    for template in found:
        if hashlib.sha256(template.encode()).hexdigest() == _OFFICIAL[name].template_sha256:
            return template
    raise ValueError(f"{path} must hold LongBench's official template of {name}, and does not; install lm-eval 0.4.13")


class Fitted(NamedTuple):
    """A prompt that fits.

    Attributes:
        context: up to the end of the document.
        question: the rest.
        tokens_cut: how many tokens were cut out of its middle.
        tokens_kept: to how many it was cut at most.
    """

    context: str
    question: str
    tokens_cut: int
    tokens_kept: int


def fit(prepared: Preparation, context: str, question: str, max_new_tokens: int) -> Fitted:
    """Cut a prompt in its middle as LongBench does: the whole of it, question included, before the chat template.

    It is cut to `prepared.length` tokens where that is given, as papers state it (31500 and 127500 are usual), and in
    any case to what leaves room for the chat template and the answer in `prepared.max_length`. Where the question is
    longer than the last half, the context ends where the prompt was cut.

    Args:
        prepared: what the prompt is for.
        context: the prompt up to the end of the document.
        question: the rest.
        max_new_tokens: tokens of the answer.

    Raises:
        ValueError: there is room for fewer than 2 tokens.
    """
    tokenizer, whole = prepared.tokenizer, context + question
    template = len(encode(tokenizer, render(tokenizer, "", "", chat=True))[0]) if prepared.chat else 0
    room = prepared.max_length - max_new_tokens - template
    kept = room if prepared.length is None else min(prepared.length, room)
    while True:
        text, cut = truncate_middle(tokenizer, whole, kept)
        # Where the halves meet, encoding them again may take a few tokens more.
        beyond = len(tokenizer(text)["input_ids"]) - room if cut else 0
        if beyond <= 0:
            break
        kept -= beyond
    if not cut:
        return Fitted(context, question, 0, kept)
    if text.endswith(question):
        return Fitted(text[: len(text) - len(question)], question, cut, kept)

    # The question was cut into, or does not read the same once decoded: its tokens tell where it begins.
    asked = min(len(tokenizer(question, add_special_tokens=False)["input_ids"]), kept // 2)
    ids = tokenizer(whole, truncation=False)["input_ids"]
    end = len(text) - len(tokenizer.decode(ids[-asked:], skip_special_tokens=True))
    return Fitted(text[:end], text[end:], cut, kept)


def _rows(name: str, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    member = f"data/{name}.jsonl"
    if data_dir is None:
        return read_jsonl(hub_file(_REPO, "data.zip"), member)
    path = data_file(data_dir, f"{name}.jsonl", member, "data.zip")
    return read_jsonl(path, member if path.suffix == ".zip" else None)


def _samples(name: str, prepared: Preparation) -> Sequence[Sample]:
    """Make the first `prepared.count` samples, or as many as the data have."""
    # The data first: where both are missing, they are harder to come by.
    rows = list(islice(_rows(name, prepared.data_dir), prepared.count))
    before, after = official_template(name).split("{context}")
    new_tokens = _OFFICIAL[name].max_new_tokens
    samples = []
    for number, row in enumerate(rows, start=1):
        check_fields(row, _FIELDS, f"row {number} of {name}")
        fitted = fit(prepared, before + row["context"], after.replace("{input}", row["input"]), new_tokens)
        turn = Turn(
            question=fitted.question,
            answers=tuple(str(answer) for answer in row["answers"]),
            max_new_tokens=new_tokens,
            extra={"all_classes": row["all_classes"]},
        )
        notes = {"tokens_cut": fitted.tokens_cut, "tokens_kept": fitted.tokens_kept, "words": row["length"]}
        samples.append(Sample(id=str(row["_id"]), context=fitted.context, turns=(turn,), notes=notes))
    return samples


def _score(name: str, prediction: str, turn: Turn) -> float:
    """Score an answer by the task's official metric."""
    if name in _FIRST_LINE:
        prediction = metrics.first_line(prediction)
    if _OFFICIAL[name].metric == "classification":
        return metrics.classification(prediction, turn.answers, turn.extra["all_classes"])
    return _METRICS[_OFFICIAL[name].metric](prediction, turn.answers)


_METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    {
        "qa_f1": metrics.qa_f1,
        "rouge_l": metrics.rouge_l,
        "count": metrics.count,
        "retrieval": metrics.retrieval,
        "code_sim": metrics.code_sim,
    }
)

TASKS = tuple(
    Task(
        name=name,
        group="longbench",
        version=1,
        source="THUDM/LongBench (MIT), templates by way of lm-eval",
        metric=official.metric,
        samples=functools.partial(_samples, name),
        score=functools.partial(_score, name),
        sized=False,
        chat=official.chat,
    )
    for name, official in _OFFICIAL.items()
)
