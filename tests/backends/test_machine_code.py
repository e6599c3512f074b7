"""What the compiler made of the CPU kernels for x86-64: in a loop over a row no vector leaves the registers,
and nothing is converted one by one. The same for AArch64: test_aarch64.py.
"""

import functools
import platform
import re
import sys

import machine_code
import pytest
from machine_code import Function, Loop
from places import ROOT

sys.path.insert(0, str(ROOT / "csrc"))
import build

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="these instruction sets are of x86-64"),
    pytest.mark.skipif(machine_code.find_objdump("x86_64") is None, reason="needs objdump, of binutils"),
]
SETS = list(build.X86_SETS)
# Without the processor's conversion of fp16 it takes about twenty instructions with a dozen constants.
EMULATED = re.compile(r"base::\w+<red::Float16")
# Reflections have up to four dots, and as many factors, beside the constants of a conversion.
REFLECTIONS = re.compile(r"mix_\w+_rows<[^(]*, [12]>")


@functools.cache
def row_functions(name: str) -> list[Function]:
    """The kernels of a set, out of the last build's objects."""
    found = []
    count = 24 if name.endswith("_bf16") else 72  # of one type of three
    for file in (f"{name}.o", f"mix_{name}.o"):
        path = build.OBJECTS / "cpu" / file
        if not path.is_file():
            pytest.skip(f"{path} is not there: the library was built elsewhere; python csrc/build.py cpu makes it")
        of_file = [one for one in machine_code.disassembled(path, "x86_64") if "_rows<" in one.name]
        assert len(of_file) == count, f"{path} has {len(of_file)} functions of rows"
        found += of_file
    return found


def stored(loop: Loop) -> list[str]:
    """Vectors that a loop puts aside; what it only reads there could as well be a constant in memory."""
    return [text for text in loop.vector_spills() if re.search(r"mm\d+,[^,]*\(%r[sb]p\)$", text)]


@pytest.mark.parametrize("name", SETS)
def test_no_vector_is_put_aside(name: str) -> None:
    functions = [one for one in row_functions(name) if not EMULATED.search(one.name)]
    found = machine_code.faults(functions, stored)
    if name == "base":  # with trained norms beside the edit: their sums, and three operations where FMA has two
        found = [text for text in found if "norm_edit_backward_rows<float, true" not in text]
        found = [text for text in found if not REFLECTIONS.search(text)]
        loops = [loop for one in functions if REFLECTIONS.search(one.name) for loop in one.loops() if loop.computes()]
        assert max(len(stored(loop)) for loop in loops) <= 2
    assert found == []


@pytest.mark.parametrize("name", SETS)
def test_little_is_read_back(name: str) -> None:
    """Loops that need more constants than there are registers read them: one in sixteen instructions at most, and in
    those of reflections one in eight."""
    functions = [one for one in row_functions(name) if not EMULATED.search(one.name)]
    loops = [(loop, REFLECTIONS.search(one.name)) for one in functions for loop in one.loops() if loop.computes()]
    assert len(loops) > (30 if name.endswith("_bf16") else 100)
    assert [
        len(loop.vector_spills())
        for loop, reflects in loops
        if len(loop.vector_spills()) * (8 if reflects else 16) > len(loop.instructions)
    ] == []


def test_emulated_halves_put_little_aside() -> None:
    functions = [one for one in row_functions("base") if EMULATED.search(one.name)]
    loops = [(loop, REFLECTIONS.search(one.name)) for one in functions for loop in one.loops() if loop.computes()]
    assert len(loops) > 30
    assert max(len(stored(loop)) / len(loop.instructions) for loop, reflects in loops if not reflects) < 1 / 20
    assert max(len(stored(loop)) / len(loop.instructions) for loop, reflects in loops if reflects) < 1 / 10


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("what", ["scalar_conversions", "calls"])
def test_nothing_is_done_one_by_one(name: str, what: str) -> None:
    assert machine_code.faults(row_functions(name), lambda loop: getattr(loop, what)()) == []


@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16"])
def test_no_single_element_is_touched(name: str) -> None:
    assert machine_code.faults(row_functions(name), Loop.single_elements) == []


def test_halves_are_packed_together() -> None:
    """AVX2 rounds sixteen numbers at once, as halves, and orders them by a shuffle and an exchange of lanes, as a load
    has."""
    forward = next(f for f in row_functions("avx2") if "edit_forward_rows<red::BFloat16, false>" in f.name)
    loops = [loop for loop in forward.loops() if loop.computes()]
    names = ("vpsubsw", "vpshufb", "vpermq")
    counts = [[sum(i.operation == one for i in loop.instructions) for one in names] for loop in loops]
    assert [1, 1, 2] in counts  # x
    assert [1, 1, 3] in counts  # x and residual
    assert all(rounded == shuffled < exchanged for rounded, shuffled, exchanged in counts if exchanged)
