"""Cost of compressing a document before the question: query-agnostic beside query-aware.

A document with facts (numbers) is asked for each of them. Query-aware, document and question are one prompt, and
compressed together. Query-agnostic, the document is read and compressed alone, as a server or a file keeps it; each
question is a prompt of its own after it, and the cache returns to the document. Right answers are teacher-forced.
Measured are the KL to the full cache over the answer's digits, in nats a digit, and recall: whether every right digit
is the most likely one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv._version import __version__
from rocketkv.eval.conversation import AGNOSTIC, AWARE
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.intervals import paired_interval, wilson
from rocketkv.eval.methods import FULL
from rocketkv.eval.prefill import ReadPrompt, read_prompt, start
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest
from rocketkv.hf.prompts import continued, encode, render

from .fact_documents import Fact
from .recall import method_of
from .retention import fitted
from .settings import StudySettings, journal_of, option

VERSION = 1
ARMS = ("rocketkv:256", "rocketkv+:256", "rocketkv-mt+:256")
_HEAD = "Read the following text. I will ask you about it afterwards.\n\n"


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    documents: int = option(6, "number of documents")
    facts: int = option(4, "numbers in each document, and questions about it")
    tokens: int = option(2048, "of a document with a question")
    arms: tuple[str, ...] = option(ARMS, "METHOD:BUDGET; the full cache is always measured")


def prompt_of(tokenizer: PreTrainedTokenizerBase, text: str, fact: Fact) -> tuple[list[int], int]:
    """Return the token ids of document and question, and how many of them are the document's."""
    prompt = render(tokenizer, f"{_HEAD}{text}", f"\n\n{fact.question}", fact.begin, chat=True)
    return encode(tokenizer, prompt, apart=True)


def digits(loop: DecodeLoop, answer: list[int], counted: list[bool]) -> tuple[list[Tensor], bool]:
    """Return the log-probabilities [vocabulary] that predict each digit of a teacher-forced answer, and recall."""
    rows = []
    for token, counts in zip(answer, counted, strict=True):
        rows.append((loop.logits[0].float().log_softmax(-1), token, counts))
        loop.step([[token]])
    kept = [(row, token) for row, token, counts in rows if counts]
    return [row for row, _ in kept], all(int(row.argmax()) == token for row, token in kept)


def divergence(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the mean KL(expected || found) of a digit, in nats."""
    pairs = zip(expected, found, strict=True)
    return fmean(float((full.exp() * (full - other)).sum()) for full, other in pairs)


@torch.inference_mode()
def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Answer every question in both modes by every arm; the journal keeps each document's figures."""
    journal, cells = journal_of(folder), []
    methods = {arm: method_of(arm) for arm in (FULL, *settings.arms)}
    with Progress("reading", total=settings.documents) as progress:
        for number in range(settings.documents):
            seed = settings.seed + number
            made = fitted(tokenizer, seed, settings.facts, settings.tokens)
            key = digest([VERSION, __version__, *settings.weights, settings.arms, made.text])
            if journal.get(key) is None:
                prompts = [prompt_of(tokenizer, made.text, fact) for fact in made.facts]
                answers = [_answer(tokenizer, fact) for fact in made.facts]
                whole = [read_prompt(model, [ids]) for ids, _ in prompts]
                head = read_prompt(model, [prompts[0][0][: prompts[0][1]]])
                found: dict[str, dict[str, list[Any]]] = {}
                for arm, method in methods.items():
                    with method.attached(model):
                        aware = [
                            digits(start(model, method, shared), *answer)
                            for shared, answer in zip(whole, answers, strict=True)
                        ]
                        tails = [ids[length:] for ids, length in prompts]
                        agnostic = _agnostic(model, method, head, tails, answers)
                    found[arm] = {AWARE: aware, AGNOSTIC: agnostic}
                full = [rows for rows, _ in found[FULL][AWARE]]
                journal.put(
                    key,
                    {
                        arm: {
                            mode: {
                                "kl": [divergence(one, rows) for one, (rows, _) in zip(full, each, strict=True)],
                                "right": [right for _, right in each],
                            }
                            for mode, each in modes.items()
                        }
                        for arm, modes in found.items()
                    },
                )
            cells.append(journal.get(key))
            progress.step()
    return {"version": VERSION, "documents": cells}


def _answer(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> tuple[list[int], list[bool]]:
    """Return the token ids of a fact's number, and which of them are digits."""
    answer = continued(tokenizer, f" {fact.number}")
    return answer, [any(map(str.isdigit, str(tokenizer.decode([token])))) for token in answer]


def _agnostic(
    model: PreTrainedModel, method: Any, head: ReadPrompt, tails: list[list[int]], answers: list[Any]
) -> list[tuple[list[Tensor], bool]]:
    """Return what `digits` does for each question after the document alone."""
    loop = start(model, method, head)
    after = loop.snapshot()
    found = []
    for tail, answer in zip(tails, answers, strict=True):
        loop.rollback(after)
        loop.prefill([tail])
        found.append(digits(loop, *answer))
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return a row for each arm and mode: KL, its difference to the other mode, and recall."""
    settings, documents = result["settings"], result["documents"]
    summary = (
        f"{settings['model']}, {settings['documents']} documents of {settings['tokens']} tokens with "
        f"{settings['facts']} questions each; KL in nats a digit, 95 % intervals over documents."
    )
    lines = [
        summary,
        "",
        "| cache | question | KL to the full cache | more than query-aware | right |",
        "|--|--|--|--|--|",
    ]
    for arm in documents[0]:
        kl = {mode: [fmean(document[arm][mode]["kl"]) for document in documents] for mode in (AWARE, AGNOSTIC)}
        for mode, text in ((AWARE, "before"), (AGNOSTIC, "after")):
            right = [flag for document in documents for flag in document[arm][mode]["right"]]
            low, high = wilson(sum(right), len(right))
            interval = paired_interval(kl[mode], kl[AWARE]) if mode == AGNOSTIC else None
            more = f"{fmean(kl[mode]) - fmean(kl[AWARE]):+.3f}" if mode == AGNOSTIC else "-"
            more += "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
            lines.append(
                f"| `{arm}` | {text} compression | {fmean(kl[mode]):.3f} | {more} | "
                f"{sum(right)}/{len(right)} ({low:.2f} to {high:.2f}) |"
            )
    return "\n".join(lines) + "\n"
