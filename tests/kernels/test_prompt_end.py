"""The end of a prompt on the kernels: what beyond the paper runs there, and how many operators a layer takes."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton has no package for this platform")

from rocketkv import dispatch
from rocketkv.budget import METHODS
from rocketkv.core import eviction
from rocketkv.core.params import AttentionParams
from rocketkv.core.sketch import Sketch, build_sketch, encoding, rotation_matrix
from rocketkv.kernels import build_sketch as sketch_kernels
from rocketkv.kernels import evict
from rocketkv.kernels import value_aware as value_kernels
from rocketkv.state import compress
from rocketkv.state.protection import RowMarks
from rocketkv.state.store import KVStore
from sketch_case import some_keys, some_queries
from tracking import Operators

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
native = pytest.mark.skipif(
    DEVICE.type == "cpu" and not evict.INTERPRETED, reason="without a GPU, TRITON_INTERPRET=1 must precede triton"
)
not_finite = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of the interpreter
HOST_COUNTS = compress._host_counts
EMPTY = {
    (owner, name): getattr(owner, name)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))
}


@native
@not_finite
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "head_dim"), [(1, 64), (2, 16), (2, 80), (2, 128), (3, 12), (4, 7)])
def test_a_sketch_has_the_bits_of_the_reference(bits: int, head_dim: int, dtype: torch.dtype) -> None:
    tokens, start = 70, 5
    keys = some_keys(2, 3, start + tokens + 4, head_dim, dtype)
    rotation = rotation_matrix(head_dim)
    built = build_sketch(keys, 60, rotation, bits, queries=some_queries(keys))
    expected = built._replace(codes=torch.zeros_like(built.codes), scales=torch.zeros_like(built.scales))
    expected.mean[1, 1] = keys[1, 1, 20]
    keys[0, 1, 9, 3], keys[1, 0, 30, 2] = torch.nan, torch.inf
    found = Sketch(*(tensor.to(DEVICE, copy=True) for tensor in expected))
    given = keys[:, :, start : start + tokens]
    eviction.TORCH_OPS.write_sketch(expected, given, start, rotation, bits)
    sketch_kernels.write_sketch(encoding, found, given.to(DEVICE), start, rotation.to(DEVICE), bits)
    assert expected.scales[1, 1, 20] == 0  # the key that equals the mean
    assert expected.scales.isnan().sum() == 2
    for name, tensor in found._asdict().items():
        torch.testing.assert_close(tensor.cpu(), getattr(expected, name), rtol=0, atol=0, equal_nan=True, msg=name)


@native
@not_finite
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "value_dim"), [(2100, 40), (700, 128), (1, 8)])
def test_value_aware_scores_are_as_precise_as_the_reference(size: int, value_dim: int, dtype: torch.dtype) -> None:
    scores = torch.rand(2, 3, size) ** 4
    values = (torch.randn(2, size + 32, 3, value_dim) + 1).to(dtype).transpose(1, 2)
    if size > 1:
        scores[0, :, : size // 3] = 0
        values[0, :, : size // 3] = torch.nan
    expected = eviction.value_aware(scores, values)
    found = value_kernels.value_aware(scores.to(DEVICE), values.to(DEVICE)).cpu()
    weights, own = scores.double(), torch.where(scores[..., None] == 0, 0, values[:, :, :size].double())
    out = (weights[..., None] * own).sum(2, keepdim=True) / weights.sum(2)[..., None, None]
    exact = weights * (own - out).norm(dim=-1)
    assert found.dtype == torch.float32
    error, plain = ((each - exact).square().mean().sqrt() for each in (found, expected))
    assert error <= 2 * plain + exact.abs().max() * 2**-24


class Scratch(Operators):
    """Counts operators, the bytes of all memory that they allocate, and the launches of kernels that stand in here."""

    allocated = launches = 0

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        self.launches += 1

    def restart(self) -> None:
        self.names.clear()
        self.allocated = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in given:
                self.allocated += each.untyped_storage().nbytes()
        return result


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scratch]:
    """Count the operators of the Triton path on tensors without memory, as a GPU would run them."""
    counted = Scratch()
    for (owner, name), plain in EMPTY.items():  # other tests fill new tensors
        monkeypatch.setattr(owner, name, plain)
    modules: list[ModuleType] = [evict, sketch_kernels, value_kernels]
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, counted)
    monkeypatch.setattr(dispatch, "backend_name", lambda *_: "triton")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no such device
    return counted


LLAMA, QWEN, GPT_OSS = (32, 8, 128, False), (32, 4, 128, False), (64, 8, 64, True)


def end_prompt(
    operators: Scratch,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    size: int,
    batch: int,
    shape: tuple[int, int, int, bool],
    marks: RowMarks | None = None,
) -> int:
    """Return the number of operators of a prompt's end; a batch is padded on the left."""
    heads, kv_heads, head_dim, with_sinks = shape
    bfloat16 = {"dtype": torch.bfloat16, "device": "meta"}
    store, chosen = KVStore(), METHODS[method]
    key = torch.empty(batch, kv_heads, size, head_dim, **bfloat16)
    valid = None if batch == 1 else torch.empty(batch, size, dtype=torch.bool, device="meta")
    store.extend(key, torch.empty_like(key), valid, expected=size)
    # Models compute queries and outputs token by token.
    query, out = torch.empty(2, batch, size, heads, head_dim, **bfloat16)
    store.prompt.remember(query.transpose(1, 2), 32)
    store.prompt.remember_outputs(None, out, 32)
    store.marks = None if marks is None else (marks,) * batch
    sinks = torch.empty(heads, **bfloat16) if with_sinks else None
    given: dict[str, Any] = {
        "split": chosen.split(size, 512 if size < 4096 else 1024, head_dim, 128),
        "params": AttentionParams(head_dim**-0.5, None, sinks),
        "decode_reserve": 128,
        "kernel_size": chosen.kernel_size,
        "ops": dispatch.eviction_ops(key),
    }
    if batch > 1 or marks is not None:
        shortest = size if batch == 1 else size - 100
        counts = compress._HostCounts(size, shortest, 0, 0 if marks is None else 40, 50, marks is not None)
        # What the host reads of the device there is not known here.
        monkeypatch.setattr(compress, "_host_counts", lambda *args: counts)
        with operators:
            assert_one_read(size, store)
    with operators:
        compress.close_prompt(store, **given)
    return len(operators.names)


def assert_one_read(size: int, store: KVStore) -> None:
    """Run the operators of the host's counts, up to the one read, which a tensor without memory refuses."""
    marked = None
    if store.marks is not None:
        places = store.prompt.slot_positions(size)
        marked = compress._MarkedSlots(store.marks, places, places >= 0)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        HOST_COUNTS(size, store.prompt.valid(size), marked)


@pytest.mark.parametrize("shape", [LLAMA, QWEN, GPT_OSS], ids=["llama-3.1-8b", "qwen3-30b-a3b", "gpt-oss"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("method", "most"), [("rocketkv", 40), ("rocketkv+", 150)])
def test_operators_of_a_layer_are_few(
    method: str,
    most: int,
    batch: int,
    shape: tuple[int, int, int, bool],
    operators: Scratch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    end_prompt(operators, monkeypatch, method, 2048, 1, shape)  # constants of a device are made once
    for size in (2048, 32768, 131072):
        operators.restart()
        count = end_prompt(operators, monkeypatch, method, size, batch, shape)
        # An operator on a full block takes a GPU longer than a launch.
        further = operators.allocated // 2**28 if method == "rocketkv+" and batch > 1 else 0
        found.append((size, count, further))
        assert operators.launches <= 20
    assert not [each for each in found if each[1] > most + 20 * each[2]]


@pytest.mark.parametrize("batch", [1, 8])
def test_marks_cost_the_same_for_few_and_many_messages(
    batch: int, operators: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = set()
    for messages in (2, 500):
        operators.restart()
        starts = tuple(range(0, 32 * messages, 32))
        marks = RowMarks(tuple((start, start + 4) for start in starts), starts)
        counts.add(end_prompt(operators, monkeypatch, "rocketkv", 32768, batch, LLAMA, marks))
    assert len(counts) == 1
    assert max(counts) <= 100
