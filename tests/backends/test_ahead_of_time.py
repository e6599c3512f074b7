"""Every Triton kernel compiled for GPUs that are not here: no spills, accesses of 16 bytes, no conversions in loops.

Every target and every width at least once; with RED_KERNELS_TEST_ALL=1 (`make test-nightly`) each with each, and
whatever the operations can be asked for. Those named `oldest` are also run with the oldest Triton that is supported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from old_releases import TRITON
from op_cases import INTERPRETED, TEST_ALL

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.tools import ahead_of_time, machine_code
from benchmarks.tools.ahead_of_time import (
    DTYPES,
    LARGE_TENSORS,
    MIXES,
    OPERATIONS,
    TARGETS,
    WIDTHS,
    Case,
    Program,
    Report,
)
from red_kernels.backends.triton import launch, linear, mixing, operations

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: Triton does not compile")

NORM = Case("edit_add_layer_norm", 768)
OLDEST = (("sm_90", 768), ("sm_80", 4096), ("sm_100", 16384), ("gfx942", 8192))
NARROW = {"sm_90": ("x", "residual", "z", "y", "dy", "dz", "dx", "dresidual"), "gfx942": ("x", "y", "dy", "dx")}


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ahead_of_time.compilers() as found:
        yield found


def options(width: int, dtype: str) -> list[Case]:
    """Everything that a kernel has code for, once by itself and once with all else."""
    cases = [replace(NORM, width=width, dtype=dtype), Case("layer_norm_edit", width, dtype)]
    layer, last = cases
    rms, edit = replace(layer, operation="edit_add_rms_norm"), replace(layer, operation="edit_add")
    return [
        *cases,
        *(replace(layer, dropout=True, **more) for more in ({}, {"edit_ids": True}, {"train_norm": True})),
        *(replace(layer, keep_z=False, **more) for more in ({}, {"dropout": True}, {"edit_ids": True})),
        replace(layer, keep_z=False, dropout=True, edit_ids=True, train_norm=True),
        *(replace(rms, **{name: True}) for name in ("edit_ids", "train_norm")),
        replace(rms, kind="bias"),
        *(replace(last, **{name: True}) for name in ("edit_ids", "train_norm")),
        *(
            replace(edit, **more)
            for more in ({"dropout": True}, {"edit_ids": True}, {"dropout": True, "edit_ids": True})
        ),
    ]


def mixes(width: int, dtype: str = "bf16") -> list[Case]:
    """Rotations and reflections, plain and with all that there is."""
    cases = ahead_of_time.mix_cases((width,), operations=("mix_add", "mix_add_rms_norm"))
    layer = Case("mix_add_layer_norm", width, dropout=True, edit_ids=True, train_norm=True)
    return [replace(case, dtype=dtype) for case in (*cases, layer, replace(layer, blocks=4))]


WIDEST = 32768  # beyond the registers of a program, forward too
USUAL = [(target, width) for target in TARGETS for width in (*WIDTHS, WIDEST)]
FEW_USUAL = [*OLDEST, ("sm_90", WIDEST)]
OF_MIXES = [*itertools.product(TARGETS, (768, 4096, 8192)), ("sm_90", WIDEST)]
FEW_MIXES = [("sm_90", 4096)]
FEW_OPTIONS = [("gfx942", "bf16", 768)]
OPTIONS = [
    *FEW_OPTIONS,
    ("sm_90", "bf16", 8192),
    ("sm_90", "fp32", 768),
    ("sm_90", "fp32", 4096),
    ("sm_90", "bf16", 768),
    ("sm_90", "fp16", 2048),
]
EVERYTHING = list(itertools.product([*TARGETS, *LARGE_TENSORS], [*WIDTHS, WIDEST], DTYPES))


@pytest.mark.parametrize(
    ("target", "width"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}" + "-oldest" * (case in OLDEST))
        for case in (USUAL if TEST_ALL else FEW_USUAL)
    ],
)
def test_kernels_of_a_patched_model(pool: Executor, target: str, width: int) -> None:
    products = ahead_of_time.linear_cases((width,)) if width in WIDTHS else []
    reports = check(pool, [*ahead_of_time.usual_cases((width,)), *products], target)
    # AMD's scalar registers: those put aside lie in vector registers, not in memory. Other options have some.
    assert not [str(report.program) for report in reports if report.resources.scalar_spills]


@pytest.mark.parametrize(("target", "dtype", "width"), OPTIONS if TEST_ALL else FEW_OPTIONS)
def test_options(pool: Executor, target: str, dtype: str, width: int) -> None:
    if target == "gfx942" and TRITON < (3, 7):
        pytest.skip("Triton 3.6 converts layouts in loops of kernels with edit_ids on AMD's GPUs")
    check(pool, options(width, dtype), target)


@pytest.mark.parametrize(
    ("target", "width"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}" + "-oldest" * (case in FEW_MIXES))
        for case in (OF_MIXES if TEST_ALL else FEW_MIXES)
    ],
)
def test_mixes(pool: Executor, target: str, width: int) -> None:
    cases = mixes(width)
    if target == "gfx942" and TRITON < (3, 7):
        cases = [case for case in cases if not case.edit_ids]  # see test_options
    check(pool, [*cases, Case("mix_add_rms_norm", width, blocks=1, single=True)], target)


@pytest.mark.skipif(not TEST_ALL, reason="an hour; RED_KERNELS_TEST_ALL=1 runs it")
@pytest.mark.parametrize(("target", "width", "dtype"), EVERYTHING if TEST_ALL else EVERYTHING[:1])
def test_everything(pool: Executor, target: str, width: int, dtype: str) -> None:
    check(pool, ahead_of_time.all_cases((width,), (dtype,)), target)


def check(pool: Executor, cases: Iterable[Case], target: str) -> list[Report]:
    wanted = ahead_of_time.programs_of(cases, [target])
    assert wanted
    reports = list(pool.map(ahead_of_time.build, wanted))
    found = {str(report.program): wrong for report in reports if (wrong := faults(report))}
    assert not found, "\n".join(f"{program}: {'; '.join(wrong)}" for program, wrong in found.items())
    return reports


def faults(report: Report) -> list[str]:
    program, found = report.program, report.problems()
    activations, scale = next(iter(program.tensors.values())), program.tensors.get("scale", "*fp32")
    # The matrix product brings its result into rows. Half vectors beside fp32 activations come in pieces of their own.
    if report.conversions.in_loops and program.kernel != "linear_edit" and (activations != "*fp32" or scale == "*fp32"):
        found.append(f"{report.conversions.in_loops} layout conversions at every turn of a loop")
    return found


def test_every_kernel_is_compiled() -> None:
    cases = [case for _, dtype, width in OPTIONS for case in options(width, dtype)]
    compiled = {program.kernel for program in ahead_of_time.programs_of(cases, ["sm_90"])}
    usual = [*ahead_of_time.usual_cases((*WIDTHS, WIDEST)), *ahead_of_time.linear_cases()]
    usual += ahead_of_time.mix_cases((WIDEST,), (1,))
    for target in TARGETS:
        compiled |= {program.kernel for program in ahead_of_time.programs_of(usual, [target])}
    assert compiled == {kernel.name for kernel in (*operations.KERNELS, *linear.KERNELS, *mixing.KERNELS)}
    assert {case.operation for case in ahead_of_time.all_cases()} == {*OPERATIONS, *MIXES, "linear_edit"}


def test_nothing_depends_on_the_number_of_rows() -> None:
    """But the tile of the matrix product; what it is for one row and for many is compiled."""
    for case in [*options(768, "bf16"), *mixes(768)]:
        few, many = (ahead_of_time.programs_of([replace(case, rows=rows)]) for rows in (1, 100_000))
        assert few == many
    tiles = {p.constants for p in ahead_of_time.programs_of(ahead_of_time.linear_cases((4096,)), ["sm_90"])}
    assert len(tiles) > 2


def kernel_of(case: Case, target: str, name: str) -> Program:
    (found,) = (p for p in ahead_of_time.programs(case, target) if p.kernel == name)
    return found


@pytest.mark.parametrize("operation", ["edit_add_rms_norm", "edit_add_layer_norm", "layer_norm_edit"])
def test_programs_at_the_width_of_small_models(pool: Executor, operation: str) -> None:
    """No code of a division, whose calls take registers: 8 programs of the forward and 4 of the backward at once."""
    wanted = ahead_of_time.programs_of([Case(operation, 768)], ["sm_90"])
    reports = {report.program.kernel: report for report in pool.map(ahead_of_time.build, wanted)}
    assert not [str(r.program) for r in reports.values() if faults(r)]
    assert reports["norm_forward"].resident >= 8 or operation == "layer_norm_edit"
    assert reports["norm_backward"].resident >= 4


@pytest.mark.parametrize(
    ("target", "limit"), [("sm_80", {"maxnreg": 32}), ("sm_100", {"maxnreg": 32}), ("gfx942", {"waves_per_eu": 8})]
)
def test_spills_are_found(target: str, limit: dict[str, int]) -> None:
    program = kernel_of(NORM, target, "norm_backward")
    tight, plain = ahead_of_time.compiled(program, **limit), ahead_of_time.compiled(program)
    assert machine_code.resources(plain).spills == 0
    assert machine_code.resources(tight).spills > 100
    assert machine_code.resources(tight).registers <= 64 < machine_code.resources(plain).registers
    report = replace(ahead_of_time.build(program), resources=machine_code.resources(tight))
    assert report.problems()[0].endswith("bytes spilled")


@pytest.mark.parametrize("target", NARROW)
def test_narrow_accesses_are_found(target: str) -> None:
    """Of tensors at odd addresses, and of rows that do not begin at a multiple of 16 bytes."""
    for name in ("norm_forward", "norm_backward"):
        aligned = ahead_of_time.build(kernel_of(NORM, target, name))
        odd = ahead_of_time.build(kernel_of(replace(NORM, width=769), target, name))
        loose = ahead_of_time.compiled(aligned.program, alignment=2)
        accesses = tuple(machine_code.accesses(loose, list(aligned.program.tensors)))
        assert not aligned.problems()
        for report in (odd, replace(aligned, accesses=accesses)):
            told = "\n".join(report.problems())
            for tensor in set(NARROW[target]) & set(report.program.tensors):
                assert f" of {tensor} at once, expected 16" in told


def test_accesses_of_every_tensor_are_seen() -> None:
    sums = {"dscale", "dbias", "owners"}
    stored = {
        "norm_forward": {"y", "z", "mean", "rstd"},
        "norm_backward": {"dx", "dresidual", *sums},
        "wide_averages": {"averages"},
        "wide_backward": {"dx", "dresidual", *sums},
        "add_lines": {"first_out", "second_out"},
        "add_edits": {"first_out", "second_out"},
    }
    looping = {
        "norm_forward": ("x", {False}),
        "norm_backward": ("dy", {True}),
        "wide_backward": ("dy", {True}),
        "add_lines": ("first_in", {True}),
        "add_edits": ("first_in", {False, True}),
    }
    for target, case in itertools.product(("sm_90", "gfx942"), (NORM, replace(NORM, edit_ids=True, width=16384))):
        for program in ahead_of_time.programs(case, target):
            accesses = ahead_of_time.build(program).accesses
            seen = {(name, access.store) for access in accesses for name in access.arguments}
            idle = {"x", "scale", "ids"} if program.kernel == "wide_averages" else set()  # z need not be made again
            assert {name for name, _ in seen} == set(program.tensors) - idle
            assert {name for name, store in seen if store} == stored[program.kernel] & set(program.tensors)
            if program.kernel in looping:
                name, inside = looping[program.kernel]
                assert {access.in_loop for access in accesses if name in access.arguments} == inside


def test_text_that_is_not_understood_is_an_error() -> None:
    program = kernel_of(NORM, "sm_90", "norm_forward")
    kernel = ahead_of_time.compiled(program)
    names = list(program.tensors)
    ptx, llir = kernel.asm["ptx"], kernel.asm["llir"]

    def accesses(**texts: str) -> Any:
        return machine_code.accesses(SimpleNamespace(asm={"ptx": ptx, "llir": llir, **texts}), names)

    assert accesses()
    with pytest.raises(ValueError, match="other accesses than the LLVM IR"):
        accesses(ptx=ptx.replace("ld.global.v4.b32", "ld.global.v2.b32", 1))
    with pytest.raises(ValueError, match="other accesses than the LLVM IR"):
        accesses(ptx=ptx + "\n\tst.global.b32 [%rd1], %r1;\n")
    with pytest.raises(ValueError, match="not understood"):
        accesses(llir=llir.replace("ld.global.v4.b32", "ld.weak.v4.b32"))
    with pytest.raises(ValueError, match="expected 1"):
        accesses(llir="")
    with pytest.raises(ValueError, match="through none of the arguments"):
        machine_code.accesses(SimpleNamespace(asm={"ptx": ptx, "llir": llir}), names[1:2])


def test_conversions_are_counted() -> None:
    text = """
    %0 = ttg.convert_layout %a : tensor<4x256xf32, #b> -> tensor<4x256xf32, #c>
    %1 = scf.for %i = %x to %y step %z iter_args(%s = %0) -> (tensor<1xf32, #b>) : i64 {
      %2 = ttg.convert_layout %a : tensor<1x1xf32, #b> -> tensor<1x1xf32, #c>
      %3 = ttg.convert_layout %a : tensor<2xf32, #b> -> tensor<2xf32, #c>
      %4 = scf.if %p -> (tensor<4xf32, #b>) {
        %5 = ttg.convert_layout %a : tensor<4xf32, #b> -> tensor<4xf32, #c>
        scf.yield %5
      } else {
        %6 = ttg.convert_layout %a : tensor<4xf32, #b> -> tensor<4xf32, #c>
        scf.yield %6
      }
      %7 = "tt.reduce"(%a) <{axis = 1 : i32}> ({
      ^bb0(%b: f32, %c: f32):
        tt.reduce.return %b
      }) : (tensor<4x4xf32>) -> tensor<4xf32>
      %8 = ttg.convert_layout %a : tensor<4x2xf32, #b> -> tensor<4x2xf32, #c>
    }
    %9 = ttg.convert_layout %a : tensor<4xf32, #b> -> tensor<4xf32, #c>
    scf.if %p {
      %10 = ttg.convert_layout %a : tensor<4xf32, #b> -> tensor<4xf32, #c>
    }
    """
    found = machine_code.conversions(SimpleNamespace(asm={"ttgir": text}))
    assert found == machine_code.Conversions(in_loops=2, in_branches=2, elsewhere=3)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_triton_itself_would_compile_the_same(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On such a device, for tensors that are aligned, whatever the numbers."""
    # Its cache may have the same kernels from sources in another folder, and the text names the files.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Device(TARGETS[target].gpu), raising=False)
    dtypes = {kind: dtype for dtype, kind in ahead_of_time._TYPES.items()}
    for program in ahead_of_time.programs(replace(NORM, dropout=True, edit_ids=True), target):
        kernel = ahead_of_time._KERNELS[program.kernel]
        tensors = [None if kind is None else torch.empty(64, dtype=dtypes[kind]) for kind in program.types]
        assert all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
        kinds = [p.annotation_type for p in kernel.function.params if p.name in program.numbers]
        text = "ptx" if target.startswith("sm") else "amdgcn"
        expected = ahead_of_time.compiled(program).asm[text]
        for number in (1, 16):
            numbers = [number if kind == "i64" else float(number) for kind in kinds]
            settings = kernel.options(program.warps, program.stages, target.startswith("gfx"))
            found = kernel.function.warmup(*tensors, *numbers, *program.constants, grid=(1,), **settings)
            assert found.asm[text] == expected


class _Device:
    """A device that Triton compiles for, and that nothing runs on."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> str:
        return str(self.gpu)

    def get_current_stream(self, device: str) -> int:
        return 0


def test_large_tensors_on_amd_take_a_kernel_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled for offsets of 32 bits is not used for tensors of 2 GiB."""
    monkeypatch.setattr(launch, "_amd", True)
    monkeypatch.setattr(launch, "_current_device", launch._no_device)  # a torch for CUDA looks for a driver
    monkeypatch.setattr(launch, "_current_stream", launch._no_stream)
    launched: list[str] = []
    kept = SimpleNamespace(run=lambda *arguments: launched.append("kept"), function=None, packed_metadata=None)

    def by_triton(*arguments: Any, **settings: Any) -> Any:
        launched.append("Triton")
        assert "maxnreg" not in settings
        return kept

    kernel = launch.Kernel({(1, 1, 1): by_triton}, registers=128)
    small, large = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (2**31 - 1, 2**31))
    for t in (large, small, small, large[:8], small):
        kernel((1, 1, 1), (t,), (), (), 4)
    assert launched == ["Triton", "Triton", "kept", "Triton", "kept"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    ahead_of_time.main(["--widths", "64", "--targets", "sm_90", "gfx942", "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| kernel | with | d | sm_80 | sm_90 | sm_100 | gfx942 |"
    (row,) = (line for line in lines if line.startswith("| `norm_backward` | RMSNorm | 64 |"))
    cells = row.split(" | ")
    assert cells[3] == cells[5] == "–"
    assert all(cell.split(" / ")[1] == "0" for cell in (cells[4], cells[6].removesuffix(" |")))

    with pytest.raises(SystemExit, match="1"):
        ahead_of_time.main(["--widths", "7", "--targets", "sm_90"])
    told = capsys.readouterr().out
    assert "norm_forward" in told
    assert "reads 2 bytes of x at once, expected 16" in told.replace("\n", " ")
