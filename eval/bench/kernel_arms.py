"""The arms of `rocketkv bench kernels` for one case: dense attention, the decode steps, and each kernel alone.

Letters: B batch, H query heads, Hkv KV heads, D head dim, N stored tokens, k tokens read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ...core.sketch import encoding, rotation_matrix
from ...kernels import decode, evict
from ...kernels.decode_shape import DecodeShape, SketchRule
from ...kernels.launch import Launcher
from ...kernels.select_attend import select_attend_kernel
from . import kernel_checks
from .dense_arms import SPLIT_KV, dense_calls, split_kv
from .gpu_timing import Arm, nothing
from .kernel_cases import METHODS, CaseBuffers, kernel_name

STAGE_1 = "stage 1"


@dataclass(frozen=True)
class CaseArms:
    """The arms of a case.

    Attributes:
        arms: all of them, the steps of both methods first.
        absent: dense attention that this machine does not have, and why.
        tiling: how the split-KV kernel is cut.
    """

    arms: tuple[Arm, ...]
    absent: dict[str, str]
    tiling: dict[str, int]


def case_arms(buffers: CaseBuffers) -> CaseArms:
    """Return the arms of a case."""
    dense, absent, tiling = _dense_arms(buffers)
    steps = [DecodeStep(buffers, method) for method in METHODS]
    kernels = [arm for step in steps for arm in step.kernel_arms()]
    return CaseArms((*(step.arm() for step in steps), *dense, *kernels, *_eviction_arms(buffers)), absent, tiling)


def _dense_arms(buffers: CaseBuffers) -> tuple[list[Arm], dict[str, str], dict[str, int]]:
    given = (buffers.query, buffers.keys, buffers.values, buffers.params.scaling)
    calls, absent = dense_calls(*given)
    calls[SPLIT_KV], tiling = split_kv(*given)

    def check(name: str, call: Callable[[int], Tensor]) -> None:
        kernel_checks.check_dense(name, buffers, call(0))

    arms = [
        Arm(name, "dense", call, buffers.dense_sets, buffers.moved["dense"], check=partial(check, name, call))
        for name, call in calls.items()
    ]
    return arms, absent, tiling


class DecodeStep:
    """The decode step of a method over the sets of a case, and its launches one by one."""

    def __init__(self, buffers: CaseBuffers, method: str) -> None:
        self.buffers, self.stores = buffers, buffers.methods[method]
        layer, split, store = buffers.layer, self.stores.split, self.stores.stores[0]
        bits, rotation = split.sketch_bits, None
        if bits is not None:
            rotation = rotation_matrix(layer.head_dim, buffers.device).to(buffers.dtype)
        self.workspace = decode.DecodeWorkspace(
            DecodeShape(
                batch=buffers.case.batch,
                heads=layer.heads,
                kv_heads=layer.kv_heads,
                head_dim=layer.head_dim,
                value_dim=layer.head_dim,
                capacity=store.capacity,
                page_size=split.page_size,
                channels=split.channels,
                top_k=split.top_k,
                token_budget=split.token_budget,
                sinks=split.sinks,
                sketch=None if bits is None else SketchRule(bits, *encoding(layer.head_dim, bits)),
                residual=split.residual,
                by_largest=split.by_largest,
            ),
            buffers.device,
            rotation=rotation,
        )
        self.outs = [torch.empty_like(query) for query in buffers.query[: len(self.stores.stores)]]

    def run(self, number: int) -> Tensor:
        """Run a whole step on one set."""
        store, buffers = self.stores.stores[number], self.buffers
        new = buffers.query[number], buffers.key[number], buffers.value[number]
        return decode.decode_step_triton(
            *new, store.decoding.buffers, self.workspace, buffers.params, self.outs[number]
        )

    def check(self) -> None:
        """Check as many steps as fill a page, and one more, on the first set."""
        self.stores.rewind()
        for number in range(self.stores.split.page_size + 1):
            out = self.run(0)
            kernel_checks.check_step(self.buffers, self.stores, self.workspace, out, number + 1)
        self.stores.rewind()

    def arm(self) -> Arm:
        """Return the whole step."""
        return Arm(
            self.stores.method,
            "step",
            self.run,
            len(self.outs),
            self.buffers.moved[self.stores.method],
            check=self.check,
            prepare=self.stores.rewind,
            room=self.buffers.layer.reserve,
        )

    def launches(self, number: int) -> dict[str, Callable[[], Any]]:
        """Record the launches of a step on one set, by kernel, without running them."""
        made: dict[str, Callable[[], Any]] = {}

        def record(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                name = kernel_name(self.stores.method, kernel.fn.__name__.removesuffix("_kernel"))
                if name in made:
                    name += f" {len(made)}"
                made[name] = lambda: kernel[grid](*args, **kwargs)

            return launch

        # A new launcher knows no compiled kernel that it could run without asking the kernel.
        fresh = mock.patch.object(self.workspace, "launch", Launcher())
        with fresh, mock.patch.object(type(select_attend_kernel), "__getitem__", record):
            self.run(number)
        return made

    def kernel_arms(self) -> list[Arm]:
        """Return each launch alone, with the very arguments that it has in a step; the step's check stands for all."""
        every = [self.launches(number) for number in range(len(self.outs))]
        first = next(iter(every[-1]))

        def prepare() -> None:
            # Scores of every page that a step may reach, since `select_attend` alone raises the lengths.
            self.stores.rewind()
            seq_lens = self.stores.stores[-1].decoding.buffers.seq_lens
            seq_lens += self.buffers.layer.reserve - 1
            every[-1][first]()
            self.stores.rewind()

        def run(name: str, number: int) -> Any:
            return every[number][name]()

        return [
            Arm(
                name,
                "kernel",
                partial(run, name),
                len(self.outs),
                self.buffers.moved.get(name, 0),
                prepare=prepare,
                room=self.buffers.layer.reserve,
            )
            for name in every[0]
        ]


def _eviction_arms(buffers: CaseBuffers) -> list[Arm]:
    """Return stage 1's kernels; the least that each moves is its inputs once and its outputs once."""
    layer, split = buffers.layer, buffers.methods[METHODS[0]].split
    kept = split.kept_tokens or 0
    sets = buffers.dense_sets

    def window_scores(number: int) -> Tensor:
        return evict.window_scores(buffers.window[number], buffers.keys[number], buffers.params)

    def pool_scores(number: int) -> Tensor:
        return evict.pool_scores(scores[number], layer.window, kernel_size=layer.kernel_size)

    def select_top(number: int) -> Tensor:
        return evict.select_top(pooled[number], kept)

    def compact(number: int, slots: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return evict.compact(
            buffers.keys[number],
            buffers.values[number],
            chosen[number] if slots is None else slots,
            None,
            None,
            kept,
            kept + layer.reserve,
            split.page_size,
        )

    def stage_1(number: int) -> tuple[Tensor | None, ...]:
        pooled = evict.pool_scores(window_scores(number), layer.window, kernel_size=layer.kernel_size)
        return compact(number, evict.select_top(pooled, kept))

    scores = [window_scores(number) for number in range(sets)]
    pooled = [pool_scores(number) for number in range(sets)]
    chosen = [select_top(number) for number in range(sets)]
    written = sum(tensor.nbytes for tensor in compact(0) if tensor is not None)
    survivors = chosen[0].numel() * 2 * layer.head_dim * buffers.dtype.itemsize
    inputs = buffers.window[0].nbytes + buffers.keys[0].nbytes
    moved = {
        "window_scores": inputs + scores[0].nbytes,
        "pool_scores": scores[0].nbytes + pooled[0].nbytes,
        "select_top": pooled[0].nbytes + chosen[0].nbytes,
        "compact": survivors + chosen[0].nbytes + written,
        STAGE_1: inputs + survivors + written,
    }
    calls: dict[str, Callable[[int], Any]] = {
        "window_scores": window_scores,
        "pool_scores": pool_scores,
        "select_top": select_top,
        "compact": compact,
        STAGE_1: stage_1,
    }
    return [
        Arm(
            name,
            "stage 1",
            call,
            sets,
            moved[name],
            check=partial(kernel_checks.check_eviction, buffers) if name == "window_scores" else nothing,
        )
        for name, call in calls.items()
    ]
