"""The rules that start `linear_edit` as one Triton kernel: tiles, grids, TF32, and what it compiles to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import DTYPES, HALVES, INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.tools import ahead_of_time
from red_kernels.backends.arguments import affine_edit
from red_kernels.backends.triton import launch, linear, rules, tuned
from red_kernels.backends.triton.rules import Architecture

ARCHITECTURES = [
    Architecture("sm_80", 32, 108), Architecture("sm_90", 32, 132), Architecture("sm_100", 32, 148),
    Architecture("gfx942", 64, 304), Architecture("sm_89", 32, 128), Architecture("sm_75", 32, 40),
    Architecture("gfx1100", 32, 96),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    yield
    tuned.forget()


class _precision:
    """torch's setting for products of fp32 matrices on a GPU, in a ``with`` block."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = self.value

    def __exit__(self, *error: object) -> None:
        torch.backends.cuda.matmul.fp32_precision = self.before


def test_tf32_is_a_dtype_of_its_own_for_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(tuned, "linear_wins", lambda dtype, *rest: bool(asked.append(dtype)))
    chip = Architecture("sm_90", 32, 132)
    for precision in ("tf32", "ieee"):
        with _precision(precision):
            for dtype in DTYPES:
                linear.wins(chip, 32, 72, 48, dtype)
    assert asked == ["tf32", "bfloat16", "float16", "float32", "bfloat16", "float16"]


def _recorded(chip: Architecture, m: int, d: int, k: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What would be launched on a device: kernel, grid, tensors, numbers, constants, warps, stages."""
    found: list[tuple[Any, ...]] = []
    x, weight = torch.empty(m, k, dtype=dtype, device="meta"), torch.empty(d, k, dtype=dtype, device="meta")
    with launch.pretending(chip), launch.recording(lambda *launched: found.append(launched)):
        linear.run(x, weight, None, None, affine_edit())
    (launched,) = found
    return launched


@pytest.mark.parametrize("chip", ARCHITECTURES, ids=lambda chip: chip.name)
def test_tf32_as_torch_is_set(chip: Architecture) -> None:
    """By any of torch's names for it; AMD's is experimental, and left out."""
    before = torch.get_float32_matmul_precision()
    try:
        for set_it, allowed in (
            (lambda: torch.set_float32_matmul_precision("high"), True),
            (lambda: torch.set_float32_matmul_precision("highest"), False),
            (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True),
            (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False), False),
            (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True),
            (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), False),
        ):
            set_it()
            for dtype in DTYPES:
                constants = _recorded(chip, 9, 40, 24, dtype)[4]
                tf32 = allowed and dtype == torch.float32 and not chip.name.startswith("gfx")
                assert constants[-1] == ("tf32" if tf32 else "ieee")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("chip", ARCHITECTURES, ids=lambda chip: chip.name)
def test_tiles(chip: Architecture) -> None:
    """Every tile is one that a table may have, fits into shared memory, and reads ahead."""
    sizes = [2**n for n in range(14)]
    shared = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "sm_89": 99, "sm_75": 64, "gfx1100": 64}
    for rows, (itemsize, precision) in itertools.product(sizes, ((2, "ieee"), (4, "ieee"), (4, "tf32"))):
        for width, depth in ((1, 1), (7, 100), (768, 3072), (4096, 14336), (8192, 28672), (16384, 7)):
            tile = rules.linear(rows, width, depth, itemsize, precision, chip)
            key = {"rows": rows, "width": width, "depth": depth, "itemsize": itemsize, "precision": precision}
            assert tuned.tile_error(tuned.RULES["linear"], tile, key, chip.warp) is None
            # AMD's first stage is in registers
            held = tile.stages - chip.name.startswith("gfx")
            assert held * (tile.block_m + tile.block_n) * tile.block_k * itemsize <= shared[chip.name] * 1024
            assert tile.stages >= (2 if chip.name.startswith("gfx") else 3)


@pytest.mark.parametrize("chip", ARCHITECTURES, ids=lambda chip: chip.name)
def test_launches(chip: Architecture) -> None:
    """A grid of at most the multiprocessors, and one kernel for all rows that a table's entry stands for."""
    for dtype, (d, k) in itertools.product(DTYPES, ((768, 3072), (4096, 11008), (129, 33))):
        kernels = {}
        for m in (1, 2, 3, 5, 8, 17, 31, 32, 33, 1000, 1024, 5000, 8192, 8193, 10**6):
            _, grid, _, numbers, constants, *rest = _recorded(chip, m, d, k, dtype)
            blocks = -(-m // constants[2]) * -(-d // constants[3])
            assert grid == (min(blocks, chip.multiprocessors), 1, 1)
            assert numbers == (m, 1)
            found = kernels.setdefault(tuned.bucket(m), (constants, rest))
            assert found == (constants, rest)
        assert len(set(map(str, kernels.values()))) <= 8


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: Triton does not compile")
@pytest.mark.parametrize(
    ("target", "rows", "instruction"),
    [
        ("sm_80", 4096, "mma.sync"), ("sm_90", 4096, "wgmma.mma_async"), ("sm_100", 4096, "tcgen05.mma"),
        ("gfx942", 4096, "v_mfma"), ("sm_90", 1, "mma.sync"), ("sm_100", 1, "mma.sync"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [*HALVES, "tf32"], ids=str)
def test_tensor_cores(target: str, rows: int, instruction: str, dtype: torch.dtype | str) -> None:
    """And operands that are on their way while others are multiplied."""
    with _precision("tf32" if dtype == "tf32" else "ieee"):
        names = {"tf32": "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        case = ahead_of_time.Case("linear_edit", 4096, names[dtype], rows=rows)
        (program,) = ahead_of_time.programs(case, target)
    assembly = ahead_of_time.compiled(program).asm
    if target == "gfx942":
        assert instruction in assembly["amdgcn"]
    else:
        assert instruction in assembly["ptx"]
        assert assembly["ptx"].count("cp.async.wait_group") > 1
        assert ("tf32" in assembly["ptx"]) == (dtype == "tf32")
        # 16 bytes at once, and no operand that is not copied so
        assert "cp.async.ca" not in assembly["ptx"]
