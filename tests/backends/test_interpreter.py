"""The mended interpreter of Triton: what the tests of the kernels rest on. Needs TRITON_INTERPRET=1, as they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from op_cases import INTERPRETED, moved

if not INTERPRETED:
    pytest.skip("not in Triton's interpreter: TRITON_INTERPRET is not 1", allow_module_level=True)

import interpreter
import triton
import triton.language as tl

pytestmark = pytest.mark.implementations


@triton.jit
def _convert(source, target, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


@triton.jit
def _add(source, target, ROWS: tl.constexpr, CHUNK: tl.constexpr, AXIS: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    total = tl.sum(tl.load(source + place), axis=AXIS)
    tl.store(target + tl.arange(0, total.shape[0]), total)


@triton.jit
def _reach(source, target, first_read, first_written, N: tl.constexpr):
    place = tl.arange(0, N)
    value = tl.load(source + first_read + place)
    tl.store(target + first_written + place, value)


@triton.jit
def _last_wins(target):
    tl.store(target, tl.program_id(0) * 10 + tl.program_id(1))


def _special() -> torch.Tensor:
    """fp32 numbers where rounding may go wrong, of both signs: ties, carries, overflow, subnormals, infinity, NaN."""
    bits = [
        0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x00018000, 0x007FFFFF, 0x00800000, 0x3F800000,
        0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F817FFF, 0x3F818000, 0x3F818001, 0x3FFFFFFF, 0x7F7F7FFF, 0x7F7F8000,
        0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF,
    ]  # fmt: skip
    found = torch.tensor([*bits, *(b | 0x80000000 for b in bits)]).to(torch.int64)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32).view(torch.float32)


def _numbers() -> torch.Tensor:
    """2**17 fp32 bit patterns: those of :func:`_special`, and random ones, half of them ties."""
    bits = torch.randint(-(2**31), 2**31, (2**17,), dtype=torch.int64).to(torch.int32)
    bits[::2] = bits[::2] & ~0xFFFF | 0x8000
    values = bits.view(torch.float32)
    special = _special()
    values[: len(special)] = special
    return values


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, but for those within a NaN."""
    number = ~expected.isnan()
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    return torch.equal(found.isnan(), ~number) and torch.equal(found[number].view(bits), expected[number].view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_is_torchs(dtype: torch.dtype) -> None:
    """Which is to the nearest number, ties to even, as on a GPU."""
    values = _numbers()
    found = torch.empty_like(values, dtype=dtype)
    _convert[(1,)](values, found, N=len(values))
    assert _same(found, values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_number_is_widened_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    found = torch.empty_like(values, dtype=torch.float32)
    _convert[(1,)](values, found, N=len(values))
    assert _same(found, values.float())


def test_conversions_of_numpy_arrays() -> None:
    """Of any layout, and of none."""
    values = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2] + np.float32(1 / 3)
    expected = torch.from_numpy(values.copy()).bfloat16()
    found = interpreter.to_bfloat16(values)
    assert (found.shape, found.dtype) == ((4, 3), np.uint16)
    assert np.array_equal(found.view(np.int16), expected.view(torch.int16).numpy())
    assert np.array_equal(interpreter.from_bfloat16(found), expected.float().numpy())
    assert interpreter.to_bfloat16(np.float32(1.0)) == 0x3F80
    assert interpreter.from_bfloat16(np.uint16(0x3F80)) == 1.0


def test_sums_are_trees() -> None:
    """Ones behind a number at whose size a one is an eighth of a step: one after another, all would be lost."""
    values = torch.ones(2**10, 2)
    values[0] = 2.0**26
    found = torch.empty(2)
    _add[(1,)](values, found, *values.shape, AXIS=0)
    assert bool((found.double() - values.double().sum(0)).abs().max() <= 8)


def test_sums_of_rows_and_columns() -> None:
    values = torch.randint(-9, 9, (8, 32)).float()
    for axis in (0, 1):
        found = torch.empty(values.shape[1 - axis])
        _add[(1,)](values, found, *values.shape, AXIS=axis)
        assert torch.equal(found, values.sum(axis))


@pytest.mark.parametrize(
    ("read", "written", "verb"),
    [(0, 0, None), (2, 2, None), (3, 0, "reads"), (-1, 0, "reads"), (0, 3, "writes"), (0, -1, "writes")],
)
def test_accesses_outside_of_the_tensors_are_errors(read: int, written: int, verb: str | None) -> None:
    """To the element, though both lie within the same allocation as other numbers."""
    storage = torch.zeros(64)
    source, target = storage[8:18], storage[32:42]
    arguments: tuple[Any, ...] = (source, target, read, written, 8)
    if verb is None:
        _reach[(1,)](*arguments)
    else:
        with pytest.raises(triton.runtime.errors.InterpreterError, match=f"the kernel {verb} outside of its tensors"):
            _reach[(1,)](*arguments)


def test_programs_backwards() -> None:
    found = torch.empty(1, dtype=torch.int32)
    _last_wins[(3, 2)](found)
    assert int(found) == 21
    with interpreter.programs_backwards():
        _last_wins[(3, 2)](found)
    assert int(found) == 0


def test_mending_again_changes_nothing() -> None:
    before = interpreter.interpreter.InterpreterBuilder.cast_impl
    interpreter.mend()
    assert interpreter.interpreter.InterpreterBuilder.cast_impl is before


def test_moved_tensors_lie_as_they_lay() -> None:
    """What carries the tests' tensors to a GPU keeps strides, place and surroundings, and gradients come back."""
    whole = torch.arange(24.0).view(4, 6)
    for t in (whole[:, 1:5], whole[1:, ::2], whole.t(), whole[0].expand(5, 6)):
        there = moved(t, "meta")
        assert (there.shape, there.stride(), there.storage_offset()) == (t.shape, t.stride(), t.storage_offset())
        assert there.untyped_storage().nbytes() == whole.untyped_storage().nbytes()
    assert moved(whole, "cpu") is whole
    assert moved(2, "meta") == 2
    leaf = torch.ones(3, requires_grad=True)
    assert moved(leaf, "meta").requires_grad
