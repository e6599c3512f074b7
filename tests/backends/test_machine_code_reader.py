"""The reader of machine code, machine_code.py: loops, spills and scalar work are found, and nothing else is."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import machine_code
import pytest
from machine_code import Loop, functions

# A loop over rows with a loop over columns inside; the row's own spills are not those of the inner loop.
AARCH64 = """\
0000000000000000 <void red::neon::rows<float>(long)>:
   0:\tstp\tx29, x30, [sp, #-32]!
   4:\tmov\tx29, sp
   8:\tldr\tx1, [sp, #16]
   c:\tldr\tq0, [x0], #16
  10:\t{}
  14:\tfmla\tv1.4s, v0.4s, v2.4s
  18:\tprfm\tpldl1keep, [sp, #8]
  1c:\tmov\tw2, #0x1                   \t// #1
  20:\tcmp\tx0, x1
  24:\tb.ne\tc <void red::neon::rows<float>(long)+0xc>  // b.any
  28:\tstr\tq1, [sp, #16]
  2c:\tfcvt\td0, s0
  30:\tbl\t0 <memcpy>
\t\t\t30: R_AARCH64_CALL26\tmemcpy
  34:\tcbnz\tx3, 8 <void red::neon::rows<float>(long)+0x8>
  38:\tb\t0 <void red::neon::rows<float>(long)>
\t\t\t38: R_AARCH64_JUMP26\tfree
"""
X86_64 = """\
0000000000000000 <red::avx2::rows()>:
   0:\tpush   %rbp
   1:\tmov    %rsp,%rbp
   4:\tmov    0x8(%rsp),%rax
   9:\tvmovups (%rax),%ymm0
   d:\t{}
  13:\tvfmadd213ps (%rdi),%ymm1,%ymm0
  18:\tnopw   0x0(%rsp)
  1e:\tvmovups 0x0(%rip),%ymm2        # 26 <red::avx2::rows()+0x26>
\t\t\t22: R_X86_64_PC32\t.LC0-0x4
  26:\tcs nopw 0x0(%rax,%rax,1)
  2c:\tjne    9 <red::avx2::rows()+0x9>
  2e:\tvmovaps %ymm0,0x20(%rsp)
  34:\tvcvtss2sd %xmm0,%xmm0,%xmm0
  38:\tcall   3d <red::avx2::rows()+0x3d>
\t\t\t39: R_X86_64_PLT32\tmemcpy-0x4
  3d:\tja     4 <red::avx2::rows()+0x4>
  3f:\tjmp    44 <red::avx2::rows()+0x44>
\t\t\t40: R_X86_64_PLT32\tfree-0x4
"""
TEXTS = {"aarch64": (AARCH64, "add\tx0, x0, #0x10"), "x86_64": (X86_64, "add    $0x20,%rax")}


def loop(architecture: str, instruction: str) -> Loop:
    """The inner loop, with an instruction in it."""
    (function,) = functions(TEXTS[architecture][0].format(instruction), architecture)
    (found,) = function.loops()
    return found


def said(found: Loop) -> dict[str, list[str]]:
    kinds = ("vector_spills", "general_spills", "scalar_conversions", "single_elements", "calls")
    return {kind: what for kind in kinds if (what := getattr(found, kind)())}


@pytest.mark.parametrize("architecture", TEXTS)
def test_a_good_loop(architecture: str) -> None:
    found = loop(architecture, TEXTS[architecture][1])
    first, last = {"aarch64": (0xC, 0x24), "x86_64": (0x9, 0x2C)}[architecture]
    assert (found.instructions[0].address, found.instructions[-1].address) == (first, last)
    assert found.computes()
    assert said(found) == {}


@pytest.mark.parametrize(
    ("architecture", "instruction", "kinds"),
    [
        ("aarch64", "str\tq8, [sp, #64]", {"vector_spills"}),
        ("aarch64", "ldp\td8, d9, [sp, #64]", {"vector_spills"}),
        ("aarch64", "ldr\tq8, [x29, #64]", {"vector_spills"}),
        ("aarch64", "ldr\tx8, [sp, #64]", {"general_spills"}),
        ("aarch64", "fcvt\ts0, h0", {"scalar_conversions", "single_elements"}),
        ("aarch64", "bfcvt\th0, s0", {"scalar_conversions", "single_elements"}),
        ("aarch64", "ucvtf\ts0, w1", {"scalar_conversions", "single_elements"}),
        ("aarch64", "fmul\ts0, s1, s2", {"single_elements"}),
        ("aarch64", "umov\tw1, v0.h[1]", {"single_elements"}),
        ("aarch64", "mov\tv0.h[1], w1", {"single_elements"}),
        ("aarch64", "fmov\td0, x1", {"single_elements"}),
        ("aarch64", "ldrh\tw1, [x0]", {"single_elements"}),
        ("aarch64", "st1\t{v0.h}[1], [x0]", {"single_elements"}),
        ("aarch64", "bl\t1000 <expf>", {"calls"}),
        ("aarch64", "fcvtl\tv0.4s, v0.4h", set()),
        ("aarch64", "bfcvtn2\tv0.8h, v1.4s", set()),
        ("aarch64", "mov\tv0.16b, v1.16b", set()),
        ("aarch64", "fmul\tv0.4s, v1.4s, v2.s[0]", set()),
        ("aarch64", "dup\tv0.4s, v1.s[0]", set()),
        ("aarch64", "stnp\tq0, q1, [x1]", set()),
        ("x86_64", "vmovaps %ymm8,0x40(%rsp)", {"vector_spills"}),
        ("x86_64", "vmulps 0x40(%rsp),%ymm1,%ymm0", {"vector_spills"}),
        ("x86_64", "vmovaps -0x40(%rbp),%ymm8", {"vector_spills"}),
        ("x86_64", "mov    0x40(%rsp),%rax", {"general_spills"}),
        ("x86_64", "push   %rax", {"general_spills"}),
        ("x86_64", "vcvtss2sd %xmm0,%xmm0,%xmm0", {"scalar_conversions", "single_elements"}),
        ("x86_64", "cvtsi2ss %eax,%xmm0", {"scalar_conversions", "single_elements"}),
        ("x86_64", "vmulss %xmm0,%xmm1,%xmm0", {"single_elements"}),
        ("x86_64", "vpextrw $0x1,%xmm0,(%rax)", {"single_elements"}),
        ("x86_64", "vpinsrw $0x1,(%rax),%xmm0,%xmm0", {"single_elements"}),
        ("x86_64", "movzwl (%rax),%edx", {"single_elements"}),
        ("x86_64", "mov    %ax,(%rdx)", {"single_elements"}),
        ("x86_64", "mov    %r8w,(%rdx)", {"single_elements"}),
        ("x86_64", "call   1000 <__extendhfsf2>", {"calls"}),
        ("x86_64", "vcvtph2ps (%rax),%ymm0", set()),
        ("x86_64", "vcvtneps2bf16 %zmm0,%ymm0", set()),
        ("x86_64", "vbroadcastss (%rax),%ymm0", set()),
        ("x86_64", "vpextrq $0x1,%xmm0,(%rax)", {"single_elements"}),
        ("x86_64", "mov    %rax,(%rdx)", set()),
        ("x86_64", "prefetchw 0x40(%rsp)", set()),
    ],
)
def test_what_is_in_a_loop(architecture: str, instruction: str, kinds: set[str]) -> None:
    assert said(loop(architecture, instruction)).keys() == kinds


def test_an_address_is_no_register() -> None:
    text = AARCH64.format("ldr\tx8, [sp, #64]").replace("  10:", " d10:")
    assert said(functions(text, "aarch64")[0].loops()[0]) == {"general_spills": ["d10: ldr x8, [sp, #64]"]}


def test_a_frame_pointer_is_one_only_where_it_is_made() -> None:
    text = X86_64.format("mov    0x40(%rbp),%rax").replace("mov    %rsp,%rbp", "mov    %rdi,%rbp")
    assert said(functions(text, "x86_64")[0].loops()[0]) == {}
    text = AARCH64.format("ldr\tx8, [x29, #64]").replace("mov\tx29, sp", "mov\tx29, x1")
    assert said(functions(text, "aarch64")[0].loops()[0]) == {}


def test_a_small_array_on_the_stack_makes_no_row_loop() -> None:
    text = X86_64.format("vmovups %ymm0,0x40(%rsp)").replace("(%rax),%ymm0", "(%rsp),%ymm0")
    assert functions(text, "x86_64")[0].loops()[0].computes()
    assert not functions(text.replace("(%rdi),%ymm1", "(%rsp),%ymm1"), "x86_64")[0].loops()[0].computes()
    text = AARCH64.format("str\tq0, [sp, #64]")
    assert functions(text, "aarch64")[0].loops()[0].computes()
    assert not functions(text.replace("[x0], #16", "[sp, x0]"), "aarch64")[0].loops()[0].computes()


def test_a_part_of_a_loop_that_lies_elsewhere() -> None:
    """A compiler moves rare parts behind the end of a function."""
    text = AARCH64.format("cbz\tx7, 3c <void red::neon::rows<float>(long)+0x3c>")
    text += "  3c:\tstr\tq7, [sp, #64]\n  40:\tb\t14 <void red::neon::rows<float>(long)+0x14>\n"
    (found,) = functions(text, "aarch64")[0].loops()
    assert found.vector_spills() == ["3c: str q7, [sp, #64]"]
    assert len(found.instructions) == 9


def test_what_fills_up_to_the_next_line_enters_no_loop() -> None:
    text = """\
0000000000000000 <red::avx2::rows()>:
   0:\txor    %eax,%eax
   2:\tjmp    10 <red::avx2::rows()+0x10>
   4:\tnopw   0x0(%rsp)
   a:\tvaddps (%rdi),%ymm1,%ymm0
  10:\tvmulps (%rdi),%ymm1,%ymm0
  16:\tjne    a <red::avx2::rows()+0xa>
  18:\tjl     10 <red::avx2::rows()+0x10>
  1a:\tvmovaps %ymm0,0x20(%rsp)
  20:\tjne    0 <red::avx2::rows()>
  22:\tret
"""
    (found,) = functions(text, "x86_64")[0].loops()
    assert [instruction.address for instruction in found.instructions] == [0xA, 0x10, 0x16, 0x18]


def test_loops_side_by_side() -> None:
    again = (
        "  3c:\tfadd\tv0.4s, v0.4s, v1.4s\n  40:\tcbz\tx7, 3c <void red::neon::rows<float>(long)+0x3c>\n  44:\tret\n"
    )
    text = AARCH64.format("cbz\tx7, 3c <void red::neon::rows<float>(long)+0x3c>") + again
    both = functions(text, "aarch64")[0].loops()
    assert [(found.instructions[0].address, found.instructions[-1].address) for found in both] == [
        (0xC, 0x24),
        (0x3C, 0x40),
    ]


@pytest.mark.parametrize(
    ("architecture", "old", "new", "reason"),
    [
        ("aarch64", "bl\t0 <memcpy>", "br\tx3", "a jump to an address that is not in its text"),
        ("aarch64", "b.ne\tc <", "b.ne\td <", "into the middle of an instruction"),
        ("aarch64", "b.ne\tc <void red::neon::rows<float>(long)+0xc>", "b.ne\tx3", "a jump of .* not understood"),
        ("aarch64", "0000000000000000 <void red::neon::rows<float>(long)>:", "", "an instruction of no function"),
        ("aarch64", "cmp\tx0, x1", ".inst\t0x0000f00f ; undefined", "objdump does not know"),
        ("x86_64", "vmovaps %ymm0,0x20(%rsp)", "jmp    *%rax", "a jump to an address that is not in its text"),
        ("x86_64", "vmovaps %ymm0,0x20(%rsp)", "notrack jmp *%rax", "a jump to an address that is not in its text"),
        ("x86_64", "nopw   0x0(%rsp)", "(bad)", "objdump does not know"),
    ],
)
def test_machine_code_that_is_not_understood(architecture: str, old: str, new: str, reason: str) -> None:
    text = TEXTS[architecture][0].format(TEXTS[architecture][1])
    assert text.count(old) == 1
    with pytest.raises(ValueError, match=reason):
        [function.loops() for function in functions(text.replace(old, new), architecture)]


def test_an_empty_text() -> None:
    with pytest.raises(ValueError, match="no function"):
        functions("file format elf64-littleaarch64\n", "aarch64")


SQUEEZED = """
typedef float V __attribute__((vector_size(16)));
#define EACH _Pragma("GCC unroll 48") for (int k = 0; k < 48; ++k)
void red_rows(V* __restrict__ x, long n) {
  V held[48];
  EACH held[k] = x[k];
  for (long i = 0; i < n; i += 48) EACH held[k] = held[k] * x[i + k] + x[i];
  EACH x[k] = held[k];
}
float red_sum(const float* x, long n) {
  double sum = 0;
  for (long i = 0; i < n; ++i) sum += x[i];
  return sum;
}
"""


@pytest.mark.parametrize(
    ("architecture", "compilers"),
    [
        ("x86_64", ("gcc", "x86_64-linux-gnu-gcc")),
        ("aarch64", ("aarch64-linux-gnu-gcc", "gcc")),
    ],
)
def test_what_a_compiler_spills_is_found(architecture: str, compilers: tuple[str, ...], tmp_path: Path) -> None:
    own = platform.machine() == architecture
    names = [name for name in compilers if (own or name != "gcc") and shutil.which(name)]
    if not names or machine_code.find_objdump(architecture) is None:
        pytest.skip(f"no compiler for {architecture}")
    (tmp_path / "squeezed.c").write_text(SQUEEZED)
    command = [names[0], "-O3", "-c", "-o", str(tmp_path / "squeezed.o"), str(tmp_path / "squeezed.c")]
    subprocess.run(command, check=True)
    found = {f.name: f for f in machine_code.disassembled(tmp_path / "squeezed.o", architecture)}
    assert len(machine_code.faults([found["red_rows"]], Loop.vector_spills)) >= 30
    assert not any(one.vector_spills() for one in found["red_sum"].loops())
    assert any(one.single_elements() for one in found["red_sum"].loops())
