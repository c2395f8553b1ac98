"""Retention: what a long conversation about one document still knows of it, turn by turn.

`python -m studies retention -o results/retention` asks for facts of a document (numbers, spread over it), one a
turn, in one conversation by the chat template. Every answer is teacher-forced: the right digits go in whatever the
model would have said, so that all methods answer the same questions after the same conversation. Measured are the mean
negative log-likelihood of an answer's digits, in nats a digit, and recall: whether greedy decoding gives the number,
which it does exactly if every right digit is the most likely one after those before it.

The order of the questions has nothing to do with where the facts stand. The benchmark is ours; that a first question's
eviction loses what later ones need is the motivation of RocketKV-MT (arXiv 2502.14051).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from rocketkv._version import __version__
from rocketkv.environment import machine
from rocketkv.eval.intervals import Interval, paired_interval, wilson
from rocketkv.eval.journal import Journal
from rocketkv.eval.methods import FULL, Full, Method, find_method
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest, write_atomically
from rocketkv.hf.cache import begin_prompt
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.loading import SMOLLM2, load_model
from rocketkv.hf.models import CACHE_ARGUMENT
from rocketkv.hf.prompts import continued, encode, follow_up, render

from .fact_documents import Document, document

VERSION = 2
ARMS = (FULL, "rocketkv", "rocketkv-mt", "rocketkv-mt+")
LATE = 3  # the turn from which on a further row sums up: a question or two may fit in what the first one kept

_HEAD = "Read the following text. I will ask you about it afterwards.\n\n"
TAIL = 64  # tokens of a first prompt that every arm reads for itself: more than any observation window here


class Turn(NamedTuple):
    """What a turn reads, and the answer.

    Attributes:
        given: token ids of the prompt; from the second turn on after the last token of the answer before.
        answer: token ids of the number, and of a space before it where that is a token of its own.
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
        ValueError: not even the facts fit.
    """
    low, high = facts, max(facts, tokens // 4)  # sentences have five words at least
    if len(turns(tokenizer, document(seed, facts, low))[0].given) > tokens:
        raise ValueError(f"tokens must leave room for {facts} facts and as many sentences, got {tokens}; raise it")
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(turns(tokenizer, document(seed, facts, middle))[0].given) <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return document(seed, facts, low)


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


class Head(NamedTuple):
    """What was read of a batch's first prompts, padded on the left.

    Attributes:
        layers: keys and values [B, Hkv, n, D] of each layer.
        mask: [B, n + the tail], 0 at padding.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor


@torch.inference_mode()
def read(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Head:
    """Read first prompts but for their tails, one by one: up to there all arms are the same.

    Raises:
        ValueError: a prompt is too short for its tail.
    """
    if min(map(len, prompts)) <= TAIL:
        raise ValueError(f"a first prompt must have more than {TAIL} tokens, got {min(map(len, prompts))}")
    mask = _left_padded(prompts).to(model.device)
    longest = mask.shape[1]
    columns: list[list[tuple[Tensor, Tensor]]] = []
    for ids in prompts:
        cache: Any = Full().new_cache(model, len(ids))
        model(torch.tensor([ids[:-TAIL]], device=model.device), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        padding = (0, 0, longest - len(ids), 0)
        columns.append([(F.pad(layer.keys, padding), F.pad(layer.values, padding)) for layer in cache.layers])
    layers = []
    for column in zip(*columns, strict=True):
        keys, values = zip(*column, strict=True)
        layers.append((torch.cat(keys), torch.cat(values)))
    return Head(layers, mask)


@torch.inference_mode()
def scores(
    model: PreTrainedModel, method: Method, head: Head, conversations: Sequence[Sequence[Turn]]
) -> list[ScoreDict]:
    """Hold a batch of conversations by one method.

    Args:
        model: full attention in every layer, with no method attached; none is afterwards.
        method: how to compress.
        head: `read` of the first prompts; it stays as it is.
        conversations: of each document, see `turns`; with as long answers in every turn.
    """
    found: list[ScoreDict] = [{"nll": [], "right": []} for _ in conversations]
    length = head.mask.shape[1]
    with method.attached(model):
        cache = method.new_cache(model, length)
        adopt(cache, head, length)
        seen, mask = length - TAIL, head.mask

        def forward(ids: list[list[int]]) -> Tensor:
            nonlocal seen, mask
            longest = max(map(len, ids))
            given = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=model.device)
            seen += longest
            if seen > mask.shape[1]:
                mask = torch.cat((mask, _left_padded(ids).to(mask)), dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -longest:]
            output = model(
                given, position_ids=positions, attention_mask=mask, **{CACHE_ARGUMENT: cache}, logits_to_keep=1
            )
            logits: Tensor = output.logits[:, -1]
            return logits.float().log_softmax(-1)

        for number in range(len(conversations[0])):
            if number:
                # The last token of an answer is read with what follows it, as `generate` does.
                unread = [[talk[number - 1].answer[-1], *talk[number].given] for talk in conversations]
            else:
                unread = [talk[0].given[-TAIL:] for talk in conversations]
            begin_prompt(cache, seen + max(map(len, unread)))
            steps = [forward(unread)]
            for step in range(len(conversations[0][number].answer) - 1):
                steps += [forward([[talk[number].answer[step]] for talk in conversations])]
            for row, talk in enumerate(conversations):
                _score(found[row], talk[number], [step[row] for step in steps])
    return found


def _score(found: ScoreDict, turn: Turn, predicted: Sequence[Tensor]) -> None:
    """Add a turn's figures, given the log-probabilities [vocabulary] of each token of its answer."""
    digits = [(row, token) for row, token, counts in zip(predicted, turn.answer, turn.counted, strict=True) if counts]
    found["nll"].append(fmean(-float(row[token]) for row, token in digits))
    found["right"].append(all(int(row.argmax()) == token for row, token in digits))


def _left_padded(prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the mask [B, longest] of prompts, 0 at padding."""
    longest = max(map(len, prompts))
    return torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])


def batches(conversations: Sequence[Sequence[Turn]], size: int) -> list[list[int]]:
    """Return which conversations to hold together: at most `size`, with as long answers, in their order."""
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


def adopt(cache: Cache, head: Head, prompt_length: int) -> None:
    """Give an empty cache what has been read of its prompts."""
    valid = head.mask[:, :-TAIL].bool()
    for number, (keys, values) in enumerate(head.layers):
        layer: Any = cache.layers[number]
        if isinstance(layer, RocketKVLayer):
            layer.store.extend(keys, values, None if bool(valid.all()) else valid, expected=prompt_length)
        else:
            cache.update(keys, values, number)


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
    return {
        "mean": fmean(values) - fmean(reference),
        "interval": None if interval is None else list(interval),
    }


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table in Markdown: nats a digit, differences with 95 % intervals over documents, and recall."""
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
class Settings:
    """What is measured; its fields are those of the command line."""

    model: str = SMOLLM2
    documents: int = 10
    facts: int = 8
    tokens: int = 2048
    budget: int = 256
    kernel_size: int | None = None
    seed: int = 0
    batch: int = 5


def study(settings: Settings, journal: Journal) -> dict[str, Any]:
    """Measure what the journal does not have yet; return settings, figures of every document, and the table."""
    model, tokenizer = load_model(settings.model)
    fields = {} if settings.kernel_size is None else {"kernel_size": settings.kernel_size}
    methods = [find_method(arm, *((None, None) if arm == FULL else (settings.budget, fields))) for arm in ARMS]
    places = range(settings.documents)
    texts = [fitted(tokenizer, settings.seed + number, settings.facts, settings.tokens) for number in places]
    conversations = [turns(tokenizer, text) for text in texts]
    found: dict[str, list[Any]] = {arm: [None] * settings.documents for arm in ARMS}
    groups = batches(conversations, settings.batch)
    with Progress("beginning", total=len(groups) * len(ARMS)) as progress:
        for group in groups:
            talks = [conversations[number] for number in group]
            head: Head | None = None
            for method in methods:
                progress.say(f"documents {', '.join(str(number + 1) for number in group)}: {method.name}")
                bound = [method.name, method.token_budget, None if method.name == FULL else fields]
                key = digest([VERSION, __version__, settings.model, *bound, talks])
                if journal.get(key) is None:
                    head = read(model, [talk[0].given for talk in talks]) if head is None else head
                    journal.put(key, scores(model, method, head, talks))
                for number, score in zip(group, journal.get(key), strict=True):
                    found[method.name][number] = score
                progress.step()
    return {
        "version": VERSION,
        "settings": asdict(settings),
        "machine": {**machine(), "transformers": transformers.__version__, "rocketkv": __version__},
        "prompt_tokens": [len(conversation[0].given) for conversation in conversations],
        "documents": found,
        "table": rows(found),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or go on with it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    defaults = Settings()
    parser.add_argument("--model", default=defaults.model, help="a hub name, a local folder, or smollm2 (the default)")
    for name, what in (
        ("documents", "how many"),
        ("facts", "of each document, one a turn"),
        ("tokens", "of the first prompt, at most"),
        ("budget", "tokens a decode step of the compressed arms"),
        ("kernel-size", "odd width of the pooling that their stage 1 ranks by"),
        ("seed", "of the first document; the next ones have those after it"),
        ("batch", "documents at once, which share the split of the longest"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default {'its own' if default is None else default})"
        )
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where to put OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(**{name: getattr(args, name) for name in asdict(defaults)})
    paths = {ending: args.output.with_name(f"{args.output.name}.{ending}") for ending in ("json", "md", "journal")}
    result = study(settings, Journal(paths["journal"]))
    write_atomically(paths["json"], json.dumps(result, indent=1) + "\n")
    table = markdown(result["table"])
    write_atomically(paths["md"], table)
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
