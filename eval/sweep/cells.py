"""Records of cells, and the cells that run as a whole: stock tasks of lm-eval, and `latency`."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...hf.prompts import ChatOptions, longest
from ...hf.thinking import thinking_tags
from ..intervals import mean_interval
from ..measures.apart import measure_apart
from ..measures.arms import find_arm
from ..measures.latency import measure_latency
from ..measures.memory import is_out_of_memory
from ..methods import Method, find_method
from ..records import SCHEMA, CellDict, CostDict, DataDict, Record, SampleDict, cell_key, digest
from ..served import Served
from ..tasks.base import Preparation
from .plan import LATENCY, LM_EVAL
from .provenance import provenance
from .ranks import Ranks


@dataclass(frozen=True)
class Session:
    """The model and folders that cells run on.

    Attributes:
        model: a model to which no method is attached.
        tokenizer: its tokenizer.
        results: the folder of the results.
        data_dir: a folder with the benchmarks' files; None for the hub.
        retry_out_of_memory: whether to run cells again that ran out of memory.
        ranks: the processes among which the model is divided; None: this one has all of it.
        url: of a server that answers in place of the model; None: the model itself.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    results: Path
    data_dir: Path | None
    retry_out_of_memory: bool = False
    ranks: Ranks | None = None
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a cell before it becomes a record; the fields are those of `Record`."""

    metric: str
    samples: list[SampleDict]
    data: DataDict
    higher_is_better: bool = True
    values: Mapping[str, float | None] | None = None
    details: Mapping[str, Any] | None = None
    cost: CostDict | None = None
    score: float | None = None


def is_whole(cell: CellDict) -> bool:
    """Whether a cell runs as a whole, without answers that a later run continues from."""
    return cell["task"] == LATENCY or cell["task"].startswith(LM_EVAL)


def run_whole(session: Session, cell: CellDict) -> Record:
    """Run a cell that runs as a whole, and return its record.

    Raises:
        ValueError: the cell's task or method cannot run on this model, or its data are missing.
    """
    run = _latency if cell["task"] == LATENCY else _stock_task
    return record_of(session, cell, run(session, cell))


def method_of(session: Session, cell: CellDict) -> Method:
    """Return a cell's method."""
    if session.url is not None:
        return Served(name=cell["method"], token_budget=cell["token_budget"], url=session.url)
    return find_method(cell["method"], cell["token_budget"], cell["settings"])


def preparation(session: Session, cell: CellDict) -> Preparation:
    """Return the settings that a cell's samples are made with."""
    return Preparation(
        tokenizer=session.tokenizer,
        length=cell["length"],
        count=cell["samples"],
        seed=cell["seed"],
        data_dir=session.data_dir,
        chat=cell["chat"],
        chat_options=chat_options(cell),
        max_length=longest(session.model.config) - cell["thinking_tokens"],
    )


def chat_options(cell: CellDict) -> ChatOptions:
    """Return how a cell's prompts are put into the chat template."""
    return ChatOptions(cell["chat_arguments"], thinking=cell["thinking_tokens"] > 0)


def _latency(session: Session, cell: CellDict) -> Outcome:
    length, new = cell["length"] or 0, cell["max_new_tokens"] or 0
    if length <= new:
        raise ValueError(f"length must be above the {new} tokens that latency generates, got {length}")
    lengths: dict[str, Any] = {"prompt_tokens": length - new, "new_tokens": new, "seed": cell["seed"]}
    lengths["batch_size"] = cell["batch_size"]
    if session.model.device.type == "cpu" and session.ranks is None:
        fields = ("model", "revision", "dtype", "attention", "method", "token_budget", "settings")
        named = {name: cell[name] for name in fields}  # type: ignore[literal-required]
        result = measure_apart(**named, threads=torch.get_num_threads(), **lengths)
    else:
        method = find_arm(cell["method"], cell["token_budget"], cell["settings"], new_tokens=new)
        result = measure_latency(session.model, method, **lengths)
    cost = result.cost()
    return Outcome(
        metric="seconds a token",
        samples=[],
        data={"sha256": digest(lengths), "source": "random tokens"},
        higher_is_better=False,
        values=result.values(),
        details=result.details(),
        cost=cost,
        score=cost["step_seconds"],
    )


def _stock_task(session: Session, cell: CellDict) -> Outcome:
    from ..lm import RocketKVLM, evaluate_stock_task  # lm-eval, which no other cell needs

    name = cell["task"].removeprefix(LM_EVAL)
    tags = thinking_tags(session.tokenizer)
    lm = RocketKVLM(
        session.model,
        method=method_of(session, cell),
        tokenizer=session.tokenizer,
        chat_template_args=cell["chat_arguments"],
        think_end_token=None if tags is None else tags.closing,
    )
    samples = evaluate_stock_task(
        lm, name, samples=cell["samples"], chat=cell["chat"], max_new_tokens=cell["max_new_tokens"]
    )
    data: DataDict = {"sha256": digest([sample["prompt_sha256"] for sample in samples]), "source": f"lm-eval: {name}"}
    return Outcome(metric=samples[0]["notes"]["metric"], samples=samples, data=data)


def record_of(session: Session, cell: CellDict, outcome: Outcome) -> Record:
    """Return the record of a complete cell."""
    scores = [sample["score"] for sample in outcome.samples]
    interval = mean_interval(scores, percent=outcome.higher_is_better) if scores else None
    return {
        "schema": SCHEMA,
        "key": cell_key(cell),
        "cell": cell,
        "status": "complete",
        "message": "",
        "metric": outcome.metric,
        "higher_is_better": outcome.higher_is_better,
        "score": fmean(scores) if scores else outcome.score,
        "interval": None if interval is None else list(interval),
        "values": dict(outcome.values or {}),
        "samples": outcome.samples,
        "cost": mean_cost([sample["cost"] for sample in outcome.samples]) if outcome.cost is None else outcome.cost,
        "data": outcome.data,
        "details": dict(outcome.details or {}),
        "provenance": provenance(session.model),
        "checksum": "",
    }


def unfinished_record(session: Session, cell: CellDict, error: BaseException, outcome: Outcome | None = None) -> Record:
    """Return the record of a cell that an error ended, with the samples that it had finished.

    Its status is `out_of_memory`, with the error's message, or `failed`, with the traceback.
    """
    short = is_out_of_memory(error)
    message = str(error) or type(error).__name__
    nothing = Outcome(metric="", samples=[], data={"sha256": "", "source": ""})
    record = record_of(session, cell, outcome or nothing)
    record["status"] = "out_of_memory" if short else "failed"
    record["message"] = message if short else "".join(traceback.format_exception(error))
    error.__traceback__ = None  # its frames hold the tensors of the work
    record["score"] = record["interval"] = None
    record["values"], record["cost"] = {}, {}
    return record


def mean_cost(costs: Sequence[CostDict]) -> CostDict:
    """Combine each field over the generations that have it: median of times, maximum of peaks, mean of others."""
    mean: dict[str, float | None] = {}
    for name in sorted({name for cost in costs for name in cost}):
        values: list[Any] = [cost.get(name) for cost in costs]
        known = [value for value in values if value is not None]
        combine = max if name.startswith("peak_") else median if "seconds" in name else fmean
        mean[name] = combine(known) if known else None
    return mean  # type: ignore[return-value]  # the same names
