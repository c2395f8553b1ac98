"""One captured decode step, replayed many times, bit for bit; and many captured steps that equal eager ones.

Letters: B batch, H query heads, D head dim.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rocketkv.eval.bench.kernel_arms import DecodeStep
from rocketkv.eval.bench.kernel_cases import Case, CaseBuffers, LayerShape
from rocketkv.eval.bench.kernel_checks import require_equal
from rocketkv.eval.checks import WrongResultError

from .replay import Noise, captured, warmed

# Buffers of a workspace that are constants, or that every step leaves as it found them: counters, zero.
KEPT = ("arrivals", "finished", "turn")
NOISE_EVERY = 50


def poison(tensors: dict[str, Tensor]) -> None:
    """Fill buffers with NaN, integers with their least value: what a step reads before it writes it shows."""
    for name, tensor in tensors.items():
        if name not in KEPT:
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bits as integers, by which NaN equals itself."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def stress(
    method: str, layer: LayerShape, case: Case, dtype: torch.dtype, device: torch.device, replays: int
) -> dict[str, Any]:
    """Replay a step at the end of a prompt, its workspace poisoned each time, beside work on another stream.

    Args:
        method: one of `METHODS`.
        layer: heads and head dim.
        case: batch, prompt and budget.
        dtype: of queries, keys and values.
        device: where.
        replays: how many.

    Raises:
        WrongResultError: a replay's output, lengths or counters differ from the first step's.
    """
    step = DecodeStep(CaseBuffers(case, layer, dtype, device, None), method)
    step.check()
    store, workspace = step.stores.stores[0], step.workspace
    expected = step.run(0).clone()
    lengths = store.decoding.buffers.seq_lens.clone()
    wrong = torch.zeros(3, dtype=torch.int64, device=device)

    def once() -> None:
        step.stores.rewind()
        poison(workspace.tensors())
        step.outs[0].fill_(torch.nan)
        out = step.run(0)
        differs = torch.stack(
            (
                (bits(out) != bits(expected)).any(),
                (store.decoding.buffers.seq_lens != lengths).any(),
                torch.stack([workspace.tensors()[name].ne(0).any() for name in ("arrivals", "finished")]).any(),
            )
        )
        wrong.add_(differs)

    warmed(once, device)
    wrong.zero_()
    replay, noise = captured(once, device), Noise(device)
    for number in range(replays):
        if number % NOISE_EVERY == 0:
            noise.make()
        replay()
    outputs, lengths_wrong, counters = wrong.tolist()
    if outputs or lengths_wrong or counters:
        raise WrongResultError(
            f"of {replays} replays of a step of {method}, {outputs} have another output, {lengths_wrong} other lengths "
            f"and {counters} counters that are not zero"
        )
    return {"method": method, "case": str(case), "replays": replays, "launches": len(step.launches(0))}


def _inputs(step: DecodeStep, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return the queries, keys and values of some tokens, the same for equal steps."""
    buffers = step.buffers
    generator = torch.Generator(buffers.device).manual_seed(1)
    given = (buffers.query[0], buffers.key[0], buffers.value[0])
    for _ in range(count):
        new = [torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device) for t in given]
        yield new[0], new[1], new[2]


def pages(
    method: str, layer: LayerShape, case: Case, dtype: torch.dtype, device: torch.device, count: int
) -> dict[str, Any]:
    """Run many tokens through a captured step and through eager ones: equal bits, across the ends of pages.

    Args:
        method: one of `METHODS`.
        layer: heads and head dim, with room for so many tokens.
        case: batch, prompt and budget.
        dtype: of queries, keys and values.
        device: where.
        count: tokens.

    Raises:
        WrongResultError: an output or a buffer differs.
        ValueError: there is no room for so many tokens.
    """
    if count > layer.reserve:
        raise ValueError(f"count must be at most the room of {layer.reserve} tokens, got {count}")
    graphed, eager = (DecodeStep(CaseBuffers(case, layer, dtype, device, None), method) for _ in range(2))
    warmed(lambda: graphed.run(0), device)
    graphed.stores.rewind()
    replay = captured(lambda: graphed.run(0), device)
    graphed.stores.rewind()
    given = (graphed.buffers.query[0], graphed.buffers.key[0], graphed.buffers.value[0])
    own = (eager.buffers.query[0], eager.buffers.key[0], eager.buffers.value[0])
    for number, new in enumerate(_inputs(eager, count), 1):
        for static, plain, tensor in zip(given, own, new, strict=True):
            static.copy_(tensor)
            plain.copy_(tensor)
        replay()
        require_equal(f"{method}: output of step {number}", bits(graphed.outs[0]), bits(eager.run(0)))
    stored = (graphed.stores.split.kept_tokens or 0) + count
    found, expected = (step.stores.stores[0].tensors() for step in (graphed, eager))
    for name, tensor in expected.items():
        # Slots behind the last token hold anything.
        slotted = name in ("keys", "values", "positions", "codes", "scales")
        shown = [t[:, :, :stored] if slotted else t for t in (found[name], tensor)]
        require_equal(f"{method}: {name} after {count} steps", *(one.nan_to_num() for one in shown))
    counters = graphed.workspace.arrivals
    require_equal(f"{method}: counters after {count} steps", counters, torch.zeros_like(counters))
    return {"method": method, "case": str(case), "steps": count, "page_size": graphed.stores.split.page_size}
