"""Queries, keys and values of every layer over the ablation's texts, from which all arms' stores are made.

Letters: B texts, H query heads, Hkv KV heads, G = H/Hkv, D head dim, Dv of values, S tokens of prompt and steps, m
steps, P the least power of two that is no less than Hkv.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rocketkv.core.params import AttentionParams
from rocketkv.eval.measures.kl import Window
from rocketkv.eval.oracle.run import LayerTensors, each_layer, layer_numbers
from rocketkv.eval.progress import Progress
from rocketkv.hf.models import find_decoder

from ..settings import StudySettings, option
from .fit import WIDEST_WINDOW


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    """Options of this study."""

    prompt: int = option(4096, "tokens of a prompt")
    steps: int = option(64, "teacher-forced after it")
    joined: int = option(1, "measure errors alone, of heads that join this many neighbouring KV heads")
    multi_query: bool = option(False, "compute each layer by one wide KV head, of the same function")
    texts: tuple[str, ...] = option((), "files in UTF-8, in place of four texts made offline", type=str)
    budgets: tuple[int, ...] = option((64, 128, 256, 512), "in tokens")
    arms: tuple[str, ...] = option((), "some of the arms, in place of all", type=str)

    def __post_init__(self) -> None:
        if self.prompt < WIDEST_WINDOW or self.steps < 1 or self.joined < 1:
            raise ValueError(
                f"prompt must be at least {WIDEST_WINDOW} tokens, steps and joined at least 1; got {self.prompt}, "
                f"{self.steps} and {self.joined}"
            )
        if self.multi_query and self.joined > 1:
            raise ValueError(f"joined must be 1 where layers become multi-query ones, got {self.joined}")


@dataclass
class Layer:
    """Inputs and outputs of one layer, all texts as one batch.

    Attributes:
        number: its number.
        query: [B, H, W + m, D], of the widest window and the steps.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        out: [B, m, H, Dv], exact attention of the steps.
        params: the model's attention parameters.
        shared_by: the Hkv KV heads of the model's layer that share one here, see `one_head`; or None.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    params: AttentionParams
    shared_by: int | None = None


def capture(model: PreTrainedModel, windows: Sequence[Window], settings: Settings, progress: Progress) -> list[Layer]:
    """Run a model over texts, one after the other, and return the inputs of its layers.

    Raises:
        ValueError: a text has another length, or the model has layers that do not attend to everything.
    """
    size, first = settings.prompt + settings.steps, settings.prompt - WIDEST_WINDOW
    if len(layer_numbers(model)) < find_decoder(model)[0].config.num_hidden_layers:
        raise ValueError(f"every layer must attend to everything; {type(model).__name__} has others")
    found: list[Layer] = []

    def visit(taken: LayerTensors, row: int) -> None:
        if row == 0:
            shapes = (taken.query[:, :, first:], taken.key, taken.value, taken.out[:, settings.prompt :])
            empty = [part.new_empty(len(windows), *part.shape[1:]) for part in shapes]
            found.append(Layer(taken.number, empty[0], empty[1], empty[2], empty[3], taken.params))
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

    Their logits are the sums of the joined heads' logits over sqrt(count), of the same variance: real keys and queries
    at another width.
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
        scaling = key.shape[-1] ** -0.5
        steps = query.shape[2] - WIDEST_WINDOW
        mask = torch.ones(steps, key.shape[2], dtype=torch.bool).tril(key.shape[2] - steps)
        out = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, WIDEST_WINDOW:], key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        found.append(Layer(number, query, key, value, out.transpose(1, 2), AttentionParams(scaling)))
    return found


@functools.cache  # a constant
@torch.inference_mode(False)  # it may be used in a later call that is not in inference mode
def spread(kv_heads: int, channels: int) -> Tensor:
    """Return a fixed map with orthonormal rows from Hkv heads' channels to P times as many, [Hkv, D, P * D] float32.

    It mixes each channel with the same channel of the other heads alone, so that no channel is always zero and few are
    large, as in the model.
    """
    parts = 1 << (kv_heads - 1).bit_length()
    drawn = torch.randn(parts, parts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixed: Tensor = torch.linalg.qr(drawn)[0][:kv_heads]
    return torch.einsum("hp,cd->hcpd", mixed, torch.eye(channels, dtype=torch.float64)).flatten(2).float()


def one_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the KV heads of a layer by one with the same logits: a multi-query layer of the same function.

    Its key is the keys of all, and a query is zero but in its own KV head's channels, before both are `spread`.

    Args:
        query: [B, H, n, D].
        key: [B, Hkv, n', D].
        value: [B, Hkv, n', Dv].

    Returns:
        [B, H, n, P * D], [B, 1, n', P * D] and [B, 1, n', P * Dv].
    """
    kv_heads = key.shape[1]
    by_key, by_value = (spread(kv_heads, part.shape[-1]).to(part) for part in (key, value))
    grouped = query.reshape(query.shape[0], kv_heads, -1, *query.shape[2:])
    return (
        torch.einsum("bhgnd,hde->bhgne", grouped, by_key).flatten(1, 2),
        torch.einsum("bhnd,hde->bne", key, by_key)[:, None],
        torch.einsum("bhnd,hde->bne", value, by_value)[:, None],
    )


def own_channels(out: Tensor, kv_heads: int) -> Tensor:
    """Return the outputs [B, H, Dv] of a layer of Hkv KV heads from those [B, H, P * Dv] of its shared head."""
    channels = out.shape[-1] >> (kv_heads - 1).bit_length()
    grouped = out.reshape(out.shape[0], kv_heads, -1, out.shape[-1])
    return torch.einsum("bhge,hde->bhgd", grouped, spread(kv_heads, channels).to(out)).flatten(1, 2)


def multi_query(layer: Layer) -> Layer:
    """Return the inputs of the multi-query layer of the same function, see `one_head`; outputs are the same."""
    query, key, value = one_head(layer.query, layer.key, layer.value)
    return replace(layer, query=query, key=key, value=value, shared_by=layer.key.shape[1])
