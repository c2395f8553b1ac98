"""One layer in the middle of decoding: its store, a step by the kernels, and what the reference makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rocketkv import dispatch as backend
from rocketkv.budget import BudgetSplit
from rocketkv.core.index import index_of
from rocketkv.core.params import AttentionParams
from rocketkv.core.sketch import rotation_matrix
from rocketkv.core.topk import select
from rocketkv.state.compress import close_prompt
from rocketkv.state.store import KVStore

if TYPE_CHECKING:
    from rocketkv.kernels import decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOW = 4
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One layer in the middle of decoding; `lengths` are the tokens of its rows, the longest of them the buffer's.

    With `sketch_bits` it has a sketch in place of pages, and a residual unless that is switched off; `biased` is for
    the residual's weight.
    """

    lengths: tuple[int, ...] = (200,)
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    page_size: int = 3
    channels: int = 20
    top_k: int = 37
    token_budget: int = 74
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype | None = None
    softcap: float | None = None
    sinks: bool = False
    programs: int = 8
    method: str = "rocketkv"
    steps: int = 1
    protected: int = 0
    sketch_bits: int | None = None
    residual: bool = True
    by_largest: bool = False
    biased: bool = False

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case(), name)}
        return "-".join(f"{name}={value}" for name, value in changed.items()).replace("torch.", "") or "plain"

    @property
    def split(self) -> BudgetSplit:
        common: dict[str, Any] = {"token_budget": self.token_budget}
        if self.method == "full":
            return BudgetSplit(**common, kept_tokens=None, page_size=1, channels=None, top_k=None)
        if self.method == "streaming":
            return BudgetSplit(**common, kept_tokens=None, page_size=1, channels=None, top_k=self.top_k, sinks=4)
        if self.sketch_bits is not None:
            common |= {"sketch_bits": self.sketch_bits, "residual": self.residual}
            return BudgetSplit(**common, top_k=self.top_k, protected=self.protected, by_largest=self.by_largest)
        shape: dict[str, Any] = {"page_size": self.page_size, "channels": self.channels, "top_k": self.top_k}
        return BudgetSplit(**common, **shape, protected=self.protected, by_largest=self.by_largest)

    def params(self, sinks: Tensor | None = None) -> AttentionParams:
        return AttentionParams(self.head_dim**-0.5, self.softcap, sinks)


def make(case: Case, seed: int = 0) -> tuple[KVStore, list[tuple[Tensor, Tensor, Tensor]], Tensor | None]:
    """Return a store of the case, what its steps append and ask, and the model's sinks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE, case.dtype)

    batch, longest = len(case.lengths), max(case.lengths)
    value_dim = case.value_dim or case.head_dim
    store = KVStore()
    valid = torch.arange(longest, device=DEVICE) >= longest - torch.tensor(case.lengths, device=DEVICE)[:, None]
    keys = normal(batch, case.kv_heads, longest, case.head_dim)
    values = normal(batch, case.kv_heads, longest, value_dim)
    store.extend(keys, values, None if bool(valid.all()) else valid)
    store.prompt.remember(normal(batch, case.heads, min(WINDOW, longest), case.head_dim), WINDOW)
    close_prompt(store, case.split, case.params(), decode_reserve=8, kernel_size=7, index_dtype=case.index_dtype)
    steps = [
        (
            normal(batch, case.heads, case.head_dim),
            normal(batch, case.kv_heads, case.head_dim),
            normal(batch, case.kv_heads, value_dim),
        )
        for _ in range(case.steps)
    ]
    sinks = torch.randn(case.heads, generator=generator).to(DEVICE) if case.sinks else None
    return store, steps, sinks


def bias_of(case: Case) -> Tensor | None:
    """Return what is added to the logit of the tokens that a step does not read, or None where the case has no bias."""
    generator = torch.Generator().manual_seed(1)
    bias = 2 * torch.randn(len(case.lengths), case.heads, generator=generator)
    return bias.to(DEVICE) if case.biased else None


def workspace_of(case: Case, store: KVStore) -> decode.DecodeWorkspace:
    from rocketkv.kernels import decode

    buffers = store.decoding.buffers
    query = buffers.keys.new_zeros(len(case.lengths), case.heads, case.head_dim)
    shape = backend._decode_shape(query, buffers, store.decoding.split)
    turn = rotation_matrix(case.head_dim, DEVICE).to(case.dtype)
    return decode.DecodeWorkspace(shape, DEVICE, case.programs, rotation=turn)


def kernel_step(
    case: Case,
    store: KVStore,
    workspace: decode.DecodeWorkspace,
    step: tuple[Tensor, ...],
    sinks: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    from rocketkv.kernels import decode

    query, key, value = step
    # The interpreter does not round to bfloat16, it cuts off.
    precise = torch.float32 if decode.INTERPRETED else query.dtype
    out = torch.empty(*query.shape[:2], value.shape[2], dtype=precise, device=DEVICE)
    buffers = store.decoding.buffers._replace(clock=store.clock(), residual_bias=bias)
    decode.decode_step_triton(query, key, value, buffers, workspace, case.params(sinks), out)
    store.lens.advance()
    return out.to(query.dtype)


def expected_logits(case: Case, store: KVStore, query: Tensor) -> Tensor:
    """Return the reference's scores of a store that has the step's token already."""
    index = index_of(case.split)
    assert index is not None
    buffers = store.decoding.buffers
    lengths = None if store.uniform else buffers.seq_lens
    given = query, buffers.index_tensors, buffers.keys, case.params()
    return index.score(*given, stored=store.stored, lengths=lengths)


def expected_positions(case: Case, store: KVStore, query: Tensor, sinks: Tensor | None) -> Tensor:
    return select(
        expected_logits(case, store, query),
        min(case.top_k, store.stored),
        stored=store.stored,
        lengths=None if store.uniform else store.decoding.buffers.seq_lens,
        kv_heads=case.kv_heads,
        unit_size=case.split.page_size,
        sinks=sinks,
        protected=case.protected,
        by_largest=case.split.by_largest,
    )[0]
