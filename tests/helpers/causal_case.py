"""Causal attention written out as one masked softmax, and the cases that its implementations are compared in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rocketkv.core.params import AttentionParams


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: AttentionParams,
    *,
    valid: Tensor | None = None,
    window: int | None = None,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """Return [B, n, H, Dv], attention of the last n of S tokens, all in one precision."""
    heads, length, size = query.shape[1], query.shape[2], key.shape[2]
    group = heads // key.shape[1]
    keys, values = (part.to(precision).repeat_interleave(group, dim=1) for part in (key, value))
    logits = query.to(precision) @ keys.transpose(-1, -2) * params.scaling
    if params.softcap is not None:
        logits = torch.tanh(logits / params.softcap) * params.softcap
    distance = torch.arange(size - length, size)[:, None] - torch.arange(size)
    seen = (distance >= 0) & (distance < (size + 1 if window is None else window))
    seen = seen.to(query.device)[None, None]
    if valid is not None:
        seen = seen & valid.repeat_interleave(heads // valid.shape[1], dim=1)[:, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    if params.sinks is not None:
        sink = params.sinks.to(precision).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, sink), dim=-1)
    weights = logits.softmax(-1).nan_to_num()[..., :size]
    return (weights @ values).transpose(1, 2)


@dataclass(frozen=True)
class CausalCase:
    """Shapes and settings of one call.

    Attributes:
        heads: H and Hkv.
        head_dim: D.
        value_dim: Dv, or None for D.
        length: n.
        size: S.
        batch: B.
        softcap: of the logits, or None.
        sinks: whether there are learned sinks.
        window: keys that a query sees, or None.
        padding: "none", "left", "holes", which differ between KV heads, or "turns": two prompts that are padded each.
        dtype: of queries, keys and values.
    """

    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    value_dim: int | None = None
    length: int = 37
    size: int = 90
    batch: int = 2
    softcap: float | None = None
    sinks: bool = False
    window: int | None = None
    padding: str = "none"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        default = CausalCase()
        fields = {name: getattr(self, name) for name in vars(self)}
        return "-".join(f"{name}={field}" for name, field in fields.items() if field != getattr(default, name))

    def params(self) -> AttentionParams:
        """Return the attention parameters, sharp enough that weights differ."""
        sinks = torch.randn(self.heads[0]).to(self.dtype) if self.sinks else None
        return AttentionParams(1.5 * self.head_dim**-0.5, self.softcap, sinks)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value; queries token by token as models have them, keys with room behind them."""
        batch, (heads, kv_heads), value_dim = self.batch, self.heads, self.value_dim or self.head_dim
        query = torch.randn(batch, self.length, heads, self.head_dim).to(self.dtype).transpose(1, 2)
        key = torch.randn(batch, kv_heads, self.size + 5, self.head_dim).to(self.dtype)
        value = torch.randn(batch, kv_heads, self.size + 5, value_dim).to(self.dtype)
        key[:, :, self.size :] = value[:, :, self.size :] = torch.nan  # not to be read
        return query, key[:, :, : self.size], value[:, :, : self.size]

    def valid(self) -> tuple[Tensor | None, list[int] | None]:
        """Return what is no padding, [B, 1 or Hkv, S] bool or None, and where rows start if nothing else is padding."""
        if self.padding == "none":
            return None, None
        if self.padding == "holes":
            valid = torch.rand(self.batch, self.heads[1], self.size) > 0.3
            valid[0, :, : self.size // 2] = False
            return valid, None
        if self.padding == "turns":
            valid = torch.ones(self.batch, 1, self.size, dtype=torch.bool)
            for row in range(self.batch):  # other lengths of both prompts in each row
                valid[row, :, : 3 * row] = False
                valid[row, :, self.size - self.length - 5 : self.size - self.length + 2 * row] = False
            return valid, None
        # One row without padding, one whose first queries are padding, others of padding alone.
        starts = [(0, self.size - self.length + 3, self.size)[i % 3] for i in range(self.batch)]
        return (torch.arange(self.size) >= torch.tensor(starts)[:, None])[:, None], starts

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `causal_attention` that say what is seen."""
        valid, starts = self.valid()
        return {"valid": valid, "starts": starts, "window": self.window}
