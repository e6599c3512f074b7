"""Rotations and reflections with every gradient, on every backend and instruction set, held to the fp64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import mix_cases as cases
import pytest
import torch
from mix_cases import ARGUMENTS, OPERATIONS, arguments, eager, exact, fused, run, truth
from op_cases import (
    DTYPES,
    IMPLEMENTATIONS,
    Implementation,
    Tensors,
    assert_as_good_as,
    drawn_factor,
    same_bits,
    step,
    upstream,
)
from torch import Tensor

import red_kernels as rk

# Rotations (0 blocks), one block, the papers' numbers of blocks, blocks of odd widths, and of a single column.
SHAPES = [
    ((0, 768), 0), ((3, 64), 0), ((3, 768), 0), ((3, 1024), 0), ((3, 4096), 0), ((2, 5, 192), 0), ((3, 16384), 0),
    ((0, 768), 4), ((9, 70), 1), ((9, 769), 1), ((3, 768), 4), ((3, 768), 32), ((3, 1000), 8),
    ((3, 1760), 4), ((3, 4096), 4), ((2, 5, 96), 2), ((3, 11008), 4), ((9, 16384), 1), ((3, 16384), 32),
    ((199, 200), 8),
]  # fmt: skip
WITH_NORM = OPERATIONS[2:]


def _single(tensors: Tensors) -> Tensors:
    return {name: None if name == "second" else t for name, t in tensors.items()}


def _assert_all_as_good_as_eager(operation: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> None:
    peer, expected = run(eager, operation, tensors, grads, **options), truth(operation, tensors, grads, **options)
    for implementation in IMPLEMENTATIONS:
        with implementation.in_use():
            found = run(fused, operation, tensors, grads, **options)
        try:
            assert_as_good_as(found, peer, expected)
        except AssertionError as error:
            raise AssertionError(f"{implementation}: {error}") from error


@pytest.mark.implementations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("shape", "blocks"), SHAPES, ids=str)
def test_error_at_most_that_of_eager(shape: tuple[int, ...], blocks: int, operation: str, dtype: torch.dtype) -> None:
    tensors, grads = arguments(operation, shape, dtype, blocks=blocks), upstream(shape, dtype)
    _assert_all_as_good_as_eager(operation, tensors, grads, blocks=blocks)
    if blocks:
        _assert_all_as_good_as_eager(operation, _single(tensors), grads, blocks=blocks)


@pytest.mark.implementations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS[:2])
def test_blocks_of_one_column(operation: str, dtype: torch.dtype) -> None:
    """Each gradient of a vector is a sum of two products for each row: two rounding steps of the largest for each."""
    tensors, grads = arguments(operation, (9, 70), dtype, blocks=70), upstream((9, 70), dtype)
    expected = truth(operation, tensors, grads, blocks=70)
    for implementation in IMPLEMENTATIONS:
        with implementation.in_use():
            found = run(fused, operation, tensors, grads, blocks=70)
        for name, value in found.items():
            bound = 2 * 9 * step(expected[name].abs().max(), value.dtype)
            assert bool(((value - expected[name]).abs() <= bound).all()), f"{implementation}: {name}"


@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_in_fp64_is_the_plain_composition(operation: str, blocks: int) -> None:
    tensors, grads = cases.widened(arguments(operation, (33, 128), blocks=blocks)), upstream((33, 128), torch.float64)
    expected = exact(operation, tensors, grads, blocks=blocks)
    for name, value in truth(operation, tensors, grads, blocks=blocks).items():
        bound = 256 * step(expected[name].abs().max(), torch.float64)
        assert bool(((value - expected[name]).abs() <= bound).all()), name


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_derivatives(operation: str, blocks: int) -> None:
    """First and second derivatives of the reference are those of finite differences."""
    tensors = cases.widened(arguments(operation, (2, 64), blocks=blocks))
    names = [name for name, t in tensors.items() if t is not None]
    leaves = [tensors[name].requires_grad_() for name in names]

    def function(*values: Tensor) -> Any:
        return fused(operation, dict(zip(names, values, strict=True)), blocks=blocks)

    with rk.backend("reference"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_argument_may_be_absent(operation: str, blocks: int, dtype: torch.dtype) -> None:
    may = [name for name in ARGUMENTS[operation] if name in ("residual", "bias", "weight", "norm_bias")]
    tensors, grads = arguments(operation, (5, 192), dtype, blocks=blocks), upstream((5, 192), dtype)
    for count in range(1, len(may) + 1):
        for absent in itertools.combinations(may, count):
            some = {name: None if name in absent else t for name, t in tensors.items()}
            _assert_all_as_good_as_eager(operation, some, grads, blocks=blocks)


@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_gradient_alone(operation: str, blocks: int, implementation: Implementation) -> None:
    """Whatever asks for gradients, each is the same: to the bit for the kernels."""
    tensors, grads = arguments(operation, (37, 192), blocks=blocks), upstream((37, 192), torch.float32)
    every = run(fused, operation, tensors, grads, blocks=blocks)
    for name in ARGUMENTS[operation]:
        given = {key: t.detach().requires_grad_(key == name) for key, t in tensors.items()}
        results = cases.outputs_of(fused(operation, given, blocks=blocks))
        (found,) = torch.autograd.grad(results, [given[name]], grads[: len(results)])
        assert torch.equal(found, every[f"d {name}"]), name


@pytest.mark.parametrize("used", ["y", "z"])
@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("operation", WITH_NORM)
def test_one_result_used(operation: str, blocks: int, used: str, implementation: Implementation) -> None:
    tensors, (dy, dz) = arguments(operation, (37, 192), blocks=blocks), upstream((37, 192), torch.float32)
    none = torch.zeros_like(dy)
    expected = truth(operation, tensors, (dy, none) if used == "y" else (none, dz), blocks=blocks)
    peer = run(eager, operation, tensors, (dy, none) if used == "y" else (none, dz), blocks=blocks)
    asking = cases.leaves(tensors)
    result = fused(operation, asking, blocks=blocks)[used == "z"]
    names = [name for name in asking if used == "y" or name not in ("weight", "norm_bias")]
    found = torch.autograd.grad(result, [asking[name] for name in names], dy if used == "y" else dz)
    wanted = {f"d {name}" for name in names}
    assert_as_good_as(
        {f"d {name}": g for name, g in zip(names, found, strict=True)},
        *({key: value for key, value in one.items() if key in wanted} for one in (peer, expected)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_edit_ids(operation: str, blocks: int, dtype: torch.dtype, implementation: Implementation) -> None:
    """Rows of several edits in one batch, some of which no row has."""
    shape = (4, 33, 192)
    tensors, grads = arguments(operation, shape, dtype, blocks=blocks, edits=5), upstream(shape, dtype)
    ids = torch.randint(0, 4, shape[:-1], generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    options = {"blocks": blocks, "edit_ids": ids}
    found, peer = run(fused, operation, tensors, grads, **options), run(eager, operation, tensors, grads, **options)
    assert_as_good_as(found, peer, truth(operation, tensors, grads, **options))
    assert not found["d first"][4].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_dropout(operation: str, blocks: int, dtype: torch.dtype, implementation: Implementation) -> None:
    shape = (33, 192)
    tensors, grads = arguments(operation, shape, dtype, blocks=blocks), upstream(shape, dtype)
    factor = drawn_factor(7, 0.25, shape)
    peer = run(eager, operation, tensors, grads, blocks=blocks, factor=factor)
    expected = exact(operation, tensors, grads, blocks=blocks, factor=factor)
    torch.manual_seed(7)
    found = run(fused, operation, tensors, grads, blocks=blocks, dropout_p=0.25, training=True)
    assert_as_good_as(found, peer, expected)


@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_layout(operation: str, blocks: int, implementation: Implementation) -> None:
    """Strides of rows, columns that are not adjacent, an offset of one element, expanded gradients."""
    tensors, (dy, dz) = arguments(operation, (6, 192), blocks=blocks), upstream((6, 192), torch.float32)
    grads = (dy[:1].expand(6, 192), dz[:, :1].expand(6, 192))
    expected = run(fused, operation, tensors, tuple(g.contiguous() for g in grads), blocks=blocks)
    spaced = {
        name: torch.stack((t, t), -1).reshape(*t.shape[:-1], 2 * t.shape[-1])[..., ::2] for name, t in tensors.items()
    }
    shifted = {name: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for name, t in tensors.items()}
    apart = {name: torch.cat((t, t), -1)[..., : t.shape[-1]] if t.dim() > 1 else t for name, t in tensors.items()}
    for other in (spaced, shifted, apart):
        assert same_bits(run(fused, operation, other, grads, blocks=blocks), expected)


@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_twice(operation: str, blocks: int, implementation: Implementation, empty_is_nan: None) -> None:
    tensors, grads = arguments(operation, (300, 192), blocks=blocks), upstream((300, 192), torch.float32)
    first, again = (run(fused, operation, tensors, grads, blocks=blocks) for _ in range(2))
    assert same_bits(first, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize("operation", WITH_NORM)
def test_z_is_that_of_mix_add(operation: str, blocks: int, dtype: torch.dtype, implementation: Implementation) -> None:
    tensors = arguments(operation, (33, 768), dtype, blocks=blocks)
    _, z = fused(operation, tensors, blocks=blocks)
    assert torch.equal(z, fused("mix_add", tensors, blocks=blocks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [0, 4])
def test_large_mean(blocks: int, dtype: torch.dtype, implementation: Implementation) -> None:
    """Each goes on from its own z: at 1000 its rounding hides all other errors."""
    operation = "mix_add_layer_norm"
    tensors, grads = arguments(operation, (33, 768), dtype, blocks=blocks, mean=1000.0), upstream((33, 768), dtype)
    found, peer = (
        run(fused, operation, tensors, grads, blocks=blocks),
        run(eager, operation, tensors, grads, blocks=blocks),
    )
    expected, of_peer = (exact(operation, tensors, grads, blocks=blocks, z_as=one["z"]) for one in (found, peer))
    assert_as_good_as(found, peer, expected, of_peer)


@pytest.mark.parametrize("blocks", [0, 4])
def test_weight_offset(blocks: int, implementation: Implementation) -> None:
    tensors = arguments("mix_add_rms_norm", (33, 192), blocks=blocks)
    grads, options = upstream((33, 192), torch.float32), {"blocks": blocks, "weight_offset": 1.0}
    found = run(fused, "mix_add_rms_norm", tensors, grads, **options)
    peer = run(eager, "mix_add_rms_norm", tensors, grads, **options)
    assert_as_good_as(found, peer, truth("mix_add_rms_norm", tensors, grads, **options))


def test_a_second_derivative_of_a_kernel_says_why_not(implementation: Implementation) -> None:
    tensors = cases.leaves(arguments("mix_add", (3, 64)))
    z = fused("mix_add", tensors)
    (dx,) = torch.autograd.grad(z.sum(), [tensors["x"]], create_graph=True)
    if implementation.ours:
        with pytest.raises(RuntimeError, match="MixFunction has no second derivative"):
            torch.autograd.grad(dx.sum(), [tensors["first"]])
    else:
        torch.autograd.grad(dx.sum(), [tensors["first"]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"first": None}, TypeError, "first must be a tensor, got NoneType"),
        ({"second": None}, TypeError, "second must be a tensor, got NoneType; a rotation needs both"),
        ({"second": torch.ones(65)}, ValueError, r"second has shape \(65,\), expected \(64,\)"),
        ({"bias": torch.ones(2, 64)}, ValueError, r"bias has shape \(2, 64\), which needs edit_ids"),
        ({"blocks": 5}, ValueError, "blocks is 5, expected a divisor of the width of x, 64"),
        ({"blocks": -1}, ValueError, "blocks is -1, expected 0 for a rotation"),
        ({"blocks": 2.0}, TypeError, "blocks must be an integer, got float"),
        ({"edit_ids": torch.zeros(3).long()}, ValueError, r"first has shape \(64,\), expected \(n, 64\)"),
        ({"residual": torch.ones(3, 32)}, ValueError, r"residual has shape \(3, 32\), expected that of x"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p is 2.0, expected a probability"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": torch.ones(3, 64), "residual": None, "first": torch.ones(64), "second": torch.ones(64)}
    with pytest.raises(error, match=message):
        rk.mix_add(**{**given, **change})


def test_a_rotation_needs_pairs() -> None:
    with pytest.raises(ValueError, match="x has width 96, expected a multiple of 64"):
        rk.mix(torch.ones(3, 96), torch.ones(96), torch.ones(96))
