"""The samples of a cell, answered one by one: those of a task's questions, and those of `kl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, Protocol

from ..conversation import answer_sample
from ..measures.kl import METRIC as KL
from ..measures.kl import STEPS, Window, divergence_sample, divergence_values, find_text, texts
from ..methods import Method
from ..prefill import Prefills
from ..records import CellDict, DataDict, SampleDict, TurnDict, digest
from ..tasks.base import Sample, Task, find_tasks
from .cells import Outcome, Session, chat_options, mean_cost, preparation
from .samples import prepare


class Work(Protocol):
    """The samples that the cells of a group share."""

    @property
    def names(self) -> Sequence[str]:
        """A name of each sample, which differs where its content does."""

    @property
    def references(self) -> int:
        """Return the number of reads of each prompt in addition to the methods' own."""

    def item(self, number: int) -> Question | Window:
        """Return a sample for `answer_item`."""

    def outcome(self, results: Sequence[Any]) -> Outcome:
        """Return the outcome of a cell from the results of its samples, None where there is none."""


class Question(NamedTuple):
    """A sample of a task, and the number of one of the answers to it, from 0."""

    sample: Sample
    number: int


def answer_item(
    session: Session, cell: CellDict, item: Question | Window, method: Method, prefills: Prefills | None
) -> Any:
    """Run a method on a sample of a cell, and return the result in JSON's types.

    Returns:
        The fields of `Answers`, or the figures of a window as a `SampleDict`.
    """
    model = session.model
    if isinstance(item, Window):
        name, folder = f"{cell['model']} {cell['weights']}", session.results / "data"
        shared = folder if session.ranks is None else None  # all ranks must compute, or none
        options: dict[str, Any] = {"steps": STEPS, "model_name": name, "folder": shared}
        return divergence_sample(model, method, item, prefills=prefills, **options)
    fields = ("mode", "chat", "thinking_tokens", "max_new_tokens", "sampling")
    asked: dict[str, Any] = {name: cell[name] for name in fields}  # type: ignore[literal-required]
    asked |= {"chat_options": chat_options(cell), "seed": [cell["seed"], item.number]}
    return asdict(answer_sample(model, session.tokenizer, method, item.sample, prefills=prefills, **asked))


def work_of(session: Session, cell: CellDict) -> Work:
    """Return the samples of a cell, which are made where there are none yet.

    Raises:
        ValueError: they cannot be made for its length, or their data are missing.
        OSError: the data cannot be read.
        ImportError: a package is not installed that the score needs.
    """
    if cell["task"] == KL:
        return Divergence(texts(preparation(session, cell), find_text(session.data_dir)))
    (task,) = find_tasks([cell["task"]])
    if task.require is not None:
        task.require()  # a missing package must show before the answers, not after
    samples, data = prepare(session.results, task, preparation(session, cell))
    return Questions(task, samples, data, cell["answers"])


@dataclass(frozen=True)
class Questions:
    """Samples of a task, each answered once or several times."""

    task: Task
    samples: list[Sample]
    data: DataDict
    answers: int = 1
    references: ClassVar[int] = 0

    @property
    def names(self) -> list[str]:
        """The hash of the data, and the name of each sample, with the answer's number where there are several."""
        numbers = [f"#{number + 1}" for number in range(self.answers)] if self.answers > 1 else [""]
        return [f"{self.data['sha256']} {sample.id}{number}" for sample in self.samples for number in numbers]

    def item(self, number: int) -> Question:
        """Return a sample and the number of its answer."""
        return Question(self.samples[number // self.answers], number % self.answers)

    def outcome(self, results: Sequence[Any]) -> Outcome:
        """Score the answers; a sample is one question or conversation, so that intervals resample those."""
        samples = []
        for place, sample in enumerate(self.samples):
            given = [each for each in results[place * self.answers :][: self.answers] if each is not None]
            if given:
                samples.append(self._scored(sample, given))
        turns = [turn for sample in samples for turn in sample["turns"]]
        values = {"answer_tokens": fmean(turn["new_tokens"] for turn in turns)} if turns else {}
        values |= {"answers_cut_percent": 100 * fmean(turn["cut"] for turn in turns)} if turns else {}
        return Outcome(metric=self.task.metric, samples=samples, data=self.data, values=values)

    def _scored(self, sample: Sample, answers: Sequence[Mapping[str, Any]]) -> SampleDict:
        turns = [turn for each in answers for turn in self._turns(sample, each)]
        thoughts = [thought for each in answers for thought in each["thoughts"]]
        costs = [each["cost"] for each in answers]
        notes: dict[str, Any] = {"thinking": thoughts} if any(thoughts) else {}
        pace = max((each["pace"] for each in answers), key=len)
        if pace:
            notes["pace"] = pace
        return {
            "id": sample.id,
            "prompt_sha256": answers[0]["prompt_sha256"],
            "score": fmean(turn["score"] for turn in turns),
            "turns": turns,
            "cost": costs[0] if len(costs) == 1 else mean_cost(costs),
            "notes": dict(sample.notes) | notes,
        }

    def _turns(self, sample: Sample, answers: Mapping[str, Any]) -> list[TurnDict]:
        return [
            {
                "prediction": prediction,
                "answers": list(turn.answers),
                "score": float(self.task.score(prediction, turn)),
                "new_tokens": trace["tokens"],
                "cut": trace["cut"],
                "kv_bytes": [list(point) for point in trace["kv_bytes"]],
            }
            for prediction, turn, trace in zip(answers["predictions"], sample.turns, answers["traces"], strict=True)
        ]


@dataclass(frozen=True)
class Divergence:
    """Windows of a text for `kl`."""

    windows: list[Window]
    references: ClassVar[int] = 1  # the full cache's

    @property
    def names(self) -> list[str]:
        """The hash of each window's tokens."""
        return [digest(window.ids) for window in self.windows]

    def item(self, number: int) -> Window:
        """Return a window."""
        return self.windows[number]

    def outcome(self, results: Sequence[Any]) -> Outcome:
        """Return the figures of the windows together."""
        text = str(self.windows[0].notes["text"])
        hashed = digest([window.ids for window in self.windows])
        data: DataDict = {"sha256": hashed, "source": f"windows of text: {text}"}
        samples = [result for result in results if result is not None]
        values = divergence_values(samples) if samples else {}
        return Outcome(metric=KL, samples=samples, data=data, higher_is_better=False, values=values)
