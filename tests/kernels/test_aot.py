"""Every kernel compiles for every device, without one: no registers spilled and wide loads where it matters."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is a dependency on Linux on x86-64 only")

import triton

from rocketkv.budget import rocketkv_plus_split, rocketkv_split
from rocketkv.eval.bench import aot, configurations

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
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
}
NARROW = {"append_score_kernel": {"heads"}, "append_sketch_kernel": {"scales"}}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the compiler made for the devices that tests ask about, in a process where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    asked = {call.params["target"] for call in calls if "target" in call.params}
    brief = asked - {"sm_90"} if len(asked) > 1 else asked  # all configurations for one device, the main ones for each
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "rocketkv.eval.bench.aot",
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
    left_out = {name for name, target in aot.TARGETS.items() if target.left_out() is not None}
    assert left_out == {target for target, since in SINCE.items() if since > VERSION}
    assert set(aot.TARGETS) == {*NVIDIA, "gfx942"}


@pytest.mark.parametrize("target", aot.TARGETS)
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


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_main_configurations_spill_nothing(found: dict[str, Any], target: str) -> None:
    reports = reports_for(found, target, main=True)
    assert {report["kernel"] for report in reports} >= {
        *("append_score_kernel", "append_sketch_kernel"),
        *("select_attend_kernel", "select_parts_kernel", "select_kernel"),
    }
    spilled = {named(report): (report["spill_stores"], report["spill_loads"]) for report in reports}
    assert not {name: spills for name, spills in spilled.items() if spills != (0, 0)}


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


def test_loads_are_told_apart_by_width_and_line() -> None:
    sass = """
\t//## File "/somewhere/kernels/append_score.py", line 157
        /*3f10*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR28][R18.64] ;
        /*3f30*/                   LDGDEPBAR ;
\t//## File "/somewhere/kernels/append_score.py", line 159 inlined at "/somewhere/kernels/append_score.py", line 9
        /*40d0*/               @P1 LDG.E.U16 R71, desc[UR28][R66.64] ;
        /*40e0*/                   LDG.E R71, desc[UR28][R66.64] ;
        /*40f0*/                   STL.64 [R1+0x8], R4 ;
        /*4100*/                   LDL R4, [R1+0x8] ;
"""
    place = ("append_score.py", 159)
    assert list(aot.nvidia_accesses(sass)) == [
        (("append_score.py", 157), "load", 16),
        (place, "load", 2),
        (place, "load", 4),
        (place, "spill store", 8),
        (place, "spill load", 4),
    ]
    gcn = """
\t.file\t1 "/somewhere/kernels" "append_score.py"
\t.loc\t1 157 5 is_stmt 1               ; append_score.py:157:5
\tglobal_load_dwordx4 v[2:5], v1, s[6:7]
\tbuffer_load_ushort v22, v1, s[4:7], 0 offen
\tscratch_store_dwordx2 off, v[2:3], off offset:8
"""
    place = ("append_score.py", 157)
    assert list(aot.amd_accesses(gcn)) == [(place, "load", 16), (place, "load", 2), (place, "spill store", 8)]


def test_inlined_assembly_keeps_the_line_of_source_it_comes_from() -> None:
    load = "\t@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];\n"
    ptx = (
        "\t.loc\t1 20 13\n\tmov.b32 %r5, 0;\n\t// begin inline asm\n\t.loc\t1 22 13\n\tmov.u32 %r1, %r5;\n"
        f"\t.loc\t1 23 13\n\tmov.u32 %r2, %r5;\n{load}\t// end inline asm\n\t.loc\t1 25 13\n\tret;\n"
    )
    assert aot.one_line(ptx) == (
        "\t.loc\t1 20 13\n\tmov.b32 %r5, 0;\n\t.loc\t1 22 13\n\t// begin inline asm\n\tmov.u32 %r1, %r5;\n"
        f"\tmov.u32 %r2, %r5;\n{load}\t// end inline asm\n\t.loc\t1 25 13\n\tret;\n"
    )
    assert aot.one_line(load) == load


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
