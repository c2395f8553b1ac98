"""The edges of a decode step by the kernels: ties, NaN, ends of buffers, cuts, and what a step does underneath."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_near
from rocketkv import dispatch as backend
from rocketkv.core.decode import Fill, decode_step_torch
from rocketkv.state.store import KVStore

pytest.importorskip("triton", reason="Triton has no package for this platform")

from layer_case import HALF, Case, expected_positions, kernel_step, make, workspace_of
from rocketkv.kernels import decode, launch, select, select_plan
from tracking import Operators


def bounds_of(store: KVStore) -> Tensor:
    return store.decoding.buffers.index_tensors[0]


@pytest.mark.parametrize("page_size", [1, 2, 3, 5])
@pytest.mark.parametrize("query_is_zero", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_ties_go_to_the_lowest_positions(
    page_size: int, query_is_zero: bool, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if separate:
        monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
        monkeypatch.setattr(select_plan, "SELECT_BLOCKS", (32, 128))
    case = Case(page_size=page_size, lengths=(200,))
    store, [(query, key, value)], _ = make(case)
    if query_is_zero:
        query = torch.zeros_like(query)
    else:
        # Equal keys, in whole numbers: equal scores in whatever order they are summed.
        query = (4 * query).round()
        liked = query.sum(1, keepdim=True)
        store.decoding.keys[:] = liked[:, :, None]
        pages = torch.cat((liked, liked), dim=-1) if page_size > 1 else liked
        bounds_of(store)[:] = pages[:, :, None, :, None]
        key = liked
    workspace = workspace_of(case, store)
    kernel_step(case, store, workspace, (query, key, value), None)
    for row in workspace.chosen:
        assert row.tolist() == list(range(case.top_k))


def test_a_nan_key_spoils_its_own_head_group_only() -> None:
    case = Case(lengths=(200, 200), heads=4, kv_heads=2)
    store, [step], _ = make(case)
    other = copy.deepcopy(store)
    other.decoding.keys[0, 1, 199, 5] = torch.nan  # in the open page
    expected = kernel_step(case, store, workspace_of(case, store), step, None)
    found = kernel_step(case, other, workspace_of(case, other), step, None)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0, :2], expected[0, :2])


@pytest.mark.parametrize("page_size", [1, 3])
def test_a_nan_stays_in_the_bounds_of_its_page(page_size: int) -> None:
    case = Case(lengths=(page_size * 60 + page_size - 1,), page_size=page_size)
    store, [(query, key, value)], _ = make(case)
    key[0, 0, 3] = torch.nan
    plain = copy.deepcopy(store)
    kernel_step(case, store, workspace_of(case, store), (query, key, value), None)
    plain.append(key, value)
    assert bounds_of(store).isnan().sum() == (1 if page_size == 1 else 2)
    assert torch.equal(bounds_of(store).nan_to_num(9.0), bounds_of(plain).nan_to_num(9.0))


@pytest.mark.parametrize("programs", [1, 7, 200])
def test_runs_repeat_bit_for_bit_and_cuts_do_not_change_the_choice(programs: int) -> None:
    case = Case(lengths=(500, 300), page_size=1, programs=programs, top_k=150, token_budget=200, dtype=HALF[1], steps=2)
    store, steps, sinks = make(case)
    again, whole = copy.deepcopy(store), copy.deepcopy(store)
    first, second = workspace_of(case, store), workspace_of(case, again)
    uncut = workspace_of(replace(case, programs=1), whole)
    for step in steps:
        out = kernel_step(case, store, first, step, sinks)
        assert torch.equal(kernel_step(case, again, second, step, sinks), out)
        assert_near(kernel_step(case, whole, uncut, step, sinks), out, 2e-2)
        assert torch.equal(first.chosen, uncut.chosen)
    assert first.arrivals.count_nonzero() == 0


def test_a_workspace_serves_one_layer_after_another() -> None:
    case = Case(lengths=(300, 150), programs=64, steps=2)
    stores = [make(case, seed)[0] for seed in range(3)]
    alone = copy.deepcopy(stores)
    shared = workspace_of(case, stores[0])
    _, steps, _ = make(case, 9)
    for step in steps:
        for store, single in zip(stores, alone, strict=True):
            expected = kernel_step(case, single, workspace_of(case, single), step, None)
            assert torch.equal(kernel_step(case, store, shared, step, None), expected)


def test_queries_keys_and_values_may_be_slices_of_a_fused_projection() -> None:
    case = Case(lengths=(200, 150), heads=6, kv_heads=2)
    store, [(query, key, value)], _ = make(case)
    other = copy.deepcopy(store)
    expected = kernel_step(case, store, workspace_of(case, store), (query, key, value), None)
    query, key, value = torch.cat((query, key, value), dim=1).split((6, 2, 2), dim=1)
    assert not query.is_contiguous()
    with Operators() as operators:
        found = kernel_step(case, other, workspace_of(case, other), (query, key, value), None)
    assert torch.equal(found, expected)
    assert not [name for name in operators.names if "clone" in name]
    assert torch.equal(other.decoding.keys, store.decoding.keys)
    assert torch.equal(other.decoding.values, store.decoding.values)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_channels_that_are_not_chosen_do_not_matter(bad: float) -> None:
    case = Case(lengths=(300,), channels=17)
    store, [(query, key, value)], _ = make(case)
    chosen = query.abs().sum(1).argsort(dim=-1, descending=True)[0]
    other = copy.deepcopy(store)
    bounds_of(other)[0, 0, 0, chosen[20], 5] = bad
    first, second = workspace_of(case, store), workspace_of(case, other)
    kernel_step(case, store, first, (query, key, value), None)
    kernel_step(case, other, second, (query, key, value), None)
    assert torch.equal(second.chosen, first.chosen)
    assert torch.equal(second.scores.nan_to_num(7.0)[..., :100], first.scores.nan_to_num(7.0)[..., :100])


@pytest.mark.parametrize(("length", "separate"), [(120, False), (120, True), (256, False), (256, True)])
def test_nothing_beyond_the_buffers_is_touched(length: int, separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row within the budget has no list to read, and one that is full has nowhere to score another page."""
    if separate:
        monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
        monkeypatch.setattr(select_plan, "SELECT_BLOCKS", (64, 128))
    case = Case(lengths=(length,), page_size=2, top_k=64, token_budget=128)
    store, [step], _ = make(case)
    full = length == 256
    if full:  # as many slots as one tile of pages holds
        sizes, tensors = {"keys": 256, "values": 256, "positions": 256, "bounds": 1}, store.tensors()
        store.decoding.set_tensors({name: tensors[name][:, :, :size].contiguous() for name, size in sizes.items()})
    space = workspace_of(case, store)
    guard = 1000.0
    scores, chosen = space.scores, space.chosen
    wide = torch.full((scores.numel() + 256,), guard)
    space.scores = wide[: scores.numel()].view_as(scores)
    lists = torch.full((chosen.numel() + 128,), 2**30, dtype=torch.int32)  # a slot that would be far outside
    space.chosen = lists[: chosen.numel()].view_as(chosen)
    before = store.decoding.keys.clone()
    out = kernel_step(case, store, space, step, None)
    assert out.isfinite().all()
    assert (wide[scores.numel() :] == guard).all()
    assert (lists[chosen.numel() :] == 2**30).all()
    if full:
        assert torch.equal(store.decoding.keys, before)
        assert store.decoding.buffers.seq_lens.tolist() == [[256]]


@pytest.mark.parametrize(("capacity", "page_size"), [(200, 1), (200, 3), (256, 2)])
def test_a_full_row_does_not_count_a_token_that_it_has_no_room_for(capacity: int, page_size: int) -> None:
    """Which would outweigh all others for one head of the group: the other head would choose alone."""
    case = Case(lengths=(capacity,), page_size=page_size)
    store, [(query, _, value)], _ = make(case)
    sizes = dict.fromkeys(("keys", "values", "positions"), capacity)
    store.decoding.set_tensors({name: store.tensors()[name][:, :, :n].contiguous() for name, n in sizes.items()})
    plain = copy.deepcopy(store)
    workspace = workspace_of(case, store)
    out = kernel_step(case, store, workspace, (query, 20 * query[:, :1], value), None)
    positions = expected_positions(case, plain, query, None)
    assert torch.equal(workspace.chosen, positions[0].int())
    for name, tensor in plain.tensors().items():
        assert torch.equal(store.tensors()[name], tensor), name
    fill = Fill(capacity - 1, 0, None)
    buffers = plain.decoding.buffers._replace(clock=plain.clock())
    given = (query, 20 * query[:, :1], value, buffers, plain.decoding.index, case.split, case.params(), fill)
    assert_near(out, decode_step_torch(*given))


@pytest.mark.parametrize("pages", [256, 2048])
def test_a_choice_by_one_program_takes_few_passes(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    monkeypatch.setattr(select_plan, "SELECT_BLOCKS", ())
    case = Case(lengths=(pages - 1,), page_size=1, top_k=40, token_budget=80)
    store, [step], _ = make(case)
    passes = []
    counted = select._found
    monkeypatch.setattr(select, "_found", lambda *args, **kwargs: passes.append(1) or counted(*args, **kwargs))
    kernel_step(case, store, workspace_of(case, store), step, None)
    if decode.INTERPRETED:
        assert 3 <= len(passes) <= 34  # bits of a float32 and two more


def test_nothing_beyond_a_row_of_the_tree_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows have fewer nodes than their buffers; full ones and their neighbours keep to their own."""
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0)
    monkeypatch.setattr(select_plan, "SELECT_BLOCKS", (32,))
    case = Case(lengths=(250, 40, 130, 20), page_size=1, top_k=13, token_budget=26, protected=2)
    store, [step], _ = make(case)
    space = workspace_of(case, store)
    tree = space.select_tree
    assert tree is not None
    assert (tree.fan, tree.chunks, tree.nodes_above) == (2, 12, 12)
    kernel_step(case, store, space, step, None)
    lengths, nodes = store.decoding.buffers.seq_lens.flatten().tolist(), space.candidates[:, 0].tolist()
    for length, chunks in zip(lengths, nodes, strict=True):
        used = math.ceil(length / tree.block) if length > case.token_budget else 0
        written = [any(bits != torch.iinfo(torch.int32).min for bits in slots) for slots in chunks]
        assert written == [i < used for i in range(tree.chunks)]
    assert space.finished.count_nonzero() == 0


@pytest.mark.parametrize("sketch_bits", [None, 2])
@pytest.mark.parametrize("separate", [False, True])
def test_warming_up_compiles_what_a_step_launches_and_writes_nothing(
    sketch_bits: int | None, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "REGISTER_PAGES", 0 if separate else decode.REGISTER_PAGES)
    case = Case(lengths=(90,), head_dim=16, sketch_bits=sketch_bits)
    store, [step], _ = make(case)
    compiled: list[Any] = []

    class Compiler:
        def __init__(self, name: str) -> None:
            self.name = name

        def warmup(self, *args: Any, grid: Any, **kwargs: Any) -> None:
            compiled.append((self.name, grid[:2], [a for a in args if not isinstance(a, Tensor)], kwargs))

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: self.warmup(*args, grid=grid, **kwargs)

    for name in ("append_score", "append_sketch", "select_parts", "select", "select_attend"):
        monkeypatch.setattr(decode, f"{name}_kernel", Compiler(name))
    workspaces, params = backend.Workspaces(), case.params()
    before = {name: tensor.clone() for name, tensor in store.tensors().items() if name != "missed"}
    monkeypatch.setattr(decode, "INTERPRETED", False)
    for _ in range(2):  # once for a shape
        backend.warm_up(step[0], store, params, backend="triton", workspaces=workspaces)
    warmed = compiled.copy()
    compiled.clear()
    assert len(warmed) == 2 + separate
    assert all(torch.equal(store.tensors()[name], tensor) for name, tensor in before.items())
    backend.decode_step(*step, store, params, backend="triton", workspaces=workspaces)
    assert compiled == warmed
    # A verify step writes no query ring: for drafts it is compiled without one, too.
    ring = step[0].new_zeros(1, case.heads, 4, case.head_dim)
    store.decoding.buffers = store.decoding.buffers._replace(query_ring=ring)
    for drafts in (False, True):
        compiled.clear()
        given: dict[str, Any] = {"backend": "triton", "workspaces": backend.Workspaces()}
        backend.warm_up(step[0], store, params, drafts=drafts, **given)
        assert len(compiled) == (1 + drafts) * len(warmed)


def test_a_launch_goes_to_what_was_compiled_for_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DIRECT", True)
    went: list[Any] = []

    class Kernel:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Kernel:
                went.append((self.kind, len(args), sorted(kwargs)))
                return Kernel("compiled")

            return run

    started, kernel, numbers = launch.Launcher(), Kernel("triton"), [3, 0.5, None]

    def start(tensors: list[Tensor | None], numbers: list[float | None], constants: tuple[int, ...] = (7,)) -> Any:
        started(kernel, (1, 1, 1), tensors, numbers, constants, {"num_warps": 4})
        return went.pop()

    wide = torch.zeros(32)
    first = ("triton", 6, ["num_warps"])
    assert start([wide, None], numbers) == first
    assert start([torch.ones(64), None], numbers) == ("compiled", 6, [])
    # Other dtypes, operands, numbers and constants are compiled apart.
    assert start([wide.half(), None], numbers) == first
    assert start([wide, wide], numbers) == first
    assert start([wide, None], [4, 0.5, None]) == first
    assert start([wide, None], numbers, (8,)) == first
    assert start([wide, None], numbers) == ("compiled", 6, [])
    # An address that is no multiple of 16 was not compiled for.
    assert start([wide[1:], None], numbers) == start([wide[1:], None], numbers) == first
    # A copied cache leaves compiled kernels where they are.
    started = copy.deepcopy(started)
    assert start([wide, None], numbers) == first


@pytest.mark.parametrize("count", [1, 3, 4, 5, 33, 1025])
@pytest.mark.parametrize("top_k", [1, 512, 1024, 4096])
def test_a_tree_holds_all_candidates_of_a_node_and_ends_in_one(count: int, top_k: int) -> None:
    tree = select_plan.select_tree(count * 4096, top_k, 1)
    assert tree is not None
    assert tree.chunks * tree.block >= count * 4096
    assert top_k <= tree.slots <= tree.fan * tree.slots <= max(tree.block, tree.slots)
    nodes, above = tree.chunks, []
    while nodes > 1 or not above:
        nodes = -(-nodes // tree.fan)
        above.append(nodes)
    assert tree.nodes_above == sum(above)
    assert select_plan.select_tree(count * 4096, 4097, 1) is None


@pytest.mark.parametrize(("pages", "launches"), [(decode.REGISTER_PAGES, 2), (0, 3)])
def test_a_step_is_two_launches_and_no_operation(pages: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "REGISTER_PAGES", pages)
    case = Case(lengths=(300,))
    store, steps, _ = make(case)
    workspace = workspace_of(case, store)
    names = ("append_score_kernel", "select_parts_kernel", "select_kernel", "select_attend_kernel")
    kernels = {name: getattr(decode, name) for name in names}
    launched = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                launched.append((self.name, args, kwargs, grid))

            return launch

    for name in kernels:
        monkeypatch.setattr(decode, name, Recorded(name))
    query, key, value = steps[0]
    buffers, out = store.decoding.buffers._replace(clock=store.clock()), torch.zeros_like(query)
    with Operators() as operators:
        decode.decode_step_triton(query, key, value, buffers, workspace, case.params(), out)
    assert operators.names == []
    assert len(launched) == launches
    # What was recorded is the step: run it.
    for name, args, kwargs, grid in launched:
        kernels[name][grid](*args, **kwargs)
    assert out.count_nonzero() == out.numel()
    assert store.decoding.buffers.seq_lens.tolist() == [[301]]


@pytest.mark.parametrize(
    "case", [Case(lengths=(70,), steps=12), Case(method="streaming", lengths=(74,), steps=40)], ids=str
)
def test_through_the_backend_over_a_long_decode(case: Case) -> None:
    """Buffers grow, pages close, rows pass the budget; a rolling store rolls."""
    store, steps, sinks = make(case)
    plain = copy.deepcopy(store)
    workspaces, params = backend.Workspaces(), case.params(sinks)
    for step in steps:
        found = backend.decode_step(*step, store, params, backend="triton", workspaces=workspaces)
        assert_near(found, backend.decode_step(*step, plain, params, backend="torch"))
    assert len(workspaces.buffers) == 1
    assert store.seen == plain.seen
    assert store.capacity == plain.capacity > max(case.lengths) + 8
    # And the reference goes on where the kernels stopped, and they after it.
    for first, second in (("torch", "triton"), ("triton", "torch")):
        found = backend.decode_step(*steps[0], store, params, backend=first)
        assert_near(found, backend.decode_step(*steps[0], plain, params, backend=second))
    assert torch.equal(store.decoding.positions, plain.decoding.positions)
    store.crop(store.seen - 3)
    plain.crop(plain.seen - 3)
    found = backend.decode_step(*steps[0], store, params, backend="triton")
    assert_near(found, backend.decode_step(*steps[0], plain, params, backend="torch"))
    assert math.isfinite(float(found.sum()))
