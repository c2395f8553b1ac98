"""Run the arms of the ablation over one capture of a model's texts.

The model reads each text once, whole; queries, keys and values of every layer are taken down. From these, each arm's
store is made as the model's own prefill would make it, and two things are measured:

- *KL(full || arm)* of the next-token distributions, nats, mean over the teacher-forced steps: the texts as one batch
  through the patched model, every step on the arm's own stores;
- *attention error*: each layer's stores are given the queries, keys and values of the full model's own run, so that
  inputs are those of the exact attention and errors of earlier layers play no part. Relative L2 of the outputs of a KV
  head's group together, mean over the steps.

Letters: B texts, H query heads, Hkv KV heads, G = H/Hkv, D head dim, S tokens of prompt and steps, m steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from .._version import __version__
from ..budget import BudgetSplit
from ..cache import RocketKVCache
from ..config import RocketKVConfig
from ..eviction import prompt_scores
from ..hf import patch
from ..layer import RocketKVLayer
from ..masks import LazyMask
from ..models import CACHE_ARGUMENT, find_decoder
from ..prefill import FastAttention
from ..progress import Progress
from .ablation_arms import FULL, RESERVE, TOLERANCE, WIDEST_WINDOW, Arm, Case, fitted_split, target_bytes
from .divergence import Window
from .journal import Journal
from .oracle_run import Taken, each_layer, layer_numbers
from .records import digest, write_atomically

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        model: its name, which tells it from others in the journal.
        prompt: tokens of a prompt.
        steps: m.
        seed: of the texts.
        joined: how many neighbouring KV heads make up one, where errors of such heads alone are measured; else 1.
    """

    model: str
    prompt: int = 4096
    steps: int = 64
    seed: int = 0
    joined: int = 1

    def __post_init__(self) -> None:
        if self.prompt < WIDEST_WINDOW or self.steps < 1 or self.joined < 1:
            raise ValueError(
                f"prompt must be at least {WIDEST_WINDOW} tokens, steps and joined at least 1; got {self.prompt}, "
                f"{self.steps} and {self.joined}"
            )


class RecordDict(TypedDict):
    """What one arm gave at one budget."""

    arm: str
    budget: int
    kl: list[float] | None  # of each text, nats a step; None where only errors are measured
    agreement: list[float] | None  # share of the steps with the same most likely token
    errors: list[list[list[float]]]  # of each text, layer and KV head
    step_bytes: float  # a row, layer and KV head, mean over steps
    target_bytes: float
    stored: int  # of the prompt, a row and KV head
    split: dict[str, Any]


@dataclass
class Layer:
    """What one layer was given, all texts as one batch.

    Attributes:
        number: its number.
        query: [B, H, W + m, D], of the widest window and the steps.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        out: [B, m, H, Dv], exact attention of the steps.
        exact: scaling, softcap and sinks.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    exact: dict[str, Any]


def capture(model: PreTrainedModel, windows: Sequence[Window], settings: Settings, progress: Progress) -> list[Layer]:
    """Run a model over texts, one after the other, and return what its layers were given.

    Raises:
        ValueError: a text has another length, or the model has layers that do not attend to everything.
    """
    size, first = settings.prompt + settings.steps, settings.prompt - WIDEST_WINDOW
    if len(layer_numbers(model)) < find_decoder(model)[0].config.num_hidden_layers:
        raise ValueError(f"every layer must attend to everything; {type(model).__name__} has others")
    found: list[Layer] = []

    def visit(taken: Taken, row: int) -> None:
        if row == 0:
            shapes = (taken.query[:, :, first:], taken.key, taken.value, taken.out[:, settings.prompt :])
            empty = [part.new_empty(len(windows), *part.shape[1:]) for part in shapes]
            found.append(Layer(taken.number, empty[0], empty[1], empty[2], empty[3], taken.exact))
        layer = found[taken.number]
        layer.query[row], layer.key[row] = taken.query[0, :, first:], taken.key[0]
        layer.value[row], layer.out[row] = taken.value[0], taken.out[0, settings.prompt :]

    for row, window in enumerate(windows):
        if len(window.ids) != size:
            raise ValueError(f"a text must have {size} tokens, for the prompt and the steps; got {len(window.ids)}")
        progress.say(f"reading {window.id}")
        each_layer(model, window.ids, functools.partial(visit, row=row))
    return found


def joined_heads(layers: Sequence[Layer], count: int) -> list[Layer]:
    """Join neighbouring KV heads, over the layers' borders, into heads of `count` times their width.

    Their logits are the sums of those of the heads that were joined, over sqrt(count), so that they vary as much as
    those do: real keys and queries at another width, but no head that any model has.
    """
    parts = []
    for layer in layers:
        kv_heads = layer.key.shape[1]
        group = layer.query.shape[1] // kv_heads
        for head in range(kv_heads):
            own = slice(head * group, (head + 1) * group)
            parts.append((layer.query[:, own], layer.key[:, head : head + 1], layer.value[:, head : head + 1]))
    found = []
    for number in range(len(parts) // count):
        query, key, value = (
            torch.cat(column, -1) for column in zip(*parts[number * count : (number + 1) * count], strict=True)
        )
        exact = {"scaling": key.shape[-1] ** -0.5, "softcap": None, "sinks": None}
        steps = query.shape[2] - WIDEST_WINDOW
        mask = torch.ones(steps, key.shape[2], dtype=torch.bool).tril(key.shape[2] - steps)
        out = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, WIDEST_WINDOW:], key, value, attn_mask=mask, scale=exact["scaling"], enable_gqa=True
        )
        found.append(Layer(number, query, key, value, out.transpose(1, 2), exact))
    return found


class ArmLayer(RocketKVLayer):
    """A cache's layer whose store was made of a capture, and whose steps are an arm's.

    Args:
        arm: the arm.
        split: its split.
        layer: what the model's layer was given.
        prompt: tokens of the prompt.
    """

    def __init__(self, arm: Arm, split: BudgetSplit, layer: Layer, prompt: int) -> None:
        super().__init__(RocketKVConfig(method="full", token_budget=split.token_budget, backend="torch"))
        key, value = layer.key[:, :, :prompt], layer.value[:, :, :prompt]
        store = self.store
        store.extend(key, value, expected=prompt)
        store.remember_queries(layer.query[:, :, :WIDEST_WINDOW], arm.window_size)
        store.close_prompt(
            split,
            decode_reserve=RESERVE,
            kernel_size=arm.kernel_size,
            scores=prompt_scores if arm.ranks is None else arm.ranks(value, layer.number),
            **layer.exact,
        )
        self.arm = arm
        window = layer.query[:, :, WIDEST_WINDOW - arm.window_size : WIDEST_WINDOW]
        self.state = None if arm.summary is None else arm.summary(window, key, value, store, **layer.exact)

    def attend(
        self,
        query: Tensor,
        mask: LazyMask | None,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        fast: FastAttention,
    ) -> Tensor:
        """Take the pending token in and attend by the arm's step; return [B, 1, H, Dv]."""
        if self.pending is None or query.shape[2] != 1:
            raise ValueError("attend follows update, and takes one token at a time")
        key, value = self.pending
        self.pending = None
        return self.step_of(query[:, :, 0], key[:, :, 0], value[:, :, 0], scaling, softcap, sinks)[:, None]

    def step_of(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Run the arm's step on [B, H, D] and [B, Hkv, D]; return [B, H, Dv]."""
        exact: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        return self.arm.step(query, key, value, self.store, self.state, **exact)


class Errors(TypedDict):
    """What replaying a layer gave."""

    errors: list[list[float]]  # of each text and KV head
    step_bytes: float


def replay(made: ArmLayer, layer: Layer, prompt: int) -> Errors:
    """Give a store the full model's own steps, and take them back again."""
    batch, steps = layer.out.shape[:2]
    kv_heads = layer.key.shape[1]
    outputs, read = [], []
    for step in range(steps):
        read.append(made.stats().nominal_step_bytes / (batch * kv_heads))  # of the step that comes
        token = prompt + step
        query = layer.query[:, :, WIDEST_WINDOW + step]
        outputs.append(made.step_of(query, layer.key[:, :, token], layer.value[:, :, token], **layer.exact))
    made.store.crop(prompt)
    grouped = (batch, steps, kv_heads, -1)
    exact = layer.out.reshape(grouped).double()
    error = (torch.stack(outputs, 1).reshape(grouped).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return {"errors": error.mean(1).tolist(), "step_bytes": fmean(read)}


def run_steps(
    model: PreTrainedModel, layers: Sequence[RocketKVLayer], windows: Sequence[Window], prompt: int
) -> Iterator[Tensor]:
    """Give the tokens behind the prompt to a model whose cache's layers these are; yield logits [B, vocabulary]."""
    config = layers[0].config
    cache = RocketKVCache(find_decoder(model)[0].config, config)
    cache.layers[:] = list(layers)
    ids = torch.tensor([window.ids for window in windows], device=model.device)
    with patch(model, config):
        for place in range(prompt, ids.shape[1]):
            positions = torch.full((len(windows), 1), place, device=model.device)
            given: dict[str, Any] = {"position_ids": positions, CACHE_ARGUMENT: cache, "logits_to_keep": 1}
            yield model(ids[:, place : place + 1], **given).logits[:, -1].float()


def reference(
    model: PreTrainedModel, layers: Sequence[Layer], windows: Sequence[Window], settings: Settings, path: Path
) -> Tensor:
    """Return the full cache's log-probabilities [m, B, vocabulary] float32: computed once, then read from a file."""
    if path.exists():
        return safetensors.torch.load(path.read_bytes())["logprobs"]
    split = fitted_split(FULL, _case(layers, settings, settings.prompt))
    made = [ArmLayer(FULL, split, layer, settings.prompt) for layer in layers]
    rows = [logits.log_softmax(-1) for logits in run_steps(model, made, windows, settings.prompt)]
    found = torch.stack(rows)
    write_atomically(path, safetensors.torch.save({"logprobs": found}))
    return found


def _case(layers: Sequence[Layer], settings: Settings, budget: int) -> Case:
    heads, kv_heads, head_dim = layers[0].query.shape[1], layers[0].key.shape[1], layers[0].key.shape[-1]
    return Case(prompt=settings.prompt, steps=settings.steps, head_dim=head_dim, budget=budget, group=heads // kv_heads)


def divergences(expected: Tensor, logits: Iterator[Tensor]) -> tuple[list[float], list[float]]:
    """Return KL(full || arm) and the share of the steps with the same most likely token, of each text.

    Args:
        expected: [m, B, vocabulary], log-probabilities.
        logits: [B, vocabulary] of each step.
    """
    kl, same = [], []
    for full, found in zip(expected, logits, strict=True):
        ours, theirs = found.double().log_softmax(-1), full.double().log_softmax(-1)
        kl.append((theirs.exp() * (theirs - ours)).sum(-1))
        same.append(found.argmax(-1) == full.argmax(-1))
    return torch.stack(kl).mean(0).tolist(), torch.stack(same).double().mean(0).tolist()


def check_bytes(arm: Arm, record: RecordDict) -> None:
    """Check that an arm read as many bytes as all others.

    Raises:
        ValueError: it did not, and is neither an oracle nor a floor.
    """
    ratio = record["step_bytes"] / record["target_bytes"]
    if arm.fitted is not None and abs(ratio - 1) > TOLERANCE:
        raise ValueError(
            f"{arm.name} at budget {record['budget']} read {ratio:.3f} times the bytes of rocketkv; equal bytes are "
            f"within {TOLERANCE:.0%}"
        )


@torch.inference_mode()
def run_arm(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    windows: Sequence[Window],
    settings: Settings,
    arm: Arm,
    budget: int,
    expected: Tensor | None,
) -> RecordDict:
    """Measure one arm at one budget; without `expected`, errors alone.

    Raises:
        ValueError: the arm cannot have the budget, or did not read as many bytes as the others.
    """
    case = _case(layers, settings, budget)
    split = fitted_split(arm, case)
    made, errors, read = [], [], []
    stored = 0
    for layer in layers:
        own = ArmLayer(arm, split, layer, settings.prompt)
        stored = own.store.stored
        found = replay(own, layer, settings.prompt)
        errors.append(found["errors"])
        read.append(found["step_bytes"])
        if expected is not None:
            made.append(own)
    kl = agreement = None
    if expected is not None:
        kl, agreement = divergences(expected, run_steps(model, made, windows, settings.prompt))
    record: RecordDict = {
        "arm": arm.name,
        "budget": budget,
        "kl": kl,
        "agreement": agreement,
        "errors": [list(column) for column in zip(*errors, strict=True)],
        "step_bytes": fmean(read) + arm.extra_tokens(case.group) * 4 * case.head_dim,
        "target_bytes": target_bytes(case),
        "stored": stored,
        "split": asdict(split),
    }
    check_bytes(arm, record)
    return record


def measure(
    model: PreTrainedModel,
    windows: Sequence[Window],
    settings: Settings,
    arms: Sequence[Arm],
    budgets: Sequence[int],
    folder: Path,
    progress: Progress,
) -> list[RecordDict]:
    """Return the records of every budget and arm: those of the journal, and the others made now and put there.

    Args:
        model: a model to which no method is attached.
        windows: the texts, of `prompt + steps` tokens each.
        settings: what is measured.
        arms: in their order.
        budgets: likewise, t of each.
        folder: of the journal and of the full cache's log-probabilities.
        progress: with a step for each arm and budget.

    Raises:
        ValueError: see `capture` and `run_arm`.
    """
    journal = Journal(folder / "journal.jsonl")
    base = [VERSION, __version__, torch.__version__, transformers.__version__, asdict(settings)]
    base.append([window.ids for window in windows])
    layers: list[Layer] = []
    expected: Tensor | None = None
    records = []
    for budget in budgets:
        for arm in arms:
            key = digest([*base, arm.name, budget, arm.window_size, arm.kernel_size, arm.extra])
            if journal.get(key) is None:
                if not layers:
                    layers = capture(model, windows, settings, progress)
                    if settings.joined > 1:
                        layers = joined_heads(layers, settings.joined)
                    else:
                        path = folder / f"full-logprobs-{digest(base)[:16]}.safetensors"
                        with torch.inference_mode():
                            progress.say("decoding over the full cache")
                            expected = reference(model, layers, windows, settings, path)
                progress.say(f"{arm.name} at {budget}")
                journal.put(key, run_arm(model, layers, windows, settings, arm, budget, expected))
            progress.step()
            records.append(journal.get(key))
    return records
