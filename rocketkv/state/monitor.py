"""The monitor of a cache's decode steps: what they are estimated to miss, audits, and what is done about it.

A cache has one where somebody asked for it, by a callback or in the settings, and its layers then show it every step.
What it does depends on the step alone, not on steps before: crops, copies and rollbacks need not know of it. Only the
warning of a generation, and the log of audits, are remembered.

Letters: B batch, H query heads, Hkv KV heads, D head dim of keys, Dv of values.
"""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import LOSS_BOUND, RocketKVConfig
from ..core.params import AttentionParams
from .history import History
from .missed import Audit, attend_all_where, attend_wider_where, audit_head, beyond, estimated_error, missed_mass
from .store import KVStore

KEPT_AUDITS = 4096  # the latest ones


@dataclass(eq=False)
class StepReport:
    """What one decode step is estimated to lose. Its tensors are on the layers' devices: to read them waits for those.

    Attributes:
        position: of the step's token in the sequence.
        missed: by the layer's number in the model, the missed mass of each head, [B, H] float32, from 0 to 1; NaN where
            a backend made no estimate. Empty for methods that make none. For both see `rocketkv.state.missed`.
        estimated_error: likewise, the estimated relative error of each head's output.
        passed: likewise, [B, Hkv] bool, where `loss_bound` was passed; `missed` is what is missed after acting on it.
        audit: of the step, if it was one's turn.
    """

    position: int
    missed: dict[int, Tensor] = field(default_factory=dict)
    estimated_error: dict[int, Tensor] = field(default_factory=dict)
    passed: dict[int, Tensor] = field(default_factory=dict)
    audit: Audit | None = None


OnStep = Callable[[StepReport], None]


class Monitor:
    """What the layers of one cache show their decode steps to.

    Args:
        config: the compression's settings, of which it follows `audit_every`, `on_loss` and `loss_bound`.
        numbers: of the compressed layers in the model, in their order.

    Attributes:
        on_step: called with the report of each step, when the last layer has taken it; or None.
        audits: the latest ones, the newest last.
    """

    def __init__(self, config: RocketKVConfig, numbers: Sequence[int]) -> None:
        self.on_step: OnStep | None = None
        self.audits: deque[Audit] = deque(maxlen=KEPT_AUDITS)
        self._config = config
        self._numbers = tuple(numbers)
        self._bound = LOSS_BOUND if config.loss_bound is None else config.loss_bound
        self._warned = False
        self._reports: dict[int, StepReport] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a copy of the cache does not have: the caller's callback, which each forward gives anew."""
        return self.__dict__ | {"on_step": None, "_reports": {}}

    def begin(self, number: int) -> None:
        """Begin a generation: the prompt of a layer has ended."""
        if number == self._numbers[0]:
            self._warned = False
            self._reports.clear()

    def asks(self, number: int, store: KVStore) -> bool:
        """Return whether the step that a layer is about to take is to be shown to `watch`.

        If so, that step must say for itself what it misses: no estimate may be an earlier one's.

        Raises:
            ValueError: the step is being compiled.
        """
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(
                "a step that is watched (on_step, audit_every, on_loss) cannot be compiled: it asks the device what it "
                "missed. Leave those out, or do not compile"
            )
        if self.on_step is None and not self._acts() and not self._due(number, store.seen):
            return False
        missed = store.decoding.buffers.missed
        if missed is not None:
            missed.fill_(torch.nan)
        return True

    def _acts(self) -> bool:
        return self._config.on_loss is not None and not self._warned

    def watch(
        self, number: int, store: KVStore, history: History | None, query: Tensor, out: Tensor, params: AttentionParams
    ) -> Tensor:
        """Take note of a layer's step that `asks` asked for, act on what it misses, and return the output to use.

        Args:
            number: of the layer.
            store: its store, the step's token in it.
            history: all tokens, where the method keeps them.
            query: [B, H, D] of the step.
            out: [B, H, Dv], its output.
            params: the model's attention parameters.
        """
        position = store.seen - 1
        if self.on_step is not None and number == self._numbers[0]:
            # Those of a forward that was interrupted, or taken back, are of no use.
            self._reports = {place: made for place, made in self._reports.items() if place < position}
            self._reports[position] = StepReport(position)
        buffers = store.decoding.buffers
        missed, passed = missed_mass(store), None
        if self._config.on_loss is not None and missed is not None:
            passed = beyond(missed, self._bound, buffers.seq_lens.shape[1])
            if self._acts() and bool(passed.any()):
                out, missed = self._act(number, passed, store, query, out, missed, params)
        error, audit, due = None, None, self._due(number, position)
        if self.on_step is None and not due:
            return out
        if missed is not None and buffers.value_sum is not None:
            error = estimated_error(out, missed, buffers.value_sum, buffers.seq_lens)
        if due:
            audit = self._audit(number, store, history, query, out, params, missed, error)
        report = self._reports.get(position)
        if self.on_step is None or report is None:
            return out
        for found, tensor in ((report.missed, missed), (report.estimated_error, error), (report.passed, passed)):
            if tensor is not None:
                found[number] = tensor
        report.audit = report.audit if audit is None else audit
        if number == self._numbers[-1]:
            self.on_step(self._reports.pop(position))
        return out

    def _act(
        self,
        number: int,
        passed: Tensor,
        store: KVStore,
        query: Tensor,
        out: Tensor,
        missed: Tensor,
        params: AttentionParams,
    ) -> tuple[Tensor, Tensor]:
        """Do what is to be done where the bound is passed; return what the step gives, and what it misses now."""
        if self._config.on_loss == "warn":
            self._warned = True
            worst = float(missed.nan_to_num(nan=torch.inf).max())
            said = "did not say what they missed" if worst == torch.inf else f"missed an estimated {worst:.3f}"
            warnings.warn(
                f"RocketKV: in layer {number}, at token {store.seen - 1}, a head {said} of its attention's weight: "
                f"more than loss_bound={self._bound}. Others of this generation are not named. Raise token_budget, or "
                "set on_loss='widen' or 'dense'",
                stacklevel=2,
            )
            return out, missed
        if self._config.on_loss == "dense":
            out, missed = attend_all_where(passed, query, store, out, missed, params)
        else:
            out, missed = attend_wider_where(passed, self._bound, query, store, out, missed, params)
        if store.decoding.buffers.missed is not None:
            store.decoding.buffers.missed.copy_(missed.detach())
        return out, missed

    def _due(self, number: int, position: int) -> bool:
        """Whether it is a layer's turn to be audited: the sequence's length alone decides."""
        every = self._config.audit_every
        if every is None or (position + 1) % every:
            return False
        return self._numbers[(position + 1) // every % len(self._numbers)] == number

    def _audit(
        self,
        number: int,
        store: KVStore,
        history: History | None,
        query: Tensor,
        out: Tensor,
        params: AttentionParams,
        missed: Tensor | None,
        error: Tensor | None,
    ) -> Audit:
        """Compare one head with exact attention to all that is stored, and to all tokens where those are kept."""
        config, position = self._config, store.seen - 1
        # First the layers take their turns, then the heads, then the rows.
        rest, head = divmod((position + 1) // (config.audit_every or 1) // len(self._numbers), query.shape[1])
        row = rest % query.shape[0]
        keys, values, _, seq_lens = store.decoding.buffers[:4]
        kv_head = head // (query.shape[1] // keys.shape[1])
        stored = store.stored if store.uniform else int(seq_lens[row, kv_head])
        own = params._replace(sinks=None if params.sinks is None else params.sinks[head : head + 1])
        held = [(keys[row, kv_head, :stored], values[row, kv_head, :stored])]
        if history is not None:
            held.append(history.head(store, row, kv_head))
        errors = [audit_head(query[row, head].detach(), out[row, head].detach(), *both, own) for both in held]
        audit = Audit(
            position=position,
            layer=number,
            row=row,
            head=head,
            error=errors[0],
            history_error=None if history is None else errors[1],
            missed=None if missed is None else float(missed[row, head]),
            estimated_error=None if error is None else float(error[row, head]),
        )
        self.audits.append(audit)
        return audit


def refuse_static(config: RocketKVConfig) -> None:
    """Refuse a callback for static caches.

    Raises:
        ValueError: the settings ask for one.
    """
    if config.decode_capacity is not None:
        raise ValueError(
            f"on_step is for caches that grow: decode steps of a static cache (decode_capacity="
            f"{config.decode_capacity}) are compiled and captured, and call nothing. Leave one of the two out; "
            "cache.stats().missed has the last step's estimates"
        )
