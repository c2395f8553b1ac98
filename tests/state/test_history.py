"""RocketKV-MT layer by layer, against a plain loop of its definition; and what a history does alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_near
from naive_methods import HKV, KERNEL, SCALING, WINDOW, D, H, Head, snap, sparse
from rocketkv.budget import BudgetSplit
from rocketkv.config import RocketKVConfig
from rocketkv.core.params import AttentionParams
from rocketkv.hf.layer import RocketKVLayer, layer_of
from rocketkv.hf.turns import prompt_part
from rocketkv.state import history as history_module
from rocketkv.state.history import History
from rocketkv.state.store import KVStore
from rocketkv.state.transfer import buffer_like

CPU = torch.device("cpu")
PARAMS = AttentionParams(SCALING)
SPLIT = BudgetSplit(token_budget=24, kept_tokens=40, page_size=3, channels=9, top_k=12)
# Tokens of each turn's prompt, and decoded after it: nothing is left out of the last one's window but by stage 1.
TURNS = [(70, 9), (25, 4), (11, 14), (30, 7)]


def layer(method: str = "rocketkv-mt", **fields: Any) -> RocketKVLayer:
    return RocketKVLayer(
        RocketKVConfig(method=method, split=SPLIT, window_size=WINDOW, kernel_size=KERNEL, decode_reserve=5, **fields)
    )


def no_fast(*args: Any) -> None:
    return None


def forward(made: RocketKVLayer, given: tuple[Tensor, Tensor, Tensor], start: int, stop: int) -> Tensor:
    """Take tokens `start` to `stop` through a layer and return [B, H, n, D]."""
    query, key, value = (tensor[:, :, start:stop] for tensor in given)
    if stop - start > 1 and made.store.closed and made.prompt_end is None:
        made.begin_turn()
    made.armed = True
    returned, _ = made.update(key, value)
    assert layer_of(returned) is made
    return made.attend(query, None, PARAMS, fast=no_fast).transpose(1, 2)


def defined(head: Head, turns: list[tuple[int, int]]) -> Tensor:
    """Return [tokens, G, D] by the definition: prompts attend to all, decoding to k of what their filter left."""
    out, at = [], 0
    for given, decoded in turns:
        end = at + given
        out += [head.attend(token, list(range(token + 1))) for token in range(at, end)]
        assert SPLIT.kept_tokens is not None
        assert SPLIT.channels is not None
        assert SPLIT.top_k is not None
        kept = snap(head, SPLIT.kept_tokens, end)
        for token in range(end, end + decoded):
            stored = kept + list(range(end, token + 1))
            out.append(head.attend(token, sparse(head, token, stored, SPLIT.page_size, SPLIT.channels, SPLIT.top_k)))
        at = end + decoded
    return torch.stack(out)


class Arriving:
    """Stands for a stream that still copies to the host, and counts how often it is waited for."""

    waits = 0

    def synchronize(self) -> None:
        self.waits += 1


@pytest.mark.parametrize("use", [History.tensors, copy.deepcopy, lambda history: history.map(torch.clone)])
def test_a_host_waits_once_for_copies_before_it_reads_them(use: Callable[[History], Any]) -> None:
    store, history = KVStore(), History("cpu")
    key = torch.randn(1, HKV, 20, D)
    store.extend(key, key + 1, expected=20)
    history.keep(store)
    stream = Arriving()
    history._copying = stream  # type: ignore[assignment]
    use(history)
    assert stream.waits == 1
    use(history)
    assert stream.waits == 1
    assert torch.equal(history.tensors()["values"][:, :, :20], key + 1)
    history._copying = stream  # type: ignore[assignment]
    store.extend(key, key)
    history.keep(store)  # buffers that grow are read
    assert stream.waits == 2


class FakeStream:
    """A stream of a GPU that is not there: a list of what was put on it, in order."""

    def __init__(self, device: object = None) -> None:
        self.work: list[object] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(FakeEvent(other))

    def wait_event(self, event: FakeEvent) -> None:
        self.work.append(event)


class FakeEvent:
    """The work that a stream had been given when the event was recorded."""

    def __init__(self, stream: FakeStream | None = None) -> None:
        self.before: list[object] = [] if stream is None else [*stream.work]

    def record(self, stream: FakeStream) -> None:
        self.before = [*stream.work]


def test_a_layer_waits_for_its_own_tokens_and_not_for_the_next_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of the next layer, on the same stream, overlaps the layer's computation."""
    current, gpu, active = FakeStream(), torch.device("cuda"), [FakeStream()]

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        active.append(stream)
        yield
        active.pop()

    def copy_tokens(target: Tensor, source: Tensor) -> None:
        target.copy_(source)
        active[-1].work.append(("copied", source.data_ptr()))

    for name, fake in (("Stream", FakeStream), ("Event", FakeEvent), ("stream", on)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(history_module, "copy_tokens", copy_tokens)
    monkeypatch.setattr(
        history_module, "buffer_like", lambda like, capacity, *rest: buffer_like(like, capacity, 0, CPU)
    )
    histories = []
    for number in range(2):
        store, history = KVStore(), History("cpu")
        key = torch.full((1, HKV, 20, D), float(number))
        store.extend(key, key + 1, expected=20)
        history.keep(store)
        histories.append(history)
    active[-1].work.clear()
    first = histories[0]._fetch(gpu, 3)
    second = histories[1]._fetch(gpu, 3, first.stream)
    assert first.stream is second.stream
    keys, values, _ = first.arrived()
    assert keys[0, 0, :20].eq(0).all()
    assert values[0, 0, :20].eq(1).all()
    [awaited] = current.work
    assert isinstance(awaited, FakeEvent)
    of = [{("copied", tensor.data_ptr()) for tensor in history.tensors().values()} for history in histories]
    assert of[0] <= set(awaited.before)
    assert not of[1] & set(awaited.before)
    second.arrived()
    awaited = current.work[-1]
    assert isinstance(awaited, FakeEvent)
    assert of[1] <= set(awaited.before)


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_layer_is_its_definition(batch: int, device: str | None, told: bool, chunk: int) -> None:
    total = sum(map(sum, TURNS))
    given = torch.randn(batch, H, total, D), torch.randn(batch, HKV, total, D), torch.randn(batch, HKV, total, D)
    made, parts, at = layer(history_device=device), [], 0
    for prompt, decoded in TURNS:
        if told:
            made.begin_turn(prompt)
        size = chunk or prompt
        # Of the last chunk one token may be left: where nobody says otherwise it is decoded.
        bounds = [*range(at, at + prompt - (size + 1), size), at + prompt] if chunk else [at, at + prompt]
        parts += [forward(made, given, first, last) for first, last in pairwise(bounds)]
        at += prompt
        parts += [forward(made, given, token, token + 1) for token in range(at, at + decoded)]
        at += decoded
        assert made.get_seq_length() == at
        assert made.store.stored == SPLIT.kept_tokens + decoded  # type: ignore[operator]
    found, group = torch.cat(parts, dim=2), H // HKV
    for b in range(batch):
        for g in range(HKV):
            own = slice(g * group, (g + 1) * group)
            query, key, value = (tensor[b, place].double() for tensor, place in zip(given, (own, g, g), strict=True))
            expected = defined(Head(query.transpose(0, 1), key, value, 5), TURNS)
            assert_near(found[b, own].transpose(0, 1), expected)
    # What is there in the end is what came, in its order.
    assert made.history is not None
    made.history.absorb(made.store)
    assert made.history.seen == total
    assert made.history.keys is not None
    assert made.history.values is not None
    assert made.history.keys[:, :, :total].equal(given[1])
    assert made.history.values[:, :, :total].equal(given[2])
    assert made.history.positions is None


@pytest.mark.parametrize("verifies", [False, True])
@pytest.mark.parametrize(
    ("seen", "given", "end", "begins", "expected", "verified"),
    [
        (0, 90, 90, False, 90, 90),  # a first prompt
        (0, 90, None, False, 90, 90),
        (0, 1, None, False, 1, 1),
        (0, 20, 90, False, 20, 20),  # its first chunk
        (80, 10, 90, False, 10, 10),  # its last
        (0, 95, 90, False, 95, 90),  # with a draft behind it
        (90, 1, None, False, 0, 0),  # a decoded token
        (90, 1, 90, False, 0, 0),
        (20, 5, None, False, 5, 0),  # a chunk of a prompt of unknown length
        (90, 5, None, False, 0, 0),  # a draft
        (90, 5, 95, False, 5, 5),
        (90, 9, 95, False, 9, 5),
        (90, 1, None, True, 1, 1),  # a prompt of one token
        (90, 5, None, True, 5, 5),
    ],
)
def test_where_a_turn_begins(
    seen: int, given: int, end: int | None, begins: bool, expected: int, verified: int, verifies: bool
) -> None:
    phase = {"closed": seen >= 90, "begins": begins, "verifies": verifies}
    assert prompt_part(seen, given, end, **phase) == (verified if verifies else expected)


def closed(length: int = 60) -> tuple[RocketKVLayer, tuple[Tensor, Tensor, Tensor]]:
    """Return a layer after a prompt, and its tokens with more to come."""
    given = torch.randn(1, H, 2 * length, D), torch.randn(1, HKV, 2 * length, D), torch.randn(1, HKV, 2 * length, D)
    made = layer()
    made.prompt_end = length
    forward(made, given, 0, length)
    return made, given


def test_on_one_device_the_prompts_buffers_are_the_history() -> None:
    made, given = closed()
    assert made.history is not None
    assert made.history.keys is not None
    assert made.history.keys.data_ptr() == given[1].data_ptr() or made.history.keys[:, :, :60].equal(
        given[1][:, :, :60]
    )
    before = made.history.keys
    for token in range(60, 64):
        forward(made, given, token, token + 1)
    assert made.history.keys is before  # nothing is copied while a turn decodes
    assert made.history.seen == 60
    forward(made, given, 64, 70)
    # The store has it all while a prompt runs: a buffer does not live twice.
    assert made.history.tensors() == {}
    assert made.store.keys is not None
    assert made.store.keys[:, :, :70].equal(given[1][:, :, :70])


def test_room_grows_by_half() -> None:
    made, given = closed()
    history = made.history
    assert history is not None
    sizes = []
    for token in range(60, 120):
        forward(made, given, token, token + 1)
        history.absorb(made.store)
        assert history.keys is not None
        sizes.append(history.keys.shape[2])
    assert len(set(sizes)) <= 3
    assert sizes[-1] <= 1.5 * 120
    assert history.keys is not None
    assert history.keys[:, :, :120].equal(given[1])


def test_rows_of_different_lengths_are_absorbed_each_from_its_own_slots() -> None:
    made = layer()
    total, lengths = 60, [60, 33, 45]
    given = torch.randn(3, H, 90, D), torch.randn(3, HKV, 90, D), torch.randn(3, HKV, 90, D)
    valid = torch.arange(total) >= total - torch.tensor(lengths)[:, None]
    made.store.extend(given[1][:, :, :total], given[2][:, :, :total], valid)
    made.store.prompt.remember(given[0][:, :, :total], WINDOW)
    made.prompt_tokens = total
    made.end_prompt(PARAMS)
    assert not made.store.uniform
    for token in range(total, 70):
        forward(made, given, token, token + 1)
    history = made.history
    assert history is not None
    history.absorb(made.store)
    assert history.seen == 70
    assert history.keys is not None
    assert history.keys[:, :, :70].equal(given[1][:, :, :70])
    assert history.positions is not None
    expected = torch.arange(70).repeat(3, 1)
    expected[:, :total][~valid] = -1
    assert history.positions[:, 0, :70].equal(expected.int())


def test_a_copy_has_no_snapshots_and_none_of_its_own_are_lost() -> None:
    made, given = closed()
    taken = made.snapshot()
    other = copy.deepcopy(made)
    with pytest.raises(ValueError, match="another"):
        other.restore(taken)
    for token in range(60, 70):
        forward(made, given, token, token + 1)
    forward(made, given, 70, 90)
    made.restore(taken)
    assert made.get_seq_length() == 60
    found = [forward(each, given, 60, 80) for each in (made, other)]
    assert found[0].equal(found[1])


def test_later_tokens_on_an_old_buffer_leave_a_newer_snapshot_alone() -> None:
    """Both ways: a prompt that goes on from a snapshot in its middle, and a turn that begins anew beside one."""
    made, given = closed()
    forward(made, given, 60, 61)
    decoded = made.snapshot()
    forward(made, given, 61, 70)
    middle = made.snapshot()
    forward(made, given, 70, 85)
    forward(made, given, 85, 86)
    after = made.snapshot()
    wrong = tuple(tensor.flip(2) for tensor in given)

    def rest(taken: Any, start: int) -> Tensor:
        made.restore(taken)
        return forward(made, given, start, start + 20)

    expected = [rest(decoded, 61), rest(middle, 70), rest(after, 86)]
    for taken, start in ((middle, 70), (decoded, 61), (after, 86)):
        made.restore(taken)
        forward(made, wrong, start, start + 20)  # type: ignore[arg-type]
        forward(made, wrong, start + 20, start + 21)  # type: ignore[arg-type]
        assert rest(decoded, 61).equal(expected[0])
        assert rest(middle, 70).equal(expected[1])
        assert rest(after, 86).equal(expected[2])


def test_what_does_not_go_together_is_refused() -> None:
    history, store = History(), KVStore()
    with pytest.raises(ValueError, match="the store reads no prompt"):
        history.keep(store)
    with pytest.raises(ValueError, match="there is no store that a history could belong to"):
        history.fill({}, store)
    with pytest.raises(ValueError, match="there is no history to resume"):
        history.resume(store, 1)
    made, _ = closed()
    assert made.history is not None
    tensors = {name: tensor[:, :, :60] for name, tensor in made.history.tensors().items()}
    short = {name: tensor[:, :, :59] for name, tensor in tensors.items()}
    for wrong in (short, {"keys": tensors["keys"]}, tensors | {"positions": torch.zeros(1, 1, 59)}):
        with pytest.raises(ValueError, match="the tensors of a history do not go together"):
            history.fill(wrong, made.store)
    history.fill(tensors, made.store)
    assert history.seen == 60
    other = made.history.snapshot(made.store)
    with pytest.raises(ValueError, match="of another history"):
        history.restore(other)
