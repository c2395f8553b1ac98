"""The tool that compiles kernels ahead of time reads disassemblies and Triton's representation right."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is a dependency on Linux on x86-64 only")

from tools.aot import assembly
from tools.aot.pipeline import pipeline


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
    assert list(assembly.nvidia_accesses(sass)) == [
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
    assert list(assembly.amd_accesses(gcn)) == [(place, "load", 16), (place, "load", 2), (place, "spill store", 8)]


def test_inlined_assembly_keeps_the_line_of_source_it_comes_from() -> None:
    load = "\t@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];\n"
    ptx = (
        "\t.loc\t1 20 13\n\tmov.b32 %r5, 0;\n\t// begin inline asm\n\t.loc\t1 22 13\n\tmov.u32 %r1, %r5;\n"
        f"\t.loc\t1 23 13\n\tmov.u32 %r2, %r5;\n{load}\t// end inline asm\n\t.loc\t1 25 13\n\tret;\n"
    )
    assert assembly.one_line(ptx) == (
        "\t.loc\t1 20 13\n\tmov.b32 %r5, 0;\n\t.loc\t1 22 13\n\t// begin inline asm\n\tmov.u32 %r1, %r5;\n"
        f"\tmov.u32 %r2, %r5;\n{load}\t// end inline asm\n\t.loc\t1 25 13\n\tret;\n"
    )
    assert assembly.one_line(load) == load


def test_the_innermost_loop_that_loads_is_counted() -> None:
    row = "        /*0{0:03x}*/  {1} ;"
    place = '\t//## File "/somewhere/kernels/append_score.py", line {0}'
    sass = "\n".join(
        [
            place.format(5),
            row.format(0, "LDGSTS.E.BYPASS.128 [R0], desc[UR28][R18.64]"),  # before the loop
            ".L_x_1:",  # the outer loop: instructions 1 to 8
            row.format(1, "IADD3 R1, R1, 0x1, RZ"),
            row.format(2, "@P0 BRA `(.L_x_9)"),  # forward: no loop
            ".L_x_2:",  # the inner loop: 3 to 6
            row.format(3, "HMMA.16816.F32 R4, R4, R6, R4"),
            row.format(4, "LDGSTS.E.BYPASS.128 [R0], desc[UR28][R18.64]"),
            place.format(7),
            row.format(5, "LDG.E R71, desc[UR28][R66.64]"),
            row.format(6, "@!P1 BRA `(.L_x_2)"),
            ".L_x_9:",
            place.format(9),
            row.format(7, "LDG.E R71, desc[UR28][R66.64]"),
            row.format(8, "@P0 BRA.U `(.L_x_1)"),
            row.format(9, "EXIT"),
        ]
    )
    pointers = {("append_score.py", 5): "bounds", ("append_score.py", 7): "heads", ("append_score.py", 9): "scales"}
    assert assembly.loop_instructions(sass, pointers) == {"bounds": 4, "heads": 4, "scales": 8}


@pytest.mark.parametrize("dialect", ["ttg", "triton_gpu"])
def test_buffers_and_waits_are_those_of_the_loop_that_copies(dialect: str) -> None:
    ttgir = """
#loc = loc("/somewhere/kernels/append_score.py":47:1)
    %line = ttg.local_alloc : () -> !ttg.memdesc<1x16xi32, #shared, #smem, mutable> loc(#loc8)
    %block = ttg.local_alloc : () -> !ttg.memdesc<3x16x128xbf16, #shared1, #smem, mutable> loc(#loc7)
    %q = ttg.local_alloc %part : (tensor<16x16xbf16, #blocked2>) -> !ttg.memdesc<16x16xbf16, #shared2, #smem> loc(#loc7)
    %mass = scf.for %tile = %split to %14 step %c16_i32 iter_args(%peak = %12) -> (tensor<16xf32>)  : i32 {
      %first = ttg.async_copy_global_to_local %block_141, %block_143 mask %m : tensor<16> -> <16x128xbf16> loc(#loc7)
      %estimate:4 = scf.for %e = %c0_i32 to %c80_i32 step %c16_i32 iter_args(%arg31 = %cst_6) -> (tensor<16>)  : i32 {
        %wait = ttg.async_wait %block_170 {num = 2 : i32} loc(#loc7)
        %if = scf.if %condition -> (tensor<16>) {
          %other = ttg.async_wait %line_171 {num = 1 : i32} loc(#loc8)
        }
        %next = ttg.async_copy_global_to_local %block_202, %block_143 mask %m : tensor<16> -> <16x128xbf16> loc(#loc7)
        scf.yield %next : tensor<16> loc(#loc9)
      } loc(#loc9)
      %drained = ttg.async_wait {num = 0 : i32} loc(#loc9)
    } loc(#loc9)
#loc5 = loc("/somewhere/kernels/append_score.py":157:27)
#loc6 = loc(callsite(#loc5 at #loc))
#loc7 = loc("block"(#loc6))
#loc8 = loc("/somewhere/kernels/append_score.py":150:27)
#loc9 = loc("/somewhere/kernels/append_score.py":149:27)
"""
    pointers = {("append_score.py", 157): "bounds", ("append_score.py", 150): "listed"}
    # The list is in a buffer, but nothing copies it in a loop.
    assert pipeline(ttgir.replace("ttg", dialect), pointers) == ({"bounds": 3}, {"bounds": 1})
