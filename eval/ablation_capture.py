"""One reading of the ablation's texts: what every layer of a model was given, from which all arms' stores are made.

Letters: B texts, H query heads, Hkv KV heads, D head dim, Dv of values, S tokens of prompt and steps, m steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models import find_decoder
from ..progress import Progress
from .ablation_fit import WIDEST_WINDOW
from .divergence import Window
from .oracle_run import Taken, each_layer, layer_numbers


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
