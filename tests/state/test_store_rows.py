"""Rows of a batch do not see each other: each gives what it gives alone, whatever the padding, over several turns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from close import assert_near
from naive import attention
from pairs import pairs
from rocketkv.state.store import KVStore
from turns import (
    BUDGET,
    HKV,
    PROMPT,
    SCALING,
    SPLITS,
    WINDOW,
    Tokens,
    close,
    decode,
    extend,
    left_padding,
    prompted,
    tokens,
)

# More than what is kept; more than the budget, less than what is kept; less than the budget, at first; less than the
# window.
LENGTHS = [PROMPT, 45, 21, 12, 3]
STEPS = 27  # beyond the reserve: buffers grow, or roll


def kept_tokens(store: KVStore, row: int = 0) -> list[list[int]]:
    """List the sequence positions that each KV head of a row stores, padding counted."""
    return [[int(p) for p in head if p >= 0] for head in store.decoding.positions[row]]


def assert_row_is_alone(
    batch: KVStore, out: Tensor, row: int, alone: KVStore, expected: Tensor, places: Tensor
) -> None:
    """Assert that a row's outputs and kept tokens are those of the row alone, whose tokens lie at `places`."""
    assert_near(out[row], expected[0])
    assert kept_tokens(batch, row) == [[int(places[p]) for p in head] for head in kept_tokens(alone)]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_of_one_length(split: str) -> None:
    prompt, generated = tokens(3, PROMPT), tokens(3, STEPS)
    batch = prompted(prompt, SPLITS[split])
    assert batch.uniform
    out = decode(batch, generated)
    for row in range(3):
        alone = prompted(prompt.row(row), SPLITS[split])
        expected = decode(alone, generated.row(row))
        assert_row_is_alone(batch, out, row, alone, expected, torch.arange(PROMPT + STEPS))


def holes(lengths: list[int], size: int) -> Tensor:
    """Scatter each row's tokens, but for the last ones."""
    valid = torch.zeros(len(lengths), size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        last = min(length, WINDOW)
        valid[row, size - last :] = True
        valid[row, torch.randperm(size - last)[: length - last]] = True
    return valid


@pytest.mark.parametrize("layout", [left_padding, holes])
@pytest.mark.parametrize("split", SPLITS)
def test_rows_with_padding(split: str, layout: object) -> None:
    size = PROMPT + 5
    valid = left_padding(LENGTHS, size) if layout is left_padding else holes(LENGTHS, size)
    prompt, generated = tokens(len(LENGTHS), size), tokens(len(LENGTHS), STEPS)
    batch = prompted(prompt, SPLITS[split], valid)
    assert not batch.uniform
    out = decode(batch, generated)
    for row in range(len(LENGTHS)):
        alone = prompted(prompt.row(row, valid[row]), SPLITS[split])
        expected = decode(alone, generated.row(row))
        places = torch.cat((valid[row].nonzero()[:, 0], size + torch.arange(STEPS)))
        assert_row_is_alone(batch, out, row, alone, expected, places)


@pytest.mark.parametrize(("split", "first", "second"), pairs(SPLITS, ["even", "padded"], ["even", "padded", "short"]))
def test_a_second_prompt_after_decoding(split: str, first: str, second: str) -> None:
    # The second prompt is longer than the window, or in `short` rows and everywhere shorter.
    lengths = {"even": [30] * 4, "padded": [30, 17, 5, 2], "short": [3, 3, 1, 2]}[second]
    size = max(lengths)
    valid = left_padding([PROMPT, 41, 24, 7], PROMPT) if first == "padded" else None
    valid_again = left_padding(lengths, size) if min(lengths) < size else None
    prompt, answer, question, last = tokens(4, PROMPT), tokens(4, 9), tokens(4, size), tokens(4, STEPS)

    batch = prompted(prompt, SPLITS[split], valid)
    early = decode(batch, answer)
    extend(batch, question, valid_again)
    close(batch, SPLITS[split])
    late = decode(batch, last)
    for row in range(4):
        real = torch.ones(PROMPT, dtype=torch.bool) if valid is None else valid[row]
        real_again = torch.ones(size, dtype=torch.bool) if valid_again is None else valid_again[row]
        alone = prompted(prompt.row(row, real), SPLITS[split])
        assert_near(early[row], decode(alone, answer.row(row))[0])
        extend(alone, question.row(row, real_again))
        close(alone, SPLITS[split])
        expected = decode(alone, last.row(row))
        everything = torch.cat((real, torch.ones(9, dtype=torch.bool), real_again, torch.ones(STEPS, dtype=torch.bool)))
        assert_row_is_alone(batch, late, row, alone, expected, everything.nonzero()[:, 0])


@pytest.mark.parametrize("split", SPLITS)
def test_a_short_row_attends_to_all_it_stores_while_others_select(split: str) -> None:
    lengths, size = [PROMPT, 5], PROMPT
    valid = left_padding(lengths, size)
    prompt, generated = tokens(2, size), tokens(2, BUDGET - 5)
    batch = prompted(prompt, SPLITS[split], valid)
    out = decode(batch, generated)
    short = prompt.row(1, valid[1])
    for step in range(BUDGET - 5):
        key = torch.cat((short.key, generated.key[1:, :, : step + 1]), dim=2)
        value = torch.cat((short.value, generated.value[1:, :, : step + 1]), dim=2)
        assert_near(out[1:, :, step], attention(generated.query[1:, :, step], key, value, SCALING))


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_of_only_padding_attends_to_what_it_generates(split: str) -> None:
    valid = left_padding([PROMPT, 0], PROMPT)
    prompt, generated = tokens(2, PROMPT), tokens(2, BUDGET)
    out = decode(prompted(prompt, SPLITS[split], valid), generated)
    for step in range(BUDGET):
        own = generated.row(1)[: step + 1]
        assert_near(out[1:, :, step], attention(own.query[:, :, step], own.key, own.value, SCALING))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_a_broken_row_leaves_the_others_alone(split: str, padded: bool) -> None:
    valid = left_padding([PROMPT - 5, PROMPT], PROMPT) if padded else None
    prompt, generated = tokens(2, PROMPT), tokens(2, STEPS)
    clean = decode(prompted(prompt, SPLITS[split], valid), generated)
    spoilt = Tokens(prompt.query, prompt.key.clone(), prompt.value.clone())
    spoilt.key[0, 1, 50] = torch.nan
    spoilt.value[0, 1, 50] = torch.nan
    out = decode(prompted(spoilt, SPLITS[split], valid), generated)
    assert torch.equal(out[1], clean[1])
    assert torch.equal(out[0, : out.shape[1] // HKV], clean[0, : out.shape[1] // HKV])


@pytest.mark.parametrize("split", SPLITS)
def test_garbage_in_padding_is_not_seen(split: str) -> None:
    valid = left_padding([PROMPT, 30, 4], PROMPT)
    prompt, generated = tokens(3, PROMPT), tokens(3, STEPS)
    clean = decode(prompted(prompt, SPLITS[split], valid), generated)
    hidden = ~valid[:, None, :, None]
    spoilt = Tokens(
        prompt.query, prompt.key.masked_fill(hidden, torch.nan), prompt.value.masked_fill(hidden, torch.inf)
    )
    out = decode(prompted(spoilt, SPLITS[split], valid), generated)
    assert torch.equal(out, clean)
