"""The plan of a sweep, from flags or a YAML file, and its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ..._version import __version__
from ...budget import METHODS
from ...hf.loading import SMOLLM2
from ...options import AUTO, DTYPES
from ..measures.kl import METRIC as KL
from ..measures.kl import VERSION as KL_VERSION
from ..methods import FULL, KVPRESS, SETTINGS, find_method
from ..records import CellDict, cell_key, digest
from ..tasks.base import find_tasks, with_toy_haystacks

LATENCY = "latency"
LATENCY_VERSION = 1
LM_EVAL = "lm-eval:"  # before the name of a stock task
MEASURED = {KL: KL_VERSION, LATENCY: LATENCY_VERSION}  # tasks without questions
_TYPES: Mapping[str, tuple[type, ...]] = {  # of the fields that are no lists, which YAML may give any type
    "samples": (int,),
    "max_new_tokens": (int, type(None)),
    "seed": (int,),
    "model": (str,),
    "chat": (bool, type(None)),
    "agnostic": (bool,),
    "settings": (dict,),
    "revision": (str, type(None)),
    "attn": (str, type(None)),
    "device_map": (str, dict, type(None)),
    "tp": (int,),
    "chat_template_args": (dict,),
    "thinking_tokens": (int,),
    "answers": (int,),
    "toy_haystack": (bool,),
}
GREEDY, CARD = "greedy", "card"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep: methods x budgets x tasks x lengths.

    Attributes:
        model: a hub name, a local folder, or `smollm2`.
        revision: branch, tag or commit of the model on the hub.
        dtype: of the weights; `auto` is float32 on a CPU and bfloat16 elsewhere.
        attn: attention of transformers, such as `sdpa` or `flash_attention_2`; None for its choice.
        device_map: as that of transformers; None: one device.
        tp: processes of torchrun among which the model's heads are divided.
        tasks: names or groups of the harness's tasks; `kl`, `latency`; `lm-eval:NAME` for a stock task.
        methods: see `methods.find_method`.
        budgets: tokens a decode step; methods without one have a single cell.
        lengths: tokens of prompt and answer, for tasks of a given length; longer prompts of other tasks are truncated
            to it, by default to the model's length. Not for stock tasks of lm-eval.
        samples: of each task.
        max_new_tokens: most tokens of each answer; None leaves it to the task. Not for `kl` and `latency`.
        seed: of samples.
        chat: whether prompts use the model's chat template where the official rule of a task leaves it open; None: if
            the tokenizer has one.
        chat_template_args: variables of the chat template, such as `enable_thinking`.
        thinking_tokens: that a model may generate before each answer, in addition to the answer's.
        generation: `greedy`, or `card` for the generation settings of the model's card.
        answers: sampled to each question; a sample's score is their mean.
        toy_haystack: whether RULER's tasks hide their needles in generated prose instead of essays.
        agnostic: whether the context is compressed before the question is seen; never in stock tasks of lm-eval.
        settings: further fields of `RocketKVConfig`.
        data_dir: a folder with the benchmarks' files; None for the hub.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.
    """

    model: str = SMOLLM2
    revision: str | None = None
    dtype: str = AUTO
    attn: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    tp: int = 1
    tasks: tuple[str, ...] = ("niah_single_1", "needle_grid")
    methods: tuple[str, ...] = ("full", "rocketkv")
    budgets: tuple[int, ...] = (512,)
    lengths: tuple[int, ...] = ()
    samples: int = 50
    max_new_tokens: int | None = None
    seed: int = 0
    chat: bool | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    thinking_tokens: int = 0
    generation: str = GREEDY
    answers: int = 1
    toy_haystack: bool = False
    agnostic: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "budgets", "lengths"):
            values = getattr(self, name)
            kind = int if name in ("budgets", "lengths") else str
            if not isinstance(values, tuple) or not all(type(value) is kind for value in values):
                raise TypeError(f"{name} must be a list of {kind.__name__}, got {values!r}")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must not name anything twice, got {', '.join(map(str, values))}")
            if kind is int and min(values, default=1) < 1:
                raise ValueError(f"{name} must be at least 1, got {values}")
        for name, kinds in _TYPES.items():
            value = getattr(self, name)
            if type(value) not in kinds:
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{name} must be of type {wanted}, got {value!r}")
        least_of = {"samples": 1, "answers": 1, "tp": 1, "max_new_tokens": 1, "seed": 0, "thinking_tokens": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, known in (("dtype", (AUTO, *DTYPES)), ("generation", (GREEDY, CARD))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.answers > 1 and self.generation == GREEDY:
            raise ValueError(f"answers must be 1 where generation is greedy, got {self.answers}; use generation card")
        if not self.tasks or not self.methods:
            raise ValueError("a sweep needs at least one task and one method")
        if not self.budgets and set(self.methods) != {FULL}:
            raise ValueError(f"budgets must name at least one, for methods {', '.join(self.methods)}")
        unknown = sorted(set(self.settings) - set(SETTINGS))
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}; there are {', '.join(SETTINGS)}")


def plan_from(given: Mapping[str, Any]) -> Plan:
    """Make a plan of the fields of a YAML file or command line; a single value stands for a list of one.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is unknown or has an impossible value.
    """
    known = {known_field.name for known_field in fields(Plan)}
    values = dict(given)
    if "set" in values:  # the flag's name
        values["settings"] = values.pop("set")
    if "chat_template_arg" in values:  # likewise
        values["chat_template_args"] = values.pop("chat_template_arg")
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}; a sweep has {', '.join(sorted(known))}")
    for name in ("tasks", "methods", "budgets", "lengths"):
        if name in values:
            value = values[name]
            values[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if values.get("data_dir") is not None:
        values["data_dir"] = Path(values["data_dir"])
    return Plan(**values)


class Loaded(NamedTuple):
    """Facts about a loaded model that its cells record.

    Attributes:
        chat: whether it has a chat template to use where the plan leaves it open.
        weights: see `provenance.weights_mark`.
        dtype: of its weights, where the plan leaves it open.
        attention: of transformers.
        sampling: see `sampling.card_settings`.
    """

    chat: bool
    weights: str = ""
    dtype: str = "float32"
    attention: str = "sdpa"
    sampling: Mapping[str, Any] = MappingProxyType({})


def cells(plan: Plan, loaded: Loaded) -> list[CellDict]:
    """Return every cell of a plan, ordered by task, then with the full cache first.

    Args:
        plan: the sweep.
        loaded: the model.

    Raises:
        ValueError: a task or method is unknown, or a budget is impossible for a method.
    """
    for method, budget in arms(plan):
        if not method.startswith(KVPRESS):  # its own environment checks it
            find_method(method, budget, _settings(plan, method))
    if plan.answers > 1 and not loaded.sampling.get("do_sample"):
        raise ValueError(f"answers must be 1 where the model's card is greedy (no do_sample), got {plan.answers}")
    chat = loaded.chat if plan.chat is None else plan.chat
    planned = []
    for name, version, sized, rule in _tasks(plan):
        stock = name.startswith(LM_EVAL)  # lm-eval has no lengths and no query-agnostic mode
        for length in (None,) if stock else plan.lengths or (None,):
            if length is None and sized:
                raise ValueError(f"task {name!r} is made to a length: lengths must name at least one")
            for method, budget in arms(plan):
                in_chat = name not in MEASURED and chat and rule is not False
                own = name not in MEASURED and not stock  # answered by this harness
                mode: Literal["aware", "agnostic"] = "agnostic" if plan.agnostic and not stock else "aware"
                cell: CellDict = {
                    "task": name,
                    "task_version": version,
                    "method": method,
                    "token_budget": budget,
                    "length": length,
                    "mode": mode,
                    "chat": in_chat,
                    "samples": plan.samples,
                    "max_new_tokens": None if name in MEASURED else plan.max_new_tokens,
                    "seed": plan.seed,
                    "model": plan.model,
                    "revision": plan.revision,
                    "dtype": loaded.dtype if plan.dtype == AUTO else plan.dtype,
                    "attention": loaded.attention,
                    "chat_arguments": dict(plan.chat_template_args) if in_chat else {},
                    "thinking_tokens": plan.thinking_tokens if own else 0,
                    "sampling": dict(loaded.sampling) if own and plan.generation == CARD else {},
                    "answers": plan.answers if own else 1,
                    "batch_size": 1,
                    "weights": loaded.weights,
                    "library": __version__,
                    "settings": _settings(plan, method),
                }
                planned.append(cell)
    return planned


def _tasks(plan: Plan) -> list[tuple[str, int, bool, bool | None]]:
    """Return of every task its name, version, whether it has a given length, and its rule on chat templates."""
    stock = [(name, 0, False, None) for name in plan.tasks if name.startswith(LM_EVAL)]
    measured = [(name, MEASURED[name], True, False) for name in plan.tasks if name in MEASURED]
    names = [name for name in plan.tasks if name not in MEASURED and not name.startswith(LM_EVAL)]
    found = with_toy_haystacks(find_tasks(names)) if plan.toy_haystack else find_tasks(names)
    ours = [(task.name, task.version, task.sized, task.chat) for task in found]
    return [*ours, *stock, *measured]


def arms(plan: Plan) -> list[tuple[str, int | None]]:
    """Return every pair of method and budget, the full cache first."""
    return [
        (method, budget)
        for method in sorted(plan.methods, key=lambda name: name != FULL)
        for budget in ((None,) if method == FULL else plan.budgets)
    ]


def _settings(plan: Plan, method: str) -> dict[str, Any]:
    return dict(plan.settings) if method in METHODS and method != FULL else {}


def shard(all_cells: Sequence[CellDict], number: int, count: int) -> list[CellDict]:
    """Return the cells of shard `number` of `count`, counted from 1; the same for any order of the cells.

    Cells with the same samples stay together, but for those at the ends of a shard.

    Raises:
        ValueError: `number` is not from 1 to `count`.
    """
    if not 1 <= number <= count:
        raise ValueError(f"shard must be from 1/{count} to {count}/{count}, got {number}/{count}")
    keys = sorted((digest(shared_fields(cell)), cell_key(cell)) for cell in all_cells)
    mine = {key for _, key in keys[len(keys) * (number - 1) // count : len(keys) * number // count]}
    return [cell for cell in all_cells if cell_key(cell) in mine]


def shared_fields(cell: CellDict) -> dict[str, Any]:
    """Return the fields in which cells with the same samples agree; such cells share each prompt's prefill."""
    return {name: value for name, value in cell.items() if name not in ("method", "token_budget", "settings")}
