"""Bad input to the operations: the error names the argument, what came and what was expected; NaN is never hidden."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import (
    ARGUMENTS,
    DTYPES,
    OPERATIONS,
    WITH_DROPOUT,
    WITH_WEIGHT_OFFSET,
    Implementation,
    arguments,
    call,
    eager,
    fused,
    leaves,
    outputs_of,
    run,
    upstream,
)
from torch import Tensor

import red_kernels as rk
from red_kernels.backends import cpu

ROWS, D = 6, 37
EVERY = [(operation, name) for operation in OPERATIONS for name in ARGUMENTS[operation]]
NOT_FLOATING = [
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def _refused(operation: str, error: type[Exception], message: str, changes: dict[str, Any], **options: Any) -> None:
    tensors = arguments(operation, (ROWS, D), edits=3 if "edit_ids" in options else None)
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        fused(operation, tensors | changes, **options)
    assert torch.equal(torch.get_rng_state(), before), "nothing was drawn before the check"


@pytest.mark.parametrize(("operation", "name"), EVERY)
def test_wrong_width(operation: str, name: str) -> None:
    for width in (D - 1, D + 1, 1):
        if name == "x":
            other = next(other for other in ARGUMENTS[operation] if other not in ("x", "residual"))
            expected = rf"\w+ has shape .*expected .*{width}"
            assert other
            _refused(operation, ValueError, expected, {"x": torch.randn(ROWS, width), "residual": None})
        elif name == "residual":
            message = rf"residual has shape \({ROWS}, {width}\), expected that of x, \({ROWS}, {D}\)"
            _refused(operation, ValueError, message, {name: torch.randn(ROWS, width)})
        else:
            message = rf"{name} has shape \({width},\), expected \({D},\), the width of x"
            _refused(operation, ValueError, message, {name: torch.randn(width)})


@pytest.mark.parametrize(("operation", "name"), EVERY)
@pytest.mark.parametrize("dtype", NOT_FLOATING, ids=str)
def test_wrong_dtype(operation: str, name: str, dtype: torch.dtype) -> None:
    shape = (ROWS, D) if name in ("x", "residual") else (D,)
    message = f"{name} has dtype {dtype}, expected float32, bfloat16, float16 or float64"
    _refused(operation, TypeError, message, {name: torch.zeros(shape).to(dtype)})


@pytest.mark.parametrize(("operation", "name"), EVERY)
def test_wrong_device(operation: str, name: str) -> None:
    shape = (ROWS, D) if name in ("x", "residual") else (D,)
    message = (
        r"\w+ is on cpu, expected the device of x, meta"
        if name == "x"
        else f"{name} is on meta, expected the device of x, cpu"
    )
    _refused(operation, ValueError, message, {name: torch.zeros(shape, device="meta")})


@pytest.mark.parametrize(("operation", "name"), EVERY)
@pytest.mark.parametrize("value", [1.0, [1.0] * D, "x"], ids=["float", "list", "str"])
def test_no_tensor(operation: str, name: str, value: object) -> None:
    message = f"{name} must be a tensor.*, got {type(value).__name__}"
    _refused(operation, TypeError, message, {name: value})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_x_is_required(operation: str) -> None:
    _refused(operation, TypeError, "x must be a tensor, got NoneType", {"x": None})


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(), (0,), (5, 0)], ids=str)
def test_x_without_width(operation: str, shape: tuple[int, ...]) -> None:
    message = rf"x has shape \({', '.join(map(str, shape))},?\), expected \(\.\.\., d\) with d >= 1"
    _refused(operation, ValueError, message, {"x": torch.zeros(shape), "residual": torch.zeros(shape)})


@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_residual_with_other_rows(operation: str) -> None:
    message = rf"residual has shape \(1, {D}\), expected that of x, \({ROWS}, {D}\)"
    _refused(operation, ValueError, message, {"residual": torch.zeros(1, D)})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_dropout_outside_its_range(operation: str, p: float, training: bool) -> None:
    message = f"dropout_p is {p}, expected a probability from 0 to 1"
    _refused(operation, ValueError, message, {}, dropout_p=p, training=training)


@pytest.mark.parametrize("eps", [-1e-9, -1.0, float("nan")])
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if "norm" in o])
def test_eps_out_of_range(operation: str, eps: float) -> None:
    _refused(operation, ValueError, f"eps is {eps}, expected 0 or more", {}, eps=eps)


NUMBERS = [(operation, "dropout_p") for operation in WITH_DROPOUT]
NUMBERS += [(operation, "eps") for operation in OPERATIONS if "norm" in operation]
NUMBERS += [(operation, "weight_offset") for operation in WITH_WEIGHT_OFFSET]


@pytest.mark.parametrize("value", ["0.1", None, [0.1], 1j, torch.tensor([0.1, 0.2])], ids=repr)
@pytest.mark.parametrize(("operation", "name"), NUMBERS)
def test_no_number(operation: str, name: str, value: object) -> None:
    message = rf"{name} must be a number, got {type(value).__name__}"
    _refused(operation, TypeError, message, {}, **{name: value})


@pytest.mark.parametrize(("operation", "name"), NUMBERS)
def test_numbers_of_any_kind(operation: str, name: str) -> None:
    """Integers, numpy's and fractions do as well as floats, compiled too."""
    tensors = arguments(operation, (ROWS, D))
    expected = outputs_of(fused(operation, tensors, **{name: 1.0}))
    for value in (1, True, np.float32(1), np.int64(1), Fraction(1)):
        assert all(map(torch.equal, outputs_of(fused(operation, tensors, **{name: value})), expected))
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    assert all(map(torch.equal, outputs_of(compiled(operation, tensors, **{name: 1})), expected))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0] * ROWS, TypeError, "edit_ids must be a tensor of integers, got list"),
        (torch.zeros(ROWS), TypeError, "edit_ids has dtype torch.float32, expected an integer dtype"),
        (torch.zeros(ROWS, dtype=torch.bool), TypeError, "edit_ids has dtype torch.bool, expected an integer dtype"),
        (torch.zeros(ROWS + 1).long(), ValueError, rf"edit_ids has shape \({ROWS + 1},\), expected \({ROWS},\)"),
        (torch.zeros(ROWS, 1).long(), ValueError, rf"edit_ids has shape \({ROWS}, 1\), expected \({ROWS},\)"),
        (torch.zeros(ROWS, device="meta").long(), ValueError, "edit_ids is on meta, expected the device of x, cpu"),
        (torch.full((ROWS,), 3), IndexError, "edit_ids has values from 3 to 3, expected 0 to 2"),
        (torch.arange(ROWS) - 1, IndexError, "edit_ids has values from -1 to 4, expected 0 to 2"),
    ],
    ids=["list", "float", "bool", "long", "wide", "device", "high", "low"],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bad_edit_ids(operation: str, ids: Any, error: type[Exception], message: str) -> None:
    _refused(operation, error, message, {}, edit_ids=ids)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_vectors_and_edit_ids_that_do_not_fit(operation: str) -> None:
    ids = torch.zeros(ROWS).long()
    both = {"scale": torch.ones(3, D), "bias": torch.ones(3, D)}
    for name in both:
        _refused(operation, ValueError, rf"{name} has shape \(3, {D}\), which needs edit_ids=", {name: both[name]})
        message = rf"{name} has shape \({D},\), expected \(n, {D}\) with n >= 1, because edit_ids is given"
        _refused(operation, ValueError, message, {name: torch.ones(D)}, edit_ids=ids)
        _refused(operation, ValueError, f"{name} has shape", {name: torch.ones(0, D)}, edit_ids=ids)
        _refused(operation, ValueError, f"{name} has shape", {name: torch.ones(3, D + 1)}, edit_ids=ids)
    message = rf"scale has shape \(3, {D}\) and bias \(2, {D}\), expected the same"
    _refused(operation, ValueError, message, {"bias": torch.ones(2, D)}, edit_ids=ids)
    _refused(operation, ValueError, "edit_ids was given, but neither", {"scale": None, "bias": None}, edit_ids=ids)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(5, 23)}, ValueError, r"weight has shape \(5, 23\), expected \(d, 24\), the width of x"),
        ({"weight": torch.ones(0, 24)}, ValueError, r"weight has shape \(0, 24\), expected \(d, 24\), .* with d >= 1"),
        ({"weight": torch.ones(24)}, ValueError, r"weight has shape \(24,\), expected \(d, 24\)"),
        ({"weight": torch.ones(5, 24).half()}, TypeError, "weight has dtype torch.float16, expected that of x"),
        ({"weight": torch.ones(5, 24).long()}, TypeError, "weight has dtype torch.int64"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": torch.ones(5, 24, device="meta")}, ValueError, "weight is on meta, expected the device of x, cpu"),
        ({"linear_bias": torch.ones(6)}, ValueError, r"linear_bias has shape \(6,\), expected \(5,\)"),
        ({"linear_bias": torch.ones(5).half()}, TypeError, "linear_bias has dtype torch.float16, expected that of x"),
        ({"scale": torch.ones(24)}, ValueError, r"scale has shape \(24,\), expected \(5,\)"),
        ({"residual": torch.ones(3, 24)}, ValueError, r"residual has shape \(3, 24\), expected .*\(3, 5\)"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x has shape \(3, 0\)"),
    ],
    ids=str,
)
def test_bad_input_to_linear_edit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": torch.ones(3, 24), "weight": torch.ones(5, 24), "linear_bias": torch.ones(5), "scale": torch.ones(5)}
    with pytest.raises(error, match=message):
        rk.linear_edit(**(given | {"bias": None, "residual": None} | changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "name"), EVERY)
def test_what_is_no_number_is_carried_through(
    operation: str, name: str, dtype: torch.dtype, value: float, implementation: Implementation
) -> None:
    """Wherever PyTorch's own operations give NaN or infinity, in results and gradients, so do these; nowhere else.

    Which of the two a gradient gets (infinity less infinity) is a matter of the order of its terms.
    """
    tensors, grads = arguments(operation, (ROWS, D), dtype), upstream((ROWS, D), dtype)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[D // 2] = value
    found, expected = run(fused, operation, tensors, grads), run(eager, operation, tensors, grads)
    for key, result in found.items():
        assert torch.equal(result.isfinite(), expected[key].isfinite()), key
        if not key.startswith("d "):
            assert torch.equal(result.isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_that_are_no_number(operation: str, value: float, implementation: Implementation) -> None:
    tensors, grads = arguments(operation, (ROWS, D)), upstream((ROWS, D), torch.float32)
    grads[0][1, D // 2] = value
    found, expected = run(fused, operation, tensors, grads), run(eager, operation, tensors, grads)
    for key, result in found.items():
        assert torch.equal(result.isfinite(), expected[key].isfinite()), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_is_infinity(dtype: torch.dtype, implementation: Implementation) -> None:
    x = torch.full((3, D), torch.finfo(dtype).max, dtype=dtype)
    assert torch.equal(call(rk.edit, x, torch.full((D,), -2.0)), torch.full_like(x, float("-inf")))


def _flushed(values: Tensor, dtype: torch.dtype, implementation: Implementation) -> Tensor:
    """The processor's own conversion to bf16 takes subnormal numbers for zeros."""
    if (dtype, implementation.variant) != (torch.bfloat16, "avx512_bf16"):
        return values
    return torch.where(values.abs() < torch.finfo(torch.bfloat16).smallest_normal, values * 0, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_numbers_and_signs_of_zero(dtype: torch.dtype, implementation: Implementation) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([[tiny / 2, -tiny / 4, tiny, 0.0, -0.0]], dtype=dtype).repeat(3, 7)
    y = call(rk.edit, x, torch.ones(35))
    assert torch.equal(y, _flushed(x, dtype, implementation))
    assert torch.equal(y.signbit(), x.signbit())


def test_every_half_number_comes_back(implementation: Implementation) -> None:
    """All 65,536 bit patterns of each half dtype through a kernel's conversions."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = patterns.view(dtype).view(16, -1)
        y = call(rk.edit, x, torch.ones(x.shape[1]))
        assert torch.equal(y.isnan(), x.isnan())
        number = ~x.isnan()
        expected = _flushed(x, dtype, implementation)
        assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_is_torchs(dtype: torch.dtype, implementation: Implementation) -> None:
    """Random fp32 bit patterns as residual-free products: every exponent, ties, overflow, subnormals."""
    bits = torch.randint(-(2**31), 2**31, (64, 1031), dtype=torch.int64).to(torch.int32)
    bits[::2] &= ~0x1FFF  # many ties
    bias = bits.view(torch.float32)
    x = torch.zeros(64, 1031, dtype=dtype)
    y = call(rk.edit, x, None, bias, edit_ids=torch.arange(64))
    expected = _flushed(bias, dtype, implementation).to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(y[number], expected[number])


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (0, 0, D)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_batches(operation: str, shape: tuple[int, ...], implementation: Implementation) -> None:
    """No rows: empty results, and gradients of vectors that are zero."""
    for options in ({}, {"edit_ids": torch.zeros(shape[:-1]).long()}):
        edits = 3 if options else None
        tensors = leaves(arguments(operation, shape, edits=edits))
        results = outputs_of(fused(operation, tensors, **options))
        assert all(t.shape == shape for t in results)
        sum(t.sum() for t in results).backward()
        for name, t in tensors.items():
            assert t.grad.shape == t.shape, name
            assert not t.grad.any(), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_dimension(operation: str, implementation: Implementation) -> None:
    """An activation of one row needs no batch dimension."""
    tensors, grads = arguments(operation, (D,)), upstream((D,), torch.float32)
    rows = tensors | {name: t[None] for name, t in tensors.items() if name in ("x", "residual")}
    expected = run(fused, operation, rows, tuple(g[None] for g in grads))
    for name, value in run(fused, operation, tensors, grads).items():
        assert torch.equal(value, expected[name].reshape(value.shape)), name


@pytest.mark.skipif(cpu.load_error() is not None, reason=f"no CPU kernels: {cpu.load_error()}")
def test_operators_called_directly_check_for_themselves() -> None:
    """A wrong call of torch.ops.red_kernels must not read past a tensor."""
    ops = torch.ops.red_kernels
    x, vector = torch.randn(4, D), torch.randn(D)
    for arguments_, message in [
        ((x, torch.randn(3, D), None, None, None, None, 0.0), "residual must have the shape of x"),
        ((x, x.half(), None, None, None, None, 0.0), "residual must be on the device of x with its dtype"),
        ((x, None, torch.randn(D - 1), None, None, None, 0.0), "scale must be on the CPU with 1 x 37 elements"),
        ((x, None, None, torch.randn(D + 1), None, None, 0.0), "bias must be on the CPU with 1 x 37 elements"),
        ((x, None, vector.long(), None, None, None, 0.0), "scale has an unsupported dtype"),
        ((x.double(), None, vector, None, None, None, 0.0), "x has an unsupported dtype"),
        ((x, None, torch.randn(2, D), None, torch.tensor([0, 1, 2, 0]), None, 0.0), "edit_ids has the value 2"),
        ((x, None, torch.randn(2, D), None, torch.tensor([0, 1]), None, 0.0), "edit_ids must be int64"),
        ((x, None, vector, None, None, torch.tensor([1]), 1.5), "dropout_p must be a probability"),
        ((x, None, vector, None, None, torch.tensor([1, 2]), 0.5), "seed must be one int64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.edit_forward(*arguments_)
    with pytest.raises(RuntimeError, match="the gradient of scale needs x"):
        ops.edit_backward(x, None, vector, None, None, 0.0, 1, 7)
    with pytest.raises(RuntimeError, match="rstd must be contiguous fp32, one for each row"):
        ops.norm_edit_backward(x, x, None, None, None, None, None, torch.ones(3), 0.0, 1, 1)
