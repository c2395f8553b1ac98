"""A tiny model with a tokenizer of its own in a folder, tasks of a few words, and cells for the harness to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import tiny
from rocketkv.eval.records import CellDict
from rocketkv.eval.sweep.cells import Session
from rocketkv.eval.sweep.plan import Loaded, Plan, cells
from rocketkv.eval.tasks import base as task_module
from rocketkv.eval.tasks.base import Preparation, Sample, Task, Turn
from rocketkv.hf.loading import load_model

VOCABULARY = 320
END = "<|end|>"
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Byte-level BPE learns these words whole; all others become pieces.
_TEXT = "the grass is green and one of many special magic numbers for the question is what are they that 0123456789 "


def tokenizer(*, chat: bool = True) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer, which knows every text, with a chat template where asked for."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|pad|>", END, "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([_TEXT] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", eos_token=END)
    wrapped.chat_template = CHAT if chat else None
    return wrapped


def model(seed: int = 0) -> PreTrainedModel:
    """Build a tiny model whose vocabulary is the tokenizer's."""
    made = tiny.build("llama", seed=seed, vocab_size=VOCABULARY, eos_token_id=1)
    made.generation_config.eos_token_id = 1
    return made


def save(folder: Path, *, chat: bool = True) -> Path:
    """Save model and tokenizer into a folder, from where the usual classes load them; return it."""
    model().save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder


def make_session(folder: Path, results: Path, data_dir: Path | None = None) -> Session:
    """Return a session with the model of a folder."""
    return Session(*load_model(str(folder), torch.float32), results, data_dir)


def words(seed: int, count: int) -> str:
    """Return a text of some words, of no sense."""
    known = _TEXT.split()
    return " ".join(known[(seed * 7 + place * place) % len(known)] for place in range(count))


def sample(number: int = 0, *, turns: int = 1, length: int = 60, **fields: Any) -> Sample:
    """Return a sample: a context of `length` words and short questions, whose answers the model does not know."""
    asked = [
        {"question": f"\nquestion {turn}: what is the number?", "answers": (f"{number}{turn}",), "max_new_tokens": 6}
        for turn in range(turns)
    ]
    made = tuple(Turn(**question | {"answer_prefix": " the number is"} | fields) for question in asked)
    return Sample(id=f"s{number}", context=words(number, length), turns=made, notes={"words": length})


def share_of_words(prediction: str, turn: Turn) -> float:
    """Score that differs from answer to answer: how much of a text is letters."""
    return 100.0 * sum(letter.isascii() for letter in prediction) / max(1, len(prediction))


def made_task(name: str = "made", *, turns: int = 1, **fields: Any) -> Task:
    """Return a task whose samples are as long as it is told, in words."""

    def samples(preparation: Preparation) -> Sequence[Sample]:
        return [sample(number, turns=turns, length=preparation.length or 40) for number in range(preparation.count)]

    known: dict[str, Any] = {
        "name": name,
        "group": "mine",
        "version": 1,
        "source": "made up",
        "metric": "letters",
        "samples": samples,
        "score": share_of_words,
    }
    return Task(**known | fields)


def know_tasks(monkeypatch: pytest.MonkeyPatch, *tasks: Task) -> None:
    """Let these be all the tasks that there are."""
    known: Mapping[str, Task] = MappingProxyType({task.name: task for task in tasks})
    monkeypatch.setattr(task_module, "catalogue", lambda: known)


def made_cells(model_name: str = "tiny", *, chat: bool = True, **fields: Any) -> list[CellDict]:
    """Return the cells of a small plan."""
    known: dict[str, Any] = {
        "model": model_name,
        "tasks": ("made",),
        "methods": ("full", "streaming"),
        "budgets": (24,),
        "lengths": (60,),
        "samples": 2,
        "max_new_tokens": 4,
    }
    return cells(Plan(**known | fields), Loaded(chat=chat))
