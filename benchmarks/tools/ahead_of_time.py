"""Every Triton kernel compiled for real GPUs, without one: registers, spills, shared memory and widths of accesses.

    python -m benchmarks.tools.ahead_of_time             the kernels of a patched model, on every target
    python -m benchmarks.tools.ahead_of_time --markdown  the table of red_kernels/backends/triton/README.md
    python -m benchmarks.tools.ahead_of_time --all       whatever the operations can ask for (an hour and more)

What is compiled is what the operations launch on that GPU, with the tiles of :mod:`red_kernels.backends.triton.rules`:
launches are recorded on tensors without memory. As in :mod:`red_kernels.backends.triton.launch`, addresses are
multiples of 16 bytes and numbers are not specialised. Exits with 1 if a kernel spills or has a narrow access.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from red_kernels.backends.arguments import PAIR, Dropout, Mix, Norm, Statistics, affine_edit
from red_kernels.backends.triton import launch, linear, mixing, operations
from red_kernels.backends.triton.rules import Architecture
from red_kernels.support.progress import Stage

from .machine_code import Access, Conversions, Resources, accesses, conversions, resources

WIDTHS = (768, 2048, 4096, 8192, 16384)
OPERATIONS = ("edit", "edit_add", "edit_add_rms_norm", "edit_add_layer_norm", "rms_norm_edit", "layer_norm_edit")
MIXES = ("mix", "mix_add", "mix_add_rms_norm", "mix_add_layer_norm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = 4  # no kernel but linear_edit is compiled for a number of rows
EDITS = 3

# What the pointers of the kernels are: activations; vectors of one width; lines of sums; one number for each row.
ACTIVATIONS = ("x", "residual", "z", "y", "dy", "dz", "dx", "dresidual")
VECTORS = ("scale", "first", "second", "bias", "weight", "norm_bias", "linear_bias")
SUMMED = ("first_in", "second_in", "third_in", "fourth_in")
SUMS = (
    *("dscale", "dfirst", "dsecond", "dbias", "dweight", "dnorm_bias"),
    *("first_out", "second_out", "third_out", "fourth_out"),
)
PER_ROW = ("ids", "order", "owners", "offsets", "seed", "mean", "rstd", "averages", "along")


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; ``offsets`` is 32 where Triton knows that all offsets fit in as many bits."""

    gpu: GPUTarget
    architecture: Architecture
    offsets: int = 64


# Triton compiles for AMD by the size of the tensors: those up to 2 GiB are read and written in another way.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Architecture("sm_80", 32, 108)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), Architecture("sm_90", 32, 132)),
    "sm_100": Target(GPUTarget("cuda", 100, 32), Architecture("sm_100", 32, 148)),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Architecture("gfx942", 64, 304), 32),
}
LARGE_TENSORS = {"gfx942 over 2 GiB": replace(TARGETS["gfx942"], offsets=64)}
_TARGETS = TARGETS | LARGE_TENSORS


@dataclass(frozen=True)
class Case:
    """One operation as a model runs it, forward and backward; ``linear_edit`` forward."""

    operation: str
    width: int
    dtype: str = "bf16"
    vectors: str = "fp32"  # dtype of scale and bias
    norms: str | None = None  # dtype of the norm's weight and bias; None for that of the activations
    kind: str = "all"  # 'all', 'scaling' or 'bias': which edit vectors there are
    dropout: bool = False
    edit_ids: bool = False
    keep_z: bool = True
    train_norm: bool = False  # whether the norm's weight and bias ask for gradients
    blocks: int = 0  # of a mix
    single: bool = False  # whether reflections have no second vector
    rows: int = ROWS

    @property
    def layer_norm(self) -> bool:
        return "layer_norm" in self.operation


@dataclass(frozen=True)
class Program:
    """A kernel with all that it is compiled for."""

    kernel: str
    types: tuple[str | None, ...]  # Triton's, of the tensors; None for those absent
    constants: tuple[Any, ...]
    warps: int
    stages: int | None
    target: str

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in _KERNELS[self.kernel].function.params)

    @property
    def tensors(self) -> dict[str, str]:
        """The types of the tensors that there are, by name."""
        return {n: t for n, t in zip(self.parameters, self.types, strict=False) if t is not None}

    @property
    def numbers(self) -> tuple[str, ...]:
        return self.parameters[len(self.types) : len(self.parameters) - len(self.constants)]

    @property
    def constant(self) -> dict[str, Any]:
        """The constants by name."""
        return dict(zip(self.parameters[-len(self.constants) :], self.constants, strict=True))

    @property
    def threads(self) -> int:
        return self.warps * _TARGETS[self.target].architecture.warp

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constant.items())
        tensors = ", ".join(f"{name}: {kind[1:]}" for name, kind in self.tensors.items())
        return f"{self.target} {self.kernel}({tensors}; {constants}; {self.warps} warps)"


@dataclass(frozen=True)
class Report:
    """What became of a program."""

    program: Program
    resources: Resources
    accesses: tuple[Access, ...]
    conversions: Conversions
    seconds: float = field(compare=False)

    @property
    def resident(self) -> int:
        """How many programs fit on a multiprocessor at once, by registers and warps."""
        registers = -(-self.resources.registers // 8) * 8
        if _TARGETS[self.program.target].gpu.backend == "cuda":
            return min(65536 // (registers * self.program.threads), 64 // self.program.warps)
        return min(8, 512 // registers) * 4 // self.program.warps

    def problems(self) -> list[str]:
        """Spills, and accesses of fewer bytes at once than there could be; see :func:`least_bytes`."""
        found = [f"{self.resources.spills} bytes spilled"] if self.resources.spills else []
        for access in self.accesses:
            least = max(least_bytes(self.program, name, access) for name in access.arguments)
            if access.bytes < least:
                verb = "writes" if access.store else "reads"
                found.append(
                    f"{verb} {access.bytes} bytes of {' or '.join(access.arguments)} at once, expected {least}"
                )
        return list(dict.fromkeys(found))


def least_bytes(program: Program, name: str, access: Access) -> int:
    """How many bytes of a tensor a thread has to read or write at once: 16, but for

    - vectors of another dtype than the activations, of which as many elements are read as of those;
    - lines of sums behind a program's loop, which all of its threads read or write once, as wide as they come out;
    - the numbers of which a row has one;
    - a matrix product: where a thread has fewer elements of a block; for its result on AMD, 8 bytes, as it leaves the
      matrix cores; and vectors, which are read once for a block of rows.
    """
    tensors = program.tensors
    itemsize = _BYTES[next(iter(tensors.values()))]
    together = 16 // itemsize  # elements
    if program.kernel == "linear_edit":
        if name == "linear_bias" or (name in ("scale", "bias") and "ids" not in tensors):
            return 0
        block = program.constant
        sizes = {"x": block["BLOCK_M"] * block["BLOCK_K"], "weight": block["BLOCK_N"] * block["BLOCK_K"]}
        elements = sizes.get(name, block["BLOCK_M"] * block["BLOCK_N"] >> block["SPLITS"])
        together = max(1, min(together, elements // program.threads))
        if name == "z" and _TARGETS[program.target].gpu.backend == "hip":
            together = min(together, 4)
    if name in PER_ROW or (name in (*SUMMED, *SUMS) and not access.in_loop):
        return 0
    if name in VECTORS:
        return min(16, together * _BYTES[tensors[name]])
    if name in (*ACTIVATIONS, *SUMMED, *SUMS):
        return together * itemsize if name in ACTIVATIONS else 16
    raise ValueError(f"{program.kernel} has a tensor {name!r}, but no rule for its accesses")


def programs(case: Case, target: str) -> list[Program]:
    """What an operation launches on a target, forward and backward."""
    found: list[Program] = []

    def record(
        kernel: launch.Kernel,
        grid: launch.Grid,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        warps: int,
        stages: int | None,
    ) -> None:
        types = tuple(None if t is None else _TYPES[t.dtype] for t in tensors)
        found.append(Program(kernel.name, types, constants, warps, stages, target))

    with launch.pretending(_TARGETS[target].architecture), launch.recording(record):
        _run(case)
    return list(dict.fromkeys(found))


def programs_of(cases: Iterable[Case], targets: Iterable[str] = tuple(TARGETS)) -> list[Program]:
    """What some operations launch on some targets, each program once."""
    cases = list(cases)
    return list(dict.fromkeys(p for target in targets for case in cases for p in programs(case, target)))


def compiled(program: Program, *, alignment: int = 16, **options: Any) -> Any:
    """Triton's compiled kernel, as :class:`red_kernels.backends.triton.launch.Kernel` would have it made."""
    target = _TARGETS[program.target]
    kernel = _KERNELS[program.kernel]
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.function.params):
        name = parameter.name
        if name in program.tensors:
            signature[name] = program.tensors[name]
            known = [["tt.divisibility", alignment]] if alignment > 1 else []
            attributes[(place,)] = known + ([["tt.pointer_range", 32]] if target.offsets == 32 else [])
        elif name in program.numbers:
            signature[name] = parameter.annotation_type
        else:
            signature[name] = "constexpr"
            constants[(place,)] = program.constant.get(name)
    return triton.compile(
        ASTSource(kernel.function, signature, constants, attributes),
        target=target.gpu,
        options={**kernel.options(program.warps, program.stages, target.gpu.backend == "hip"), **options},
    )


def build(program: Program) -> Report:
    """Compile a program and read what became of it."""
    start = time.perf_counter()
    kernel = compiled(program)
    seconds = time.perf_counter() - start
    found = tuple(accesses(kernel, list(program.tensors)))
    return Report(program, resources(kernel), found, conversions(kernel), seconds)


@contextmanager
def compilers(processes: int | None = None, cache: str | None = None) -> Iterator[Executor]:
    """Processes to compile in, by default one for each core that this one may use, with Triton's cache in a folder."""
    count = processes or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_cache_in, initargs=(cache,)) as pool:
        yield pool


def _cache_in(folder: str | None) -> None:
    if folder is not None:
        os.environ["TRITON_CACHE_DIR"] = folder


def usual_cases(widths: Iterable[int] = WIDTHS) -> list[Case]:
    """Those of a patched model while it is trained: bf16, fp32 edit vectors, frozen norms."""
    return [Case(operation, width) for operation in OPERATIONS for width in widths]


def linear_cases(
    widths: Iterable[int] = WIDTHS, dtypes: Iterable[str] = ("bf16",), edit_ids: Iterable[bool] = (False,)
) -> list[Case]:
    """The linear layer with its edit, for a few rows and for many."""
    return [
        Case("linear_edit", width, dtype, edit_ids=ids, rows=rows)
        for width, dtype, ids, rows in itertools.product(widths, dtypes, edit_ids, (1, 16, 64, 512, 4096))
    ]


def mix_cases(
    widths: Iterable[int] = WIDTHS, blocks: Iterable[int] = (0, 4), operations: Iterable[str] = MIXES[1:]
) -> list[Case]:
    """Rotations and reflections in a model while it is trained, of the widths that have whole pairs and blocks."""
    choice = itertools.product(operations, widths, blocks)
    return [Case(name, width, blocks=count) for name, width, count in choice if width % (count or 2 * PAIR) == 0]


def all_cases(widths: Iterable[int] = WIDTHS, dtypes: Iterable[str] = tuple(DTYPES)) -> list[Case]:
    """Whatever the operations can be asked for."""
    found = []
    choice = (False, True)
    for operation, width, dtype, edit_ids in itertools.product(OPERATIONS, widths, dtypes, choice):
        norm, edit_first = "norm" in operation, operation.startswith("edit_add")
        plain = Case(operation, width, dtype, edit_ids=edit_ids)
        for dropout, keep_z, train_norm in itertools.product(
            choice if edit_first else (False,), choice if norm and edit_first else (True,), choice if norm else (False,)
        ):
            found.append(replace(plain, dropout=dropout, keep_z=keep_z, train_norm=train_norm))
        found += [replace(plain, kind=kind) for kind in ("scaling", "bias")]
        found.append(replace(plain, vectors="bf16" if dtype == "fp32" else dtype))
        if norm and dtype != "fp32":
            found += [replace(plain, norms="fp32", train_norm=train_norm) for train_norm in choice]
    for case, dtype, edit_ids in itertools.product(mix_cases(widths, operations=MIXES), dtypes, choice):
        plain = replace(case, dtype=dtype, edit_ids=edit_ids)
        found += [plain, replace(plain, dropout=True, train_norm=True)]
        found += [replace(plain, kind="scaling", single=single) for single in (False, bool(case.blocks))]
    return found + linear_cases(widths, dtypes, choice)


def _run(case: Case) -> None:
    """Forward and backward of an operation, with what :mod:`red_kernels.ops.passes` would hand on."""
    d, dtype = case.width, DTYPES[case.dtype]

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = tensor(case.rows, d)
    size = (EDITS, d) if case.edit_ids else (d,)
    scale = None if case.kind == "bias" else tensor(*size, dtype=DTYPES[case.vectors])
    bias = None if case.kind == "scaling" else tensor(*size, dtype=DTYPES[case.vectors])
    ids = tensor(case.rows, dtype=torch.int64) if case.edit_ids else None
    edits = EDITS if case.edit_ids else 1
    dropout = Dropout(0.1, tensor(1, dtype=torch.int64)) if case.dropout else None
    weight = tensor(d, dtype=DTYPES[case.norms or case.dtype])
    norm_bias = weight if case.layer_norm else None
    norm = Norm(weight, norm_bias, 1e-6, 0.0, case.layer_norm)
    rstd = tensor(case.rows, dtype=torch.float32)
    statistics = Statistics(rstd if case.layer_norm else None, rstd)
    edit, without_bias = affine_edit(scale, bias, ids, dropout), affine_edit(scale, None, ids, dropout)
    needs_edit = (scale is not None, bias is not None)
    needs_norm = (case.train_norm, case.train_norm and case.layer_norm)
    unchanged = scale is None and dropout is None  # then dx is dz

    if case.operation in MIXES:
        _run_mix(case, x, scale, bias, ids, dropout, norm, statistics, edits, needs_norm)
    elif case.operation == "linear_edit":
        linear.run(tensor(case.rows, 4 * d), tensor(d, 4 * d), tensor(d), x, edit)
    elif case.operation in ("edit", "edit_add"):
        operations.edit_forward(x, x if case.operation == "edit_add" else None, edit)
        needs = (not unchanged, *needs_edit)
        operations.edit_backward(x, x if scale is not None else None, without_bias, edits, needs)
    elif case.operation.startswith("edit_add"):
        operations.edit_norm_forward(x, x, edit, norm, case.keep_z)
        z, again = (x, None) if case.keep_z else (None, x)
        operations.edit_norm_backward(
            x, z, z, x if scale is not None else again, again, without_bias if case.keep_z else edit, norm, statistics,
            edits, (not unchanged, True, *needs_edit, *needs_norm),
        )  # fmt: skip
    else:
        operations.norm_edit_forward(x, norm, edit)
        operations.norm_edit_backward(
            x, x, norm if scale is not None else norm._replace(bias=None), without_bias, statistics, edits,
            (True, *needs_norm, *needs_edit),
        )  # fmt: skip


def _run_mix(
    case: Case,
    x: Tensor,
    vector: Tensor | None,
    bias: Tensor | None,
    ids: Tensor | None,
    dropout: Dropout | None,
    norm: Norm,
    statistics: Statistics,
    edits: int,
    needs_norm: tuple[bool, bool],
) -> None:
    assert vector is not None
    mix = Mix(vector, None if case.single else vector, bias, case.blocks, ids, dropout)
    without_bias, needs = mix._replace(bias=None), (True, not case.single, bias is not None)
    if "norm" not in case.operation:
        mixing.mix_forward(x, None if case.operation == "mix" else x, mix)
        mixing.mix_backward(x, x, without_bias, edits, (True, *needs))
        return
    mixing.mix_norm_forward(x, x, mix, norm)
    mixing.mix_norm_backward(x, x, x, x, without_bias, norm, statistics, edits, (True, True, *needs, *needs_norm))


def print_reports(reports: Sequence[Report], console: Console) -> None:
    table = Table(caption="fit: programs on a multiprocessor at once; narrow: accesses that could be wider")
    for name in ("target", "kernel", "d", "dtype", "with", "warps"):
        table.add_column(name, justify="right" if name in ("d", "warps") else "left")
    for name in ("registers", "spills", "scalar", "shared", "fit", "accesses", "conversions", "seconds"):
        table.add_column(name, justify="right")
    for r in sorted(reports, key=_order):
        found = r.resources
        widths = sorted({a.bytes for a in r.accesses if a.in_loop} or {a.bytes for a in r.accesses}, reverse=True)
        moved = r.conversions
        table.add_row(
            r.program.target,
            r.program.kernel,
            str(r.program.constant["D"]),
            next(iter(r.program.tensors.values()))[1:],
            _features(r.program),
            *map(str, (r.program.warps, found.registers, found.spills, found.scalar_spills, found.shared, r.resident)),
            "/".join(map(str, widths)),
            f"{moved.in_loops}+{moved.in_branches}+{moved.elsewhere}",
            f"{r.seconds:.1f}",
            style="red" if r.problems() else None,
        )
    console.print(table)
    for r in reports:
        for problem in r.problems():
            console.print(f"{r.program}: {problem}", style="red")


def markdown(reports: Sequence[Report]) -> str:
    """The table of red_kernels/backends/triton/README.md: registers / spills / shared memory in KiB, by target."""
    rows: dict[tuple[Any, ...], dict[str, Report]] = {}
    for r in sorted(reports, key=_order):
        program = r.program
        rows.setdefault((program.kernel, _features(program), program.constant["D"]), {})[program.target] = r
    lines = [f"| kernel | with | d | {' | '.join(TARGETS)} |", f"|---|---|--:|{'---|' * len(TARGETS)}"]
    for (kernel, features, width), found in rows.items():
        cells = (_cell(found.get(target)) for target in TARGETS)
        lines.append(f"| `{kernel}` | {features} | {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(report: Report | None) -> str:
    if report is None:
        return "–"
    return f"{report.resources.registers} / {report.resources.spills} / {report.resources.shared / 1024:.3g}"


def _order(report: Report) -> tuple[Any, ...]:
    program = report.program
    kernels, targets = list(_KERNELS), list(_TARGETS)
    return kernels.index(program.kernel), _features(program), program.constant["D"], targets.index(program.target)


def _features(program: Program) -> str:
    """What tells the programs of one kernel and width apart, in a few words."""
    names = set(program.tensors)
    found = []
    if program.kernel.startswith(("norm", "wide")):
        found = [
            "LayerNorm" if "mean" in names else "RMSNorm",
            *(["edit last"] if program.constant["EDIT_LAST"] else []),
        ]
    if program.kernel.startswith("mix"):
        blocks = program.constant["BLOCKS"]
        found.append(f"{blocks} blocks" if blocks else "rotation")
        if "rstd" in names:
            found.append("LayerNorm" if "mean" in names else "RMSNorm")
    for name, shown in (("residual", "residual"), ("seed", "dropout"), ("order", "edit_ids"), ("dweight", "dweight")):
        if name in names:
            found.append(shown)
    if program.kernel == "linear_edit":
        found.append(f"block {program.constant['BLOCK_M']}x{program.constant['BLOCK_N']}")
    return ", ".join(found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--targets", nargs="+", choices=_TARGETS, default=list(TARGETS))
    parser.add_argument("--all", action="store_true", help="all dtypes and options of the operations")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of red_kernels/backends/triton/README.md"
    )
    parser.add_argument("--processes", type=int, help="compiling processes (default: one for each core)")
    options = parser.parse_args(arguments)
    cases = (
        all_cases(options.widths)
        if options.all
        else [
            *usual_cases(options.widths),
            *linear_cases(options.widths),
            *mix_cases(options.widths),
        ]
    )
    wanted = programs_of(cases, options.targets)
    # an empty cache: the seconds are those of compiling
    with tempfile.TemporaryDirectory() as cache, compilers(options.processes, cache) as pool:
        console = Console(stderr=True)
        reports = []
        with Stage(console, "compiling", len(wanted), unit="program") as stage:
            for number, made in enumerate(pool.map(build, wanted), start=1):
                reports.append(made)
                stage.reached(number)
    if options.markdown:
        print(markdown(reports))
    else:
        print_reports(reports, Console(width=None if sys.stdout.isatty() else 200))
    if any(r.problems() for r in reports):
        raise SystemExit(1)


_KERNELS = {kernel.name: kernel for kernel in (*operations.KERNELS, *linear.KERNELS, *mixing.KERNELS)}
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
_BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2, "*i64": 8}


if __name__ == "__main__":
    main()
