"""Monitor a cache's decode steps: report the missed mass, react to it, and audit single heads.

A cache has a monitor if `on_step` or the settings ask for one; its layers then pass every step to it. A reaction
depends on its step alone, not on earlier steps, so crops, copies and rollbacks do not involve the monitor. It remembers
only the warning of a generation and the log of audits.

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
from .trace import Trace

KEPT_AUDITS = 4096  # the latest ones


@dataclass(eq=False)
class StepReport:
    """The missed mass and the estimated error of one decode step.

    The tensors are on the layers' devices: reading them waits for the device. `rocketkv.state.missed` defines both
    estimates.

    Attributes:
        position: position of the step's token in the sequence.
        missed: by layer number, the missed mass of each head, [B, H] float32 from 0 to 1; NaN if a backend made no
            estimate. Empty for methods without estimates.
        estimated_error: by layer number, the estimated relative error of each head's output, [B, H] float32.
        passed: by layer number, [B, Hkv] bool, True where the missed mass was above `loss_bound`; `missed` has the
            missed mass after the reaction.
        audit: the audit of the step, or None.
    """

    position: int
    missed: dict[int, Tensor] = field(default_factory=dict)
    estimated_error: dict[int, Tensor] = field(default_factory=dict)
    passed: dict[int, Tensor] = field(default_factory=dict)
    audit: Audit | None = None


OnStep = Callable[[StepReport], None]


class Monitor:
    """Monitors the decode steps of one cache.

    Args:
        config: the settings; `audit_every`, `on_loss` and `loss_bound` are used.
        numbers: numbers of the compressed layers in the model, in order.

    Attributes:
        on_step: called with the report of each step, after the step of the last layer; or None.
        audits: the latest audits, newest last.
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
        """Leave out the caller's callback, which each forward sets again, and unfinished reports."""
        return self.__dict__ | {"on_step": None, "_reports": {}}

    def begin(self, number: int) -> None:
        """Begin a generation, after the prompt of a layer has ended."""
        if number == self._numbers[0]:
            self._warned = False
            self._reports.clear()
            if isinstance(self.on_step, Trace):
                self.on_step.begin()

    def asks(self, number: int, store: KVStore, count: int = 1) -> bool:
        """Return whether any of the next `count` steps of a layer must be passed to `watch`.

        If so, reset the missed mass to NaN, so that it cannot be the estimate of an earlier step.

        Raises:
            ValueError: the step is being compiled.
        """
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(
                "a step that is watched (on_step, audit_every, on_loss) cannot be compiled: it asks the device what it "
                "missed. Leave those out, or do not compile"
            )
        if self.on_step is None and not self._acts() and not self._due_within(number, store.seen, count):
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
        """Report a layer's step, react to its missed mass, and return the output to use.

        Args:
            number: number of the layer in the model.
            store: the layer's store, which includes the step's token.
            history: all tokens of the sequence, if the method keeps them.
            query: [B, H, D], the step's query.
            out: [B, H, Dv], the step's output.
            params: the model's attention parameters.
        """
        position = store.seen - 1
        if self.on_step is not None and number == self._numbers[0]:
            # Drop the reports of forwards that were interrupted or rolled back.
            self._reports = {place: made for place, made in self._reports.items() if place < position}
            self._reports[position] = StepReport(position)
        if isinstance(self.on_step, Trace):
            self.on_step.note(number, store, query, params)
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
        """React where the missed mass is above the bound; return the output and its missed mass."""
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
        """Whether to audit a layer at this position; only the sequence's length decides."""
        every = self._config.audit_every
        if every is None or (position + 1) % every:
            return False
        return self._numbers[(position + 1) // every % len(self._numbers)] == number

    def _due_within(self, number: int, position: int, count: int) -> bool:
        """Whether to audit a layer at one of `count` positions from this one on."""
        if self._config.audit_every is None:
            return False
        return any(self._due(number, place) for place in range(position, position + count))

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
        """Compare one head with exact attention to all stored tokens and, with a history, to all tokens."""
        config, position = self._config, store.seen - 1
        # Audits cycle through the layers first, then the heads, then the rows.
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
    """Refuse `on_step` for static caches.

    Raises:
        ValueError: the settings have a `decode_capacity`.
    """
    if config.decode_capacity is not None:
        raise ValueError(
            f"on_step is for caches that grow: decode steps of a static cache (decode_capacity="
            f"{config.decode_capacity}) are compiled and captured, and call nothing. Leave one of the two out; "
            "cache.stats().missed has the last step's estimates"
        )
