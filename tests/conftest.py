"""What every test gets: a seed, as many threads as help, and no zeros by luck."""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Of processes that tests start; those of the tests' own process are set below, for each test.
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[1]

# By the time they take, longest first: paths from this folder.
LONGEST = [
    "kernels/test_aot.py",
    "hf/test_real_model.py",
    "kernels/cpu/test_step.py",
    "eval/test_run_processes.py",
    "eval/test_latency.py",
    "hf/test_compiled.py",
    "test_public_api.py",
    "kernels/test_evict.py",
    "hf/test_bounded_models.py",
    "hf/test_turns_mt.py",
    "tools/test_gpu_programs.py",
    "test_examples.py",
    "hf/test_models.py",
    "vllm/test_rows.py",
    "state/test_snapshot.py",
    "hf/test_turns.py",
    "serve/test_refusals.py",
    "kernels/test_decode.py",
    "eval/test_bench_kernels.py",
    "hf/test_generate.py",
    "state/test_bounded.py",
    "state/test_golden.py",
    "hf/test_cache_mt.py",
    "kernels/test_generate.py",
]

# Models differ in more ways on other versions of transformers: these files go through many of them.
ALL_ON_OLDEST = {"test_models.py", "test_patch.py", "test_errors.py", "test_hybrids.py", "test_rope.py"}

# Tests that name no backend are of the reference.
os.environ.setdefault("ROCKETKV_BACKEND", "torch")

# Kernels are for the interpreter or the compiler from their import on: without a GPU only the former runs them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# studies/ and tools/ are no packages of the wheel, and the root is not on sys.path (see CONTRIBUTING.md).
for _name in ("studies", "tools"):
    _spec = importlib.machinery.ModuleSpec(_name, None, is_package=True)
    _spec.submodule_search_locations = [str(ROOT / _name)]
    sys.modules[_name] = importlib.util.module_from_spec(_spec)


def _hasten_interpreter() -> None:
    """Let Triton's interpreter not look for the same things again and again: a third of its time or more.

    At every call of a function it lists the whole language to find the functions to replace by its own. What is
    replaced, and by what, stays. And every operation makes the types of its blocks anew: what is in them stays.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    is_builtin = importlib.import_module("triton.language").core.is_builtin
    names: dict[Any, list[str]] = {}  # of what is replaced: complete, as nothing is when an owner is first met

    def patch_builtin(owner: Any, *rest: Any) -> None:
        if owner not in names:
            names[owner] = [name for name, member in inspect.getmembers(owner) if is_builtin(member)]
        if names[owner] and is_builtin(getattr(owner, names[owner][0])):  # all of them are replaced at once
            for name in names[owner]:
                interpreter._patch_attr(owner, name, getattr(owner, name), *rest)

    interpreter._patch_builtin = patch_builtin

    core = importlib.import_module("triton.language").core
    numpy_dtype, make_block = interpreter._get_np_dtype, core.block_type.__init__
    numpy_dtypes: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def get_np_dtype(kind: Any) -> Any:
        if kind.name not in numpy_dtypes:
            numpy_dtypes[kind.name] = numpy_dtype(kind)
        return numpy_dtypes[kind.name]

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not core.dtype:
            make_block(self, element_ty, shape)
            return
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        else:
            vars(self).update(blocks[key], shape=blocks[key]["shape"][:])  # a list in older releases

    interpreter._get_np_dtype, core.block_type.__init__ = get_np_dtype, init


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _hasten_interpreter()

# PyTorch lists its factory functions once, at the first use of a device context: before they are replaced below.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """SmolLM2's tokenizer, read once for all files: it takes seconds."""
    from rocketkv.hf.loading import load_smollm2_tokenizer

    return load_smollm2_tokenizer()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the oldest Triton runs, and put the longest files first, so that none is left alone at the end.

    It runs the first case of each of the kernels' tests, and a sixth of the others, drawn by their names: what an old
    Triton lacks shows in many cases. It compiles for one device, the one whose instructions were the newest to it. The
    oldest transformers runs all tests of `ALL_ON_OLDEST`, and of others that touch it the first cases and a third.
    """
    met: set[Any] = set()
    for item in items:
        function = getattr(item, "function", None)
        first = function not in met
        met.add(function)
        if item.path.parent.name == "studies":
            item.add_marker("studies")
        drawn = first or item.path.name in ALL_ON_OLDEST or zlib.crc32(item.name.encode()) % 3 == 0
        if drawn and item.get_closest_marker("integration") is not None:
            item.add_marker("oldest")
        if item.path.parent.name != "kernels":
            continue
        target = item.callspec.params.get("target") if hasattr(item, "callspec") else None
        if target == "sm_90" or (target is None and (first or zlib.crc32(item.name.encode()) % 6 == 0)):
            item.add_marker("oldest_triton")
    rank = {path: i for i, path in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(ROOT / "tests").as_posix(), len(LONGEST)))


def pytest_collection_finish() -> None:
    """Leave what the imports made out of all collections of garbage: each takes a third of a second else."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Set the threads, before fixtures of any scope do their work."""
    # A real model is quicker with the cores that tests beside it leave free. On tiny tensors threads wait for each
    # other: on a busy machine twenty times longer.
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = max(1, min(4, (os.cpu_count() or 1) // beside))
    torch.set_num_threads(cores if item.get_closest_marker("real_model") else 1)


@pytest.fixture(autouse=True)
def _poison_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new empty tensors with NaN (integers with their least value), so that output nobody wrote shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.fill_(torch.nan)
                elif tensor.dtype in (torch.int16, torch.int32, torch.int64):
                    tensor.fill_(torch.iinfo(tensor.dtype).min)
            return tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
