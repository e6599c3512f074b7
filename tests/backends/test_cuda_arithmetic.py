"""csrc/cuda/arithmetic.h, compiled by the host: within the roundings that it may make of the fp64 formulas."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build_tools import ROOT, build
from torch import Tensor

from red_kernels.backends import reference
from red_kernels.backends.arguments import Norm, Statistics

COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
if COMPILER is None:
    pytest.skip("no C++ compiler here: neither g++, c++ nor clang++ is on PATH", allow_module_level=True)

U = 2.0**-24  # half a rounding step of fp32: the error of one operation, for each of its result
SLACK = 1.001  # for products of roundings
SOURCE = """
#include "csrc/cuda/arithmetic.h"
using namespace red::cuda;
extern "C" {
void words(int64_t seed, int64_t row, uint32_t quad, uint32_t* to) {
  const Words found = philox(seed, row, quad);
  for (int i = 0; i < 4; ++i) to[i] = found.w[i];
}
float kept(uint32_t word, uint32_t threshold, float factor) { return dropped(word, threshold, factor); }
void row_moments(float first, float lost, float squares, float d, float* to) {
  const Moments found = moments(first, lost, squares, d);
  to[0] = found.mean, to[1] = found.variance;
}
float root(float v) { return reciprocal_root(v); }
float times(float a, float b) { return product(a, b); }
float fused(float a, float b, float c) { return multiply_add(a, b, c); }
float line(float n, float w, float b) { return affine(n, w, b); }
float gradient(float n, float g, float r, float c1, float c2) { return norm_gradient(n, g, r, c1, c2); }
void backward(const float* dy, const float* z, const float* w, float mean, float rstd, int centered, int d, float* to) {
  float c[2] = {0.0f, 0.0f};
  for (int i = 0; i < d; ++i) {
    const float g = product(dy[i], w[i]);
    c[0] += (z[i] - mean) * rstd * g;
    c[1] += g;
  }
  for (int i = 0; i < d; ++i)
    to[i] = norm_gradient((z[i] - mean) * rstd, product(dy[i], w[i]), rstd, c[0] / d, centered ? c[1] / d : 0.0f);
}
}
"""


@pytest.fixture(scope="module", params=["plain", "own instructions"])
def arithmetic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Without multiply-adds, and with those that the compiler makes where this processor has them."""
    folder: Path = tmp_path_factory.mktemp("arithmetic")
    (folder / "arithmetic.cpp").write_text(SOURCE)
    flags = build._own_instructions() if request.param == "own instructions" else []
    command = [COMPILER, "-std=c++17", "-O2", *flags, "-shared", "-fPIC", f"-I{ROOT}", "-o", "arithmetic.so"]
    done = subprocess.run([*command, "arithmetic.cpp"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dll = ctypes.CDLL(str(folder / "arithmetic.so"))
    f, u = ctypes.c_float, ctypes.c_uint32
    for name, types in {
        "root": [f],
        "times": [f, f],
        "fused": [f] * 3,
        "line": [f] * 3,
        "gradient": [f] * 5,
        "kept": [u, u, f],
    }.items():
        getattr(dll, name).argtypes, getattr(dll, name).restype = types, f
    dll.words.argtypes = [ctypes.c_int64, ctypes.c_int64, u, ctypes.POINTER(u)]
    dll.row_moments.argtypes = [f] * 4 + [ctypes.POINTER(f)]
    return dll


def _apply(function: Callable[..., float], *values: Tensor) -> Tensor:
    return torch.tensor(
        [function(*row) for row in zip(*(v.tolist() for v in values), strict=True)], dtype=torch.float64
    )


def _words(arithmetic: ctypes.CDLL, seed: int, row: int, quad: int) -> list[int]:
    found = (ctypes.c_uint32 * 4)()
    arithmetic.words(seed, row, quad, found)
    return list(found)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, -(2**31) - 5, 2**62 + 12345, -(2**63), 2**63 - 1])
def test_philox(arithmetic: ctypes.CDLL, seed: int) -> None:
    """The reference's words, of rows beyond 2**32 and of negative seeds too."""
    drawn = torch.tensor(seed)
    expected = reference.philox_words(drawn, 5, 22)
    for row in range(5):
        found = [word for quad in range(6) for word in _words(arithmetic, seed, row, quad)]
        assert found[:22] == expected[row].tolist()
    for row in (2**31, 2**32 - 1, 2**32, 2**33 + 7, 2**45 + 3):
        for quad in (0, 5, 2**31, 2**32 - 1):
            counter = [torch.tensor(v) for v in (quad, row & 0xFFFFFFFF, row >> 32, 0)]
            assert _words(arithmetic, seed, row, quad) == [int(w) for w in reference.philox_rounds(counter, drawn)]


def test_philox_has_the_authors_words(arithmetic: ctypes.CDLL) -> None:
    assert _words(arithmetic, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropped(arithmetic: ctypes.CDLL) -> None:
    cases = {(0, 0): 1.5, (0, 1): 0.0, (1, 1): 1.5, (2**31, 2**31 + 1): 0.0, (2**32 - 1, 2**32 - 1): 1.5, (5, 9): 0.0}
    assert {case: arithmetic.kept(*case, 1.5) for case in cases} == cases


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0, -30000.0])
@pytest.mark.parametrize("away", [0.0, 0.01, 0.7])
def test_moments(arithmetic: ctypes.CDLL, mean: float, away: float) -> None:
    """From sums about a number that is nearly the mean: two roundings of the correction and one of the mean."""
    for d in (1, 2, 96, 1000):
        values = (torch.randn(d) + mean).double()
        first = (values.mean() + away).float().double()
        lost, squares = ((values - first).sum().float(), (values - first).square().sum().float())
        found = (ctypes.c_float * 2)()
        arithmetic.row_moments(float(first), float(lost), float(squares), float(d), found)
        exact, variance = values.mean(), values.var(correction=0)
        shift = (exact - first).abs()
        assert abs(found[0] - exact) <= U * SLACK * (2 * shift + exact.abs())
        # of the squares their rounding and the quotient's; of the shift 2, squared, and the product; the difference
        assert abs(found[1] - variance) <= U * SLACK * (2 * squares.double() / d + 5 * shift**2 + variance) + 1e-30


def test_reciprocal_root(arithmetic: ctypes.CDLL) -> None:
    v = torch.cat([torch.rand(500) * 4, 2.0 ** torch.randint(-120, 120, (500,)), torch.tensor([1e-5, 1.0, 4.0])])
    exact = v.double().rsqrt()
    assert bool(((_apply(arithmetic.root, v) - exact).abs() <= U * SLACK * exact).all())


def test_products_are_rounded_by_themselves(arithmetic: ctypes.CDLL) -> None:
    a, b = torch.randn(500), torch.randn(500)
    assert torch.equal(_apply(arithmetic.times, a, b), (a * b).double())


def test_multiply_add_rounds_once(arithmetic: ctypes.CDLL) -> None:
    a, b, c = torch.randn(3, 500)
    exact = a.double() * b.double() + c.double()  # the product is exact in fp64, the sum nearly
    assert torch.equal(_apply(arithmetic.fused, a, b, c), exact.float().double())


def test_affine(arithmetic: ctypes.CDLL) -> None:
    n, w, b = torch.randn(3, 500)
    exact = n.double() * w + b
    bound = U * SLACK * ((n.double() * w).abs() + exact.abs()) + U * U
    assert bool(((_apply(arithmetic.line, n, w, b) - exact).abs() <= bound).all())


def _gradient_bound(n: Tensor, g: Tensor, rstd: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """A rounding of the product, of each difference, and of the result."""
    between = g - n * c1
    return rstd.abs() * U * SLACK * ((n * c1).abs() + between.abs() + 2 * (between - c2).abs()) + U * U


def test_norm_gradient(arithmetic: ctypes.CDLL) -> None:
    values = torch.randn(5, 500)
    n, g, rstd, c1, c2 = values.double()
    exact = rstd * (g - n * c1 - c2)
    error = (_apply(arithmetic.gradient, *values) - exact).abs()
    assert bool((error <= _gradient_bound(n, g, rstd, c1, c2) * SLACK).all())


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("d", [1, 3, 64, 500])
def test_backward_of_a_row(arithmetic: ctypes.CDLL, d: int, centered: bool) -> None:
    dy, z, w = torch.randn(3, d)
    mean, rstd = (z.mean() if centered else torch.zeros(())), 1 / (z.square().mean() + 1e-5).sqrt()
    found = torch.empty(d)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (dy, z, w)]
    scalars = [ctypes.c_float(float(mean)), ctypes.c_float(float(rstd)), ctypes.c_int(centered), ctypes.c_int(d)]
    arithmetic.backward(*pointers, *scalars, ctypes.c_void_p(found.data_ptr()))
    dy64, z64, w64, mean64, rstd64 = (t.double() for t in (dy, z, w, mean, rstd))
    statistics = Statistics(mean64[None] if centered else None, rstd64[None])
    norm = Norm(w64, None, 0.0, 0.0, centered)
    exact, _, _ = reference._norm_backward(dy64[None], z64[None], norm, statistics, False, False)
    n, g = (z64 - mean64) * rstd64, dy64 * w64
    c1, c2 = (n * g).mean(), g.mean() * centered
    # A term of the first sum has 4 roundings, of the second 1; the sums d - 1, the quotients 1; n has 2, and g 1.
    of_c1, of_c2 = (d + 4) * (n * g).abs().mean(), (d + 1) * g.abs().mean() * centered
    through = rstd64 * U * (g.abs() + 2 * (n * c1).abs() + n.abs() * of_c1 + of_c2)
    assert bool(((found.double() - exact[0]).abs() <= SLACK * (through + _gradient_bound(n, g, rstd64, c1, c2))).all())
