"""A few decode steps of each kind, against the PyTorch reference: short enough for a sanitizer."""

from typing import Any

import torch

from layer_case import Case, bias_of, kernel_step, make, workspace_of
from rocketkv.dispatch import decode_step
from rocketkv.eval.bench.kernel_checks import require_equal
from rocketkv.eval.checks import require_near
from rocketkv.kernels.decode import REGISTER_PAGES

BF16 = torch.bfloat16
# More pages than one program holds, so that they are chosen in launches of their own.
BEYOND = REGISTER_PAGES + 8
CASES = {
    "pages of 3, ragged": Case(lengths=(200, 131, 20), heads=6, kv_heads=2, dtype=BF16, steps=4),
    "sketch and residual, ragged": Case(
        sketch_bits=2, head_dim=128, heads=8, kv_heads=2, lengths=(300, 91, 1), dtype=BF16, by_largest=True, biased=True
    ),
    "pages in a select of its own": Case(page_size=1, lengths=(BEYOND,), head_dim=16, channels=5, dtype=BF16),
    "a sketch in a select of its own": Case(
        sketch_bits=2, head_dim=64, heads=4, lengths=(BEYOND, 91), dtype=BF16, by_largest=True, biased=True, protected=3
    ),
    "all tokens, learned sinks": Case(method="full", lengths=(200, 60), softcap=5.0, sinks=True, dtype=BF16),
}
FULL = Case(sketch_bits=2, head_dim=16, lengths=(128,))


def one_step() -> dict[str, Any]:
    """Run the steps; returns the names of the cases.

    Raises:
        WrongResultError: a step's output or tokens are not the reference's.
    """
    for name, case in CASES.items():
        store, steps, sinks = make(case)
        plain, _, _ = make(case)
        workspace, bias = workspace_of(case, store), bias_of(case)
        plain.decoding.buffers = plain.decoding.buffers._replace(residual_bias=bias)
        for step in steps:
            found = kernel_step(case, store, workspace, step, sinks, bias)
            expected = decode_step(*step, plain, case.params(sinks), backend="torch")
            require_near(name, found, expected, 2e-2)
            require_equal(f"{name}: seq_lens", store.tensors()["seq_lens"], plain.tensors()["seq_lens"])
        for counters in (workspace.arrivals, workspace.finished):
            require_equal(f"{name}: counters", counters, torch.zeros_like(counters))
    _full_row()
    return {"cases": [*CASES, "a full row"]}


def _full_row() -> None:
    """A row without room: nothing is written."""
    store, [step], _ = make(FULL)
    slotted = ("keys", "values", "positions", "codes", "scales")
    store.decoding.set_tensors({name: store.tensors()[name][:, :, :128].contiguous() for name in slotted})
    before = {name: tensor.clone() for name, tensor in store.tensors().items() if name != "missed"}
    kernel_step(FULL, store, workspace_of(FULL, store), step, None)
    for name, tensor in before.items():
        require_equal(f"a full row: {name}", store.tensors()[name], tensor)
