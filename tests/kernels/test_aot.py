"""Every kernel compiles for every device, without one: no registers spilled and wide loads where it matters."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is a dependency on Linux on x86-64 only")

import triton

import kernel_configurations as configurations
from kernel_expectations import DEPENDENCES, Dependence, expected_loops, expected_spills
from rocketkv.budget import rocketkv_plus_split, rocketkv_split
from tools.aot import targets

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# The first Triton that has all it needs to compile for a device, where that is not the oldest supported.
SINCE = {"sm_100": (3, 3), "gfx942": (3, 5)}
NVIDIA = ("sm_80", "sm_90", "sm_100")
# What is read in bulk: lines of the index, codes, keys, values; and what comes in single channels, or one a token.
WIDE = {
    "append_score_kernel": {"bounds"},
    "append_sketch_kernel": {"sketched", "turn"},
    "select_attend_kernel": {"keys", "values", "scores"},
    "select_parts_kernel": {"scores"},
    "dense_partial_kernel": {"key_places", "value_places"},
    "window_statistics_kernel": {"block"},
    "window_sums_kernel": {"key", "query"},
    "compact_kernel": {"keys", "values"},
    "build_sketch_kernel": {"keys"},
    "weighted_values_kernel": {"values"},
    "value_distances_kernel": {"values"},
    "prefill_kernel": {"keys", "values"},
}
NARROW = {
    "append_score_kernel": {"heads"},
    "append_sketch_kernel": {"scales"},
    "build_sketch_kernel": {"balance"},
    "prefill_kernel": {"sinks"},
}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the compiler made for the devices that tests ask about, in a process where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    asked = {call.params["target"] for call in calls if "target" in call.params}
    # The main configurations for each device; CI's own workflow compiles all, for one.
    brief = asked - {"sm_90"} if os.environ.get("ROCKETKV_EVERY_LAUNCH") else asked
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "aot"),
            "--json",
            *(f"--target={name}" for name in sorted(asked)),
            *(f"--brief={name}" for name in sorted(brief)),
        ],
        env={**environment, "PYTHONSAFEPATH": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stdout.startswith("{"), done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["triton"] == triton.__version__
    return result


def reports_for(found: dict[str, Any], target: str, *, main: bool = False) -> list[dict[str, Any]]:
    """Return a device's reports, of the main configurations where asked; skip the test where Triton is too old."""
    if target in found["left_out"]:
        pytest.skip(found["left_out"][target])
    return [report for report in found["reports"] if report["target"] == target and (report["main"] or not main)]


def named(report: dict[str, Any]) -> str:
    return f"{report['kernel']}, {report['configuration']}"


def test_only_devices_that_this_triton_does_not_know_are_left_out() -> None:
    left_out = {name for name, target in targets.TARGETS.items() if target.left_out() is not None}
    assert left_out == {target for target, since in SINCE.items() if since > VERSION}
    assert set(targets.TARGETS) == {*NVIDIA, "gfx942"}


@pytest.mark.parametrize("target", targets.TARGETS)
def test_every_kernel_compiles(found: dict[str, Any], target: str) -> None:
    reports = reports_for(found, target)
    assert not {named(report): report["error"] for report in reports if report["error"] is not None}
    written = {
        node.name
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and not node.name.startswith("_")
    }
    assert {report["kernel"].split("[")[0] for report in reports} == written


@pytest.mark.parametrize("target", NVIDIA)
def test_main_configurations_spill_no_more_than_is_known(found: dict[str, Any], target: str) -> None:
    reports = reports_for(found, target, main=True)
    assert {report["kernel"] for report in reports} >= {
        *("append_score_kernel", "append_sketch_kernel"),
        *("select_attend_kernel", "select_parts_kernel", "select_kernel"),
    }
    spilled = {named(report): (report["spill_stores"], report["spill_loads"]) for report in reports}
    spills = {name: spills for name, spills in spilled.items() if spills != (0, 0)}
    assert spills == expected_spills(VERSION, target)


@pytest.mark.parametrize("target", NVIDIA)
def test_main_configurations_load_sixteen_bytes_at_a_time(found: dict[str, Any], target: str) -> None:
    narrow = []
    for report in reports_for(found, target, main=True):
        loads = {**report["outside"], **report["loads"]}
        wide = WIDE.get(report["kernel"], set())
        narrow += [
            (named(report), pointer, loads.get(pointer)) for pointer in wide if [*loads.get(pointer, ())] != ["16"]
        ]
        for pointer in set(report["loads"]) - NARROW.get(report["kernel"], set()):
            narrow += [(named(report), pointer, width) for width in report["loads"][pointer] if int(width) < 4]
    assert not narrow


@pytest.mark.parametrize("target", NVIDIA)
def test_loops_copy_while_they_compute(found: dict[str, Any], target: str) -> None:
    """Of the main configurations: enough buffers, waits that leave copies unfinished, and few instructions."""
    expected = expected_loops(VERSION)
    wrong, met = [], set()
    for report in reports_for(found, target, main=True):
        loop = expected.get(report["kernel"])
        if loop is None or report["error"] is not None:
            continue
        met.add(report["kernel"])
        for pointer in loop.pointers:
            buffers, in_flight = report["buffers"].get(pointer, 0), report["in_flight"].get(pointer, 0)
            if buffers < loop.buffers or in_flight < loop.in_flight:
                wrong.append((named(report), pointer, "buffers and unfinished copies", (buffers, in_flight)))
            if loop.issued is not None:
                issued = report["instructions"][pointer] * report["warps"] / report["constants"][loop.tokens]
                if issued > loop.issued:
                    wrong.append((named(report), pointer, "instructions a token", issued))
    assert met == set(expected)
    assert not wrong


def test_lengths_share_their_compiled_kernels(found: dict[str, Any]) -> None:
    """A prompt of another length, or buffers of another capacity, compile nothing anew."""
    assert found["recompiled"] == {title: [] for title in configurations.OF_LENGTHS}


@pytest.mark.parametrize("target", NVIDIA)
def test_the_launches_of_a_step_overlap_where_they_can(found: dict[str, Any], target: str) -> None:
    """Each waits for the one ahead before it touches memory, and the first is launched in the usual way."""
    can = target != "sm_80" and importlib.util.find_spec("triton.language.extra.cuda.gdc") is not None
    neither = Dependence(waits=False, permits=False)
    wrong, met = [], set()
    for report in reports_for(found, target):
        expected = DEPENDENCES.get(report["kernel"].split("[")[0], neither) if can else neither
        waits = report["before_wait"] is not None
        met.add(report["kernel"])
        if Dependence(waits, report["permits"]) != expected or report["dependent"] != waits or report["before_wait"]:
            wrong.append((named(report), report["before_wait"], report["permits"], report["dependent"]))
    assert met >= set(DEPENDENCES)
    assert not wrong


@pytest.mark.parametrize(
    ("settings", "length", "token_budget", "head_dim"),
    [
        (configurations.LLAMA_32K, 32768, 1024, 128),
        (configurations.LLAMA_128K, 131072, 1024, 128),
        (configurations.QWEN_8K, 8192, 256, 128),
        (configurations.SMOLLM_8K, 8192, 1024, 64),
    ],
)
def test_configurations_are_what_the_budget_splits_into(
    settings: dict[str, Any], length: int, token_budget: int, head_dim: int
) -> None:
    split = rocketkv_split(length, token_budget, head_dim, configurations.RESERVE)
    assert split.kept_tokens is not None
    assert settings == {
        "capacity": split.kept_tokens + configurations.RESERVE,
        "token_budget": split.token_budget,
        "page_size": split.page_size,
        "channels": split.channels,
        "top_k": split.top_k,
    }


@pytest.mark.parametrize(
    ("settings", "length", "token_budget", "head_dim"),
    [
        (configurations.PLUS_32K, 32768, 1024, 128),
        (configurations.PLUS_128K, 131072, 2048, 128),
        (configurations.PLUS_8K, 8192, 512, 256),
    ],
)
def test_configurations_of_sketches_are_what_the_budget_splits_into(
    settings: dict[str, Any], length: int, token_budget: int, head_dim: int
) -> None:
    split = rocketkv_plus_split(length, token_budget, head_dim, configurations.RESERVE)
    assert split.kept_tokens is not None
    assert settings == {
        "capacity": split.kept_tokens + configurations.RESERVE,
        "token_budget": split.token_budget,
        "sketch_bits": split.sketch_bits,
        "top_k": split.top_k,
    }
