"""LayerNorm of rows of equal values: no distance from the mean, so 0 before the weight, whatever value and width.

A plain sum of many equal values is off by more than they vary by, and may overflow; of that nothing must be seen.
"""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import EPS, Implementation, call

import red_kernels as rk

# Powers of two around the kernels' layouts, odd ones, and the widths that only the kernels for wide rows take.
WIDTHS = (1, 2, 3, 5, 64, 257, 769, 1000, 2048, 8200, 16386, 50000, 65536)
VALUES = {
    torch.float32: (-63969.0, 0.1, 1000.1, 1e-30, 1.2e-38, -3e10, 1e19, 1e38, -3.3e38),
    torch.bfloat16: (-63969.0, 0.1, 3.38e38, -1e30),
    torch.float16: (-63969.0, 0.1, 65504.0, 6e-8),
}
# Triton's interpreter takes 3 to 18 s for a case of these widths. What a value does there it does at any of them.
WIDE = {
    8200: ((torch.float32, -63969.0), (torch.float32, 1e38), (torch.bfloat16, 3.38e38), (torch.float16, 65504.0)),
    16386: ((torch.float32, 1000.1),),
    50000: ((torch.float32, -63969.0), (torch.float16, 6e-8)),
    65536: ((torch.bfloat16, 0.1),),
}
CASES = [
    pytest.param(
        width,
        dtype,
        value,
        marks=[pytest.mark.nightly] if (dtype, value) not in WIDE.get(width, ((dtype, value),)) else [],
        id=f"{width}-{str(dtype).removeprefix('torch.')}-{value}",
    )
    for width in WIDTHS
    for dtype, values in VALUES.items()
    for value in values
]


def expected_gradient(g: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``d x`` of a row that does not vary: ``(g * weight - mean(g * weight)) / sqrt(eps)``, in fp64."""
    weighted = g.double() * weight.double()
    return (weighted - weighted.mean(-1, keepdim=True)) / math.sqrt(eps)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """To the rounding of the result and of fp32 sums, as a part of the largest."""
    bound = (torch.finfo(dtype).eps + 1e-5) * expected.abs().max()
    assert torch.isfinite(found).all()
    assert (found.double() - expected).abs().max() <= bound


@pytest.mark.parametrize(("width", "dtype", "value"), CASES)
def test_layer_norm_of_equal_values(
    width: int, dtype: torch.dtype, value: float, implementation: Implementation
) -> None:
    rows = torch.full((2, width), value, dtype=dtype)
    weight, norm_bias, g = torch.randn(width), torch.randn(width), torch.randn(2, width).to(dtype)

    x = rows.clone().requires_grad_()
    y = call(rk.layer_norm_edit, x, weight, norm_bias, None, None, EPS)
    y.backward(g)
    assert torch.equal(y.detach(), norm_bias.to(dtype).expand(2, width))
    assert_close(x.grad, expected_gradient(g, weight, EPS), dtype)

    for need_z in (True, False):
        x = rows.clone().requires_grad_()
        y, _ = call(
            rk.edit_add_layer_norm, x, torch.zeros_like(rows), None, None, weight, norm_bias, EPS, need_z=need_z
        )
        y.backward(g)
        assert torch.equal(y.detach(), norm_bias.to(dtype).expand(2, width))
        assert_close(x.grad, expected_gradient(g, weight, EPS), dtype)


@pytest.mark.parametrize("width", [257, 50000])
def test_equal_values_that_an_edit_makes(width: int, implementation: Implementation) -> None:
    x, scale, bias = torch.randn(3, width), torch.zeros(width), torch.full((width,), -63969.0)
    weight, norm_bias = torch.randn(width), torch.randn(width)
    y, z = call(rk.edit_add_layer_norm, x, None, scale, bias, weight, norm_bias, EPS)
    assert torch.equal(z, bias.expand(3, width))
    assert torch.equal(y, norm_bias.expand(3, width))


@pytest.mark.parametrize("width", [7, 1000, 50000])
def test_a_row_of_equal_values_beside_others(width: int, implementation: Implementation) -> None:
    """What a row needs of care changes nothing in its neighbours."""
    x = torch.randn(5, width)
    alone = call(rk.layer_norm_edit, x, None, None, None, None, EPS)
    mixed = x.clone()
    mixed[1::2] = 12345.678
    y = call(rk.layer_norm_edit, mixed, None, None, None, None, EPS)
    assert torch.equal(y[::2], alone[::2])
    assert torch.equal(y[1::2], torch.zeros(2, width))


@pytest.mark.parametrize("width", [64, 1000, 8200, 50000])
@pytest.mark.parametrize("outlier", [1e3, -6e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_first_values_far_from_the_others(
    width: int, outlier: float, dtype: torch.dtype, implementation: Implementation
) -> None:
    """The first values of a row are no measure for the others: nothing of these is lost beside them."""
    x = torch.randn(4, width)
    x[::2] += 1e4
    x[:2, 0] = outlier
    x[2:, :16] = outlier
    x = x.to(dtype)
    y = call(rk.layer_norm_edit, x, None, None, None, None, EPS)
    exact = torch.nn.functional.layer_norm(x.double(), (width,), eps=EPS)
    # The mean is kept in fp32: half a unit in its last place, as a part of the deviation. What sums of the fewest lanes
    # (16 in the base set) are rounded by is a part of the result.
    mean, rstd = x.double().mean(-1, keepdim=True), 1.0 / x.double().std(-1, correction=0, keepdim=True)
    rounding = 2.0**-24 * (8 + width / 16) * (exact.abs() + exact.abs().mean(-1, keepdim=True))
    bound = 2.0**-23 * mean.abs() * rstd + rounding
    if dtype != torch.float32:
        bound += torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("width", [3, 64, 4096])
@pytest.mark.parametrize("value", [0.0, 5.0, math.nan, math.inf])
def test_without_eps_and_without_numbers_as_torch(width: int, value: float, implementation: Implementation) -> None:
    """With ``eps = 0`` a row that does not vary, and of zeros for RMSNorm, has no norm: NaN, as torch has it."""
    x = torch.full((2, width), value)
    x[1] = torch.randn(width)
    eps = 0.0 if math.isfinite(value) else EPS
    for ours, theirs in (
        (
            call(rk.layer_norm_edit, x, None, None, None, None, eps),
            torch.nn.functional.layer_norm(x, (width,), eps=eps),
        ),
        (call(rk.rms_norm_edit, x, None, None, None, eps), torch.nn.functional.rms_norm(x, (width,), eps=eps)),
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)
