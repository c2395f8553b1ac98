"""What a worker does with the requests of a step; without vLLM."""

from __future__ import annotations

import pytest
import torch

from rocketkv.vllm.metadata import RequestTable, StepPlan, StepRow

ROW, END = 3, 50


def v1(
    start: int, stop: int, *, tail: int | None, last: int, row: int | None = None, end: int | None = None
) -> StepRow:
    """Return a request as model runner V1 reports it."""
    return StepRow(0, start, stop, 0, row, end, end is None or stop <= end, tail, last)


def v2(start: int, stop: int, prefilling: bool, row: int = ROW) -> StepRow:
    """Return a request as model runner V2 reports it."""
    return StepRow(0, start, stop, 0, row, None, prefilling, None, 0)


def read(plan: StepPlan, first: int) -> None:
    """Remember queries, numbered from `first`, for the step's chunk."""
    chunk = plan.chunks[0]
    tokens = torch.arange(first, first + chunk.last - chunk.first).float()
    chunk.prompt.remember("layer", tokens[:, None, None], 16)


@pytest.mark.parametrize("runner", [1, 2])
def test_chunks_of_a_prompt_and_its_first_step(runner: int) -> None:
    table = RequestTable(4)
    steps = [
        (v1(0, 30, tail=None, last=7), v2(0, 30, True)),
        (v1(30, 40, tail=7, last=9, row=ROW, end=END), v2(30, 40, True)),  # a marker, before the prompt's end
        (v1(40, END, tail=9, last=9, row=ROW, end=END), v2(40, END, True)),
    ]
    for step in steps:
        row = step[runner - 1]
        plan = table.plan([row])
        assert not plan.closings
        assert not plan.decodes
        read(plan, row.start)
    decode = v1(END, END + 1, tail=9, last=9, row=ROW, end=END), v2(END, END + 1, False)
    plan = table.plan([decode[runner - 1]])
    (closing,) = plan.closings
    assert closing.tokens == END
    assert closing.prompt.queries["layer"].flatten().tolist() == list(range(END - 16, END))
    assert plan.decodes[0].sequence is closing.sequence
    assert not table.reading
    assert not table.read


def test_blocks_change_hands_within_a_step() -> None:
    table = RequestTable(4)
    read(table.plan([v1(0, 30, tail=None, last=7)]), 0)
    # The first request goes on in block 9; a new one, after a prefix hit, ends its chunk in block 7.
    plan = table.plan([v1(30, 40, tail=7, last=9), v1(20, 28, tail=5, last=7)])
    assert [chunk.prompt.end for chunk in plan.chunks] == [40, 28]
    assert plan.chunks[0].prompt.queries
    assert not plan.chunks[1].prompt.queries
    plan = table.plan([v1(28, 35, tail=7, last=8), v1(40, 45, tail=9, last=9)])
    assert not plan.chunks[0].prompt.queries
    assert plan.chunks[1].prompt.queries


def test_prompts_that_were_aborted_are_dropped() -> None:
    table = RequestTable(2)
    for block in range(20):
        table.plan([v1(0, 8, tail=None, last=block)])
    assert len(table.reading) == 4


def test_steps_that_do_not_follow_are_refused() -> None:
    table = RequestTable(4)
    with pytest.raises(RuntimeError, match="row 3 of the slab has none tokens"):
        table.plan([v1(END + 5, END + 6, tail=9, last=9, row=ROW, end=END)])
    read(table.plan([v1(0, END, tail=None, last=9, row=ROW, end=END)]), 0)
    table.plan([v1(END, END + 1, tail=9, last=9, row=ROW, end=END)])
    with pytest.raises(RuntimeError, match="has 51 tokens, but the step decodes token 52"):
        table.plan([v1(END + 2, END + 3, tail=9, last=9, row=ROW, end=END)])
    with pytest.raises(RuntimeError, match="a request whose prompt goes on"):
        table.plan([v1(END + 1, END + 9, tail=9, last=9, row=ROW, end=END)])
