"""The arithmetic that Triton's kernels write out: to the last bit. In the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from op_cases import INTERPRETED, TRITON

if not TRITON:
    pytest.skip("no Triton backend here: neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

import numpy as np
import triton
import triton.language as tl

from red_kernels.backends.triton.kernels.device import over_width

pytestmark = pytest.mark.implementations

DEVICE = "cpu" if INTERPRETED else "cuda"
WIDTHS = (1, 2, 3, 7, 384, 768, 769, 1000, 1760, 3584, 4096, 5120, 11008, 65535, 262143, 2**21 - 1)
LEAST = torch.finfo(torch.float32).tiny  # the least normal number
STEP = 2.0**-149  # between those below it


@triton.jit
def _over_width(source, target, D: tl.constexpr, N: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(target + place, over_width(tl.load(source + place), D))


@triton.jit
def _multiply_add(source, target, N: tl.constexpr):
    place = tl.arange(0, N)
    a, b, c = tl.load(source + place), tl.load(source + N + place), tl.load(source + 2 * N + place)
    tl.store(target + place, tl.fma(a, b, c))


def _numbers(width: int) -> np.ndarray:
    """2**18 fp32 numbers: of any bits, some in the middle of the range, and some with a quotient close to a tie."""
    random = np.random.default_rng(width)
    bits = random.integers(0, 2**32, 2**17, dtype=np.uint32).view(np.float32)
    usual = random.standard_normal(2**16).astype(np.float32) * np.float32(width)
    ties = (random.integers(2**23, 2**24, 2**16) + 0.5) * width * 2.0 ** random.integers(-60, 60, 2**16)
    found = np.concatenate([bits, usual, ties.astype(np.float32)])
    found[:8] = (0.0, -0.0, np.inf, -np.inf, np.nan, 3.4028234663852886e38, 1e-45, -1.1754944e-38)
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_a_sum_over_a_width_is_rounded_to_nearest(width: int) -> None:
    """As IEEE has it, infinities and NaN too; but a zero may lose its sign, and ties below the normal numbers may go up
    or down."""
    values = _numbers(width)
    found = torch.empty(len(values), device=DEVICE)
    _over_width[(2,)](torch.from_numpy(values).to(DEVICE), found, D=width, N=len(values) // 2)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(values / np.float32(width))
    number = ~expected.isnan()
    assert torch.equal(found.cpu().isnan(), ~number)
    given, wanted = found.cpu()[number], expected[number]
    normal = (wanted.abs() >= LEAST) | (wanted == 0.0)
    assert torch.equal(given[normal], wanted[normal])
    assert float((given[~normal].double() - wanted[~normal].double()).abs().max()) <= STEP


def test_multiply_add_rounds_once() -> None:
    """Which the arithmetic rests on: what a product loses is there, and nothing is lost of a sum."""
    a = torch.tensor([1.0 + 2.0**-23, 3.0, 2.0**127, 1.0 + 2.0**-12])
    b = torch.tensor([1.0 - 2.0**-23, 1.0 / 3.0, 2.0, 1.0 + 2.0**-12])
    c = torch.tensor([-1.0, -1.0, -(2.0**127), -1.0])
    found = torch.empty(4, device=DEVICE)
    _multiply_add[(1,)](torch.cat([a, b, c]).to(DEVICE), found, N=4)
    assert torch.equal(found.cpu(), (a.double() * b.double() + c.double()).float())
