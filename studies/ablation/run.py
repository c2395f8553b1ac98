"""Run the arms of the ablation over one capture of a model's texts.

The model reads each text once, whole, and queries, keys and values of every layer are stored. Each arm's store is made
from these as the model's own prefill would make it. Measured are:

- *KL(full || arm)* of the next-token distributions, nats, mean over the teacher-forced steps: the texts as one batch
  through the patched model, every step on the arm's own stores;
- *attention error*: each layer's stores are given the queries, keys and values of the full model's own run, so that
  inputs are those of the exact attention and errors of earlier layers play no part. Relative L2 of the outputs of a KV
  head's group together, mean over the steps.

Letters: B texts, H query heads, Hkv KV heads, G = H/Hkv, D head dim, S tokens of prompt and steps, m steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv._version import __version__
from rocketkv.budget import BudgetSplit
from rocketkv.config import RocketKVConfig
from rocketkv.core.params import AttentionParams
from rocketkv.eval.generate import DecodeLoop
from rocketkv.eval.measures.kl import Window
from rocketkv.eval.progress import Progress
from rocketkv.eval.records import digest
from rocketkv.hf.cache import RocketKVCache
from rocketkv.hf.layer import RocketKVLayer
from rocketkv.hf.masks import LazyMask
from rocketkv.hf.models import find_decoder
from rocketkv.hf.patch import patch
from rocketkv.hf.prefill import FastAttention
from rocketkv.state.compress import close_prompt
from rocketkv.state.stats import step_bytes

from ..settings import journal_of
from .arms import FULL
from .capture import Layer, Settings, capture, joined_heads, multi_query, one_head, own_channels
from .choice import CostThreshold, fitted_threshold
from .fit import RESERVE, TOLERANCE, WIDEST_WINDOW, Arm, Case, extra_bytes_of, fitted_split, target_bytes
from .steps import Step

VERSION = 2


class RecordDict(TypedDict):
    """The result of one arm at one budget."""

    arm: str
    budget: int
    kl: list[float] | None  # of each text, nats a step; None where only errors are measured
    agreement: list[float] | None  # share of the steps with the same most likely token
    errors: list[list[list[float]]]  # of each text, layer and KV head
    step_bytes: float  # a row, layer and KV head, mean over steps
    decoded_bytes: float | None  # likewise, of the run that the KL is of
    target_bytes: float
    stored: int  # of the prompt, a row and KV head
    threshold: float | None  # cost up to which heads attend to tokens
    split: dict[str, Any]


class ArmLayer(RocketKVLayer):
    """A layer of a cache whose store comes from a capture and whose steps are an arm's.

    Args:
        arm: the arm.
        split: its split.
        layer: inputs of the model's layer.
        prompt: tokens of the prompt.
    """

    def __init__(self, arm: Arm, split: BudgetSplit, layer: Layer, prompt: int) -> None:
        super().__init__(RocketKVConfig(method="full", token_budget=split.token_budget, backend="torch"))
        key, value = layer.key[:, :, :prompt], layer.value[:, :, :prompt]
        window = layer.query[:, :, WIDEST_WINDOW - arm.window_size : WIDEST_WINDOW]
        store = self.store
        store.extend(key, value, expected=prompt)
        if arm.storage is not None and split.kept_tokens is not None:
            # Tokens that a head does not store are padding to it.
            held = arm.storage(window, key, value, split.kept_tokens, layer.params, kernel_size=arm.kernel_size)
            store.reopen(key, value, torch.where(held, torch.arange(prompt, dtype=torch.int32), -1), prompt)
            split = replace(split, kept_tokens=None)
        store.prompt.remember(layer.query[:, :, :WIDEST_WINDOW], arm.window_size)
        ops = arm.ranks(value, layer.number)
        close_prompt(store, split, layer.params, decode_reserve=RESERVE, kernel_size=arm.kernel_size, ops=ops)
        self.arm = arm
        self.shared_by = layer.shared_by
        self.state = None if arm.summary is None else arm.summary(window, key, value, store, layer.params)
        self.read: list[float] = []

    def attend(self, query: Tensor, mask: LazyMask | None, params: AttentionParams, *, fast: FastAttention) -> Tensor:
        """Append the pending token and attend by the arm's step; return [B, 1, H, Dv]."""
        if self.pending is None or query.shape[2] != 1:
            raise ValueError("attend follows update, and takes one token at a time")
        key, value = self.pending
        self.pending = None
        if self.shared_by is not None:
            query, key, value = one_head(query, key, value)
        return self.step_of(query[:, :, 0], key[:, :, 0], value[:, :, 0], params)[:, None]

    def step_of(self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Run the arm's step on [B, H, D] and [B, Hkv, D], as the store has them; return the model's [B, H, Dv]."""
        counted = self._next_bytes()
        out = self.arm.step(Step(query, key, value, self.store, self.state, params))
        top_k = self.store.decoding.split.top_k
        if isinstance(self.state, CostThreshold) and top_k is not None:
            counted += (self.state.attended - top_k) * 4 * query.shape[-1]
        self.read.append(counted)
        return out if self.shared_by is None else own_channels(out, self.shared_by)

    def _next_bytes(self) -> float:
        """Return the bytes that the next step reads, per row and KV head, counted in 16 bits."""
        decoding = self.store.decoding
        seq_lens = decoding.buffers.seq_lens
        if self.store.uniform:
            return self.stats().nominal_step_bytes / seq_lens.numel()
        dims = (decoding.keys.shape[3], decoding.values.shape[3])
        counts = seq_lens.flatten().tolist()
        return fmean(step_bytes(decoding.split, count + 1, dims, (2, 2), nominal=True) for count in counts)


def replay(made: ArmLayer, layer: Layer, prompt: int) -> list[list[float]]:
    """Run a store through the full model's steps and crop it again; return errors of each text and KV head."""
    batch, steps = layer.out.shape[:2]
    outputs = []
    made.read.clear()
    for step in range(steps):
        token = prompt + step
        query = layer.query[:, :, WIDEST_WINDOW + step]
        outputs.append(made.step_of(query, layer.key[:, :, token], layer.value[:, :, token], layer.params))
    made.store.crop(prompt)
    grouped = (batch, steps, layer.key.shape[1], -1)
    exact = layer.out.reshape(grouped).double()
    error = (torch.stack(outputs, 1).reshape(grouped).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    found: list[list[float]] = error.mean(1).tolist()
    return found


def fit_threshold(made: Sequence[ArmLayer], layers: Sequence[Layer], prompt: int) -> float | None:
    """Set the cost threshold with which all layers together read as much as they may, on the full model's steps.

    Returns:
        The threshold, or None where the arm has none.
    """
    states = [own.state for own in made if isinstance(own.state, CostThreshold)]
    top_k = made[0].store.decoding.split.top_k
    if not states or top_k is None:
        return None
    for own, layer in zip(made, layers, strict=True):
        replay(own, layer, prompt)
    found = fitted_threshold(states, top_k)
    for state in states:
        state.value = found
    return found


def run_steps(
    model: PreTrainedModel, layers: Sequence[RocketKVLayer], windows: Sequence[Window], prompt: int
) -> Iterator[Tensor]:
    """Step a model, whose cache has these layers, through the tokens after the prompt; yield logits [B, vocabulary]."""
    config = layers[0].config
    cache = RocketKVCache(find_decoder(model)[0].config, config)
    cache.layers[:] = list(layers)
    ids = torch.tensor([window.ids for window in windows], device=model.device)
    loop = DecodeLoop(model=model, cache=cache, seen=prompt)
    with patch(model, config):
        for place in range(prompt, ids.shape[1]):
            yield loop.step(ids[:, place : place + 1]).float()


@torch.inference_mode()
def reference(model: PreTrainedModel, layers: Sequence[Layer], windows: Sequence[Window], settings: Settings) -> Tensor:
    """Return the full cache's log-probabilities [m, B, vocabulary] float32."""
    split = fitted_split(FULL, _case(layers, settings, settings.prompt))
    made = [ArmLayer(FULL, split, layer, settings.prompt) for layer in layers]
    return torch.stack([logits.log_softmax(-1) for logits in run_steps(model, made, windows, settings.prompt)])


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
    """Check that an arm reads as many bytes as all others.

    Raises:
        ValueError: it does not, and is neither an oracle nor a floor.
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
    extra = extra_bytes_of(arm, split, case)
    made = [ArmLayer(arm, split, layer, settings.prompt) for layer in layers]
    threshold = fit_threshold(made, layers, settings.prompt)
    errors = [replay(own, layer, settings.prompt) for own, layer in zip(made, layers, strict=True)]
    stored = [own.store.decoding.buffers.seq_lens.double().mean().item() for own in made]
    read = extra + fmean(fmean(own.read) for own in made)
    kl = agreement = decoded = None
    if expected is not None:
        for own in made:
            own.read.clear()
        kl, agreement = divergences(expected, run_steps(model, made, windows, settings.prompt))
        decoded = extra + fmean(fmean(own.read) for own in made)
    record: RecordDict = {
        "arm": arm.name,
        "budget": budget,
        "kl": kl,
        "agreement": agreement,
        "errors": [list(column) for column in zip(*errors, strict=True)],
        "step_bytes": read,
        "decoded_bytes": decoded,
        "target_bytes": target_bytes(case),
        "stored": round(fmean(stored)),
        "threshold": threshold,
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
        settings: options of the study.
        arms: in their order.
        budgets: likewise, t of each.
        folder: of the journal.
        progress: with a step for each arm and budget.

    Raises:
        ValueError: see `capture` and `run_arm`.
    """
    journal = journal_of(folder)
    of_run = [settings.model, settings.joined, settings.multi_query, settings.prompt, settings.steps]
    base = [VERSION, __version__, torch.__version__, transformers.__version__, of_run, [w.ids for w in windows]]
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
                        expected = reference(model, layers, windows, settings)
                    if settings.multi_query:
                        layers = [multi_query(layer) for layer in layers]
                progress.say(f"{arm.name} at {budget}")
                journal.put(key, run_arm(model, layers, windows, settings, arm, budget, expected))
            progress.step()
            records.append(journal.get(key))
    return records
