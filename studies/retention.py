"""Recall of a document over the turns of a conversation.

Each turn of a conversation asks for a fact of the document (a number), by the chat template. Answers are
teacher-forced, so that all methods answer the same questions after the same conversation. Measured are the mean
negative log-likelihood of an answer's digits, in nats a digit, and recall: whether greedy decoding gives the number,
that is, whether every right digit is the most likely one.

The facts are spread over the document, and the questions come in random order. A first question's eviction may drop
tokens that later questions need, which motivates RocketKV-MT (arXiv 2502.14051).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypedDict

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocketkv._version import __version__
from rocketkv.eval.intervals import Interval, paired_interval, wilson
from rocketkv.eval.methods import FULL, Method, find_method
from rocketkv.eval.prefill import ReadPrompt, read_prompt, start
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest
from rocketkv.hf.prompts import continued, encode, follow_up, render

from .fact_documents import Document, document
from .settings import StudySettings, journal_of, option

VERSION = 2
ARMS = (FULL, "rocketkv", "rocketkv-mt", "rocketkv-mt+")
LATE = 3  # first turn of a further row over all late turns; earlier ones may need only what the first one kept

_HEAD = "Read the following text. I will ask you about it afterwards.\n\n"


class Turn(NamedTuple):
    """The prompt of a turn and its answer.

    Attributes:
        given: token ids of the prompt; from the second turn on after the last token of the answer before.
        answer: token ids of the number, and of a space before it where that is a separate token.
        counted: which of those are digits.
    """

    given: list[int]
    answer: list[int]
    counted: list[bool]


class ScoreDict(TypedDict):
    """One document's figures, a number a turn."""

    nll: list[float]
    right: list[bool]


def fitted(tokenizer: PreTrainedTokenizerBase, seed: int, facts: int, tokens: int) -> Document:
    """Return the longest `document` of a seed whose first prompt has at most `tokens` tokens.

    Raises:
        ValueError: the facts alone do not fit.
    """

    def length(sentences: int) -> int:
        return len(turns(tokenizer, document(seed, facts, sentences))[0].given)

    sizes = range(facts, max(facts, tokens // 4) + 1)  # sentences have five words at least
    fitting = bisect.bisect_right(sizes, tokens, key=length)
    if not fitting:
        raise ValueError(f"tokens must leave room for {facts} facts and as many sentences, got {tokens}; raise it")
    return document(seed, facts, sizes[fitting - 1])


def turns(tokenizer: PreTrainedTokenizerBase, given: Document) -> list[Turn]:
    """Return the tokens of the conversation, turn by turn.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    found = []
    for number, fact in enumerate(given.facts):
        if not number:
            prompt = render(tokenizer, f"{_HEAD}{given.text}\n\n", fact.question, fact.begin, chat=True)
            ids = encode(tokenizer, prompt)[0]
        else:
            ids = continued(
                tokenizer,
                f" {given.facts[number - 1].end}." + follow_up(tokenizer, fact.question, fact.begin, chat=True),
            )
        answer = continued(tokenizer, f" {fact.number}")
        pieces = [str(tokenizer.decode([token])) for token in answer]
        found.append(Turn(ids, answer, [any(map(str.isdigit, piece)) for piece in pieces]))
    return found


def scores(
    model: PreTrainedModel, method: Method, shared: ReadPrompt, conversations: Sequence[Sequence[Turn]]
) -> list[ScoreDict]:
    """Run a batch of conversations by one method.

    Args:
        model: full attention in every layer, with no method attached; none is afterwards.
        method: how to compress.
        shared: of the first prompts; it stays unchanged.
        conversations: of each document, see `turns`; the answers of a turn are of equal length.
    """
    results: list[ScoreDict] = [{"nll": [], "right": []} for _ in conversations]
    with method.attached(model):
        loop = start(model, method, shared)
        for number, turn in enumerate(conversations[0]):
            if number:
                # The last token of an answer is read with the next prompt, as `generate` does.
                loop.prefill([[talk[number - 1].answer[-1], *talk[number].given] for talk in conversations])
            steps = [loop.logits.float().log_softmax(-1)]
            for step in range(len(turn.answer) - 1):
                logits = loop.step([[talk[number].answer[step]] for talk in conversations])
                steps.append(logits.float().log_softmax(-1))
            for row, talk in enumerate(conversations):
                _score(results[row], talk[number], [step[row] for step in steps])
    return results


def _score(found: ScoreDict, turn: Turn, predicted: Sequence[Tensor]) -> None:
    """Add a turn's figures, given the log-probabilities [vocabulary] of each token of its answer."""
    digits = [(row, token) for row, token, counts in zip(predicted, turn.answer, turn.counted, strict=True) if counts]
    found["nll"].append(fmean(-float(row[token]) for row, token in digits))
    found["right"].append(all(int(row.argmax()) == token for row, token in digits))


def batches(conversations: Sequence[Sequence[Turn]], size: int) -> list[list[int]]:
    """Return batches of conversations, at most `size` each, whose answers are of equal length."""
    found: list[list[int]] = []
    shapes = [[len(turn.answer) for turn in conversation] for conversation in conversations]
    for number in range(len(conversations)):
        for batch in found:
            if len(batch) < size and shapes[batch[0]] == shapes[number]:
                batch.append(number)
                break
        else:
            found.append([number])
    return found


def rows(found: Mapping[str, Sequence[ScoreDict]]) -> list[dict[str, Any]]:
    """Return the table: a row a turn, and one of all turns from the third on.

    Args:
        found: of each arm, the same documents in the same order.

    Returns:
        Rows with `turns` (the first and the last, from 1), for each arm `nll`, `right` and `asked`, and for pairs of
        arms the mean `difference` of nll and its 95 % interval, over documents.

    Raises:
        ValueError: arms have different documents, or none.
    """
    sizes = {len(samples) for samples in found.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"every arm must have the same documents, one at least; got {sorted(sizes)} of them")
    count = len(next(iter(found.values()))[0]["nll"])
    spans = [(turn, turn) for turn in range(1, count + 1)]
    if count > LATE:
        spans.append((LATE, count))
    table = []
    for first, last in spans:
        nll = {arm: [fmean(sample["nll"][first - 1 : last]) for sample in samples] for arm, samples in found.items()}
        right = {arm: [flag for sample in samples for flag in sample["right"][first - 1 : last]]
                 for arm, samples in found.items()}  # fmt: skip
        table.append(
            {
                "turns": [first, last],
                "arms": {arm: {"nll": fmean(nll[arm]), "right": sum(right[arm]), "asked": len(right[arm])}
                         for arm in found},
                "differences": {f"{one} - {other}": _difference(nll[one], nll[other]) for one, other in pairs(found)},
            }
        )  # fmt: skip
    return table


def pairs(arms: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return which arms are compared: each with the first, and those after the second with that."""
    names = list(arms)
    return [(name, names[0]) for name in names[1:]] + [(name, names[1]) for name in names[2:]]


def _difference(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    interval: Interval | None = paired_interval(values, reference)
    return {"mean": fmean(values) - fmean(reference), "interval": None if interval is None else list(interval)}


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table: nats a digit, differences with 95 % intervals over documents, and recall."""
    table = result["table"]
    arms, compared = list(table[0]["arms"]), list(table[0]["differences"])
    head = ["turn", *arms, *compared, *(f"recall {arm}" for arm in arms)]
    lines = [f"| {' | '.join(head)} |", "|--" * len(head) + "|"]
    for row in table:
        first, last = row["turns"]
        cells = [str(first) if first == last else f"{first}-{last}"]
        cells += [f"{row['arms'][arm]['nll']:.3f}" for arm in arms]
        for name in compared:
            difference = row["differences"][name]
            ends = difference["interval"]
            between = "" if ends is None else f" ({ends[0]:+.3f} to {ends[1]:+.3f})"
            cells.append(f"{difference['mean']:+.3f}{between}")
        for arm in arms:
            right, asked = row["arms"][arm]["right"], row["arms"][arm]["asked"]
            # Turns of one document are not independent: no interval for several together.
            low, high = wilson(right, asked)
            cells.append(f"{right}/{asked}" + (f" ({low:.2f}-{high:.2f})" if first == last else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    seed: int = option(0, "of the first document; the next ones have the seeds after it")
    documents: int = option(10, "number of documents")
    facts: int = option(8, "of each document, one a turn")
    tokens: int = option(2048, "of the first prompt, at most")
    budget: int = option(256, "tokens a decode step of the compressed arms")
    kernel_size: int | None = option(None, "odd pooling width of their stage 1", type=int)
    batch: int = option(5, "documents in a batch, which share the split of the longest")


def study(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Return figures of every document and the table; the journal keeps those of each batch and method."""
    journal = journal_of(folder)
    fields = {} if settings.kernel_size is None else {"kernel_size": settings.kernel_size}
    methods = [find_method(arm, *((None, None) if arm == FULL else (settings.budget, fields))) for arm in ARMS]
    seeds = range(settings.seed, settings.seed + settings.documents)
    texts = [fitted(tokenizer, seed, settings.facts, settings.tokens) for seed in seeds]
    conversations = [turns(tokenizer, text) for text in texts]
    results: dict[str, list[Any]] = {arm: [None] * settings.documents for arm in ARMS}
    groups = batches(conversations, settings.batch)
    with Progress("beginning", total=len(groups) * len(ARMS)) as progress:
        for group in groups:
            talks = [conversations[number] for number in group]
            shared: ReadPrompt | None = None
            for method in methods:
                progress.say(method.name)
                settings_of = [method.name, method.token_budget, None if method.name == FULL else fields]
                key = digest([VERSION, __version__, *settings.weights, *settings_of, talks])
                if journal.get(key) is None:
                    shared = read_prompt(model, [talk[0].given for talk in talks]) if shared is None else shared
                    journal.put(key, scores(model, method, shared, talks))
                for number, score in zip(group, journal.get(key), strict=True):
                    results[method.name][number] = score
                progress.step()
    return {
        "version": VERSION,
        "prompt_tokens": [len(conversation[0].given) for conversation in conversations],
        "documents": results,
        "table": rows(results),
    }
