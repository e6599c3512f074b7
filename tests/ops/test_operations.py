"""Every operation with every gradient, on every backend and instruction set, held to the reference in fp64."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from halves import assert_same_numbers, between, rows_of
from op_cases import (
    ARGUMENTS,
    COMPILED,
    DTYPES,
    HALVES,
    IMPLEMENTATIONS,
    OPERATIONS,
    WITH_NORM_BEHIND,
    WITH_WEIGHT_OFFSET,
    Implementation,
    Results,
    Tensors,
    arguments,
    assert_as_good_as,
    call,
    eager,
    from_its_z,
    fused,
    outputs_of,
    run,
    same_bits,
    stacked,
    step,
    truth,
    upstream,
    widened,
)
from torch import Tensor

import red_kernels as rk

SHAPES = [
    (0, 768), (1, 384), (1, 3584), (1, 8192), (3, 1), (3, 576), (3, 768), (3, 769), (3, 1000), (3, 1760), (3, 2048),
    (3, 4096), (3, 5120), (3, 11008), (3, 16384), (3, 20000), (199, 1), (199, 7), (2, 5, 96),
]  # fmt: skip
MANY_ROWS = [(199, 576), (199, 769), (199, 1760), (4096, 1), (4096, 7), (4096, 576)]


def _assert_all_as_good_as_eager(
    operation: str, trials: list[tuple[Tensors, tuple[Tensor, ...]]], **options: Any
) -> None:
    peer = stacked([run(eager, operation, *trial, **options) for trial in trials])
    expected = stacked([truth(operation, *trial, **options) for trial in trials])
    for implementation in IMPLEMENTATIONS:
        with implementation.in_use():
            found = stacked([run(fused, operation, *trial, **options) for trial in trials])
        try:
            assert_as_good_as(found, peer, expected)
        except AssertionError as error:
            raise AssertionError(f"{implementation}: {error}") from error


@pytest.mark.implementations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.nightly) for shape in MANY_ROWS)], ids=str
)
def test_error_at_most_that_of_eager(shape: tuple[int, ...], operation: str, dtype: torch.dtype) -> None:
    # One number has no mean error: many trials have.
    trials = [
        (arguments(operation, shape, dtype, seed=seed), upstream(shape, dtype, seed=seed))
        for seed in range(32 if shape[-1] == 1 else 1)
    ]
    options = {}
    if operation in WITH_WEIGHT_OFFSET and shape[-1] == 1:
        # RMSNorm of one element is its sign, and the gradient a difference of equals. An eps of the elements' size
        # leaves digits to compare.
        options["eps"] = 1.0
    _assert_all_as_good_as_eager(operation, trials, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_large_mean(operation: str, dtype: torch.dtype, implementation: Implementation) -> None:
    tensors = arguments(operation, (33, 769), dtype, mean=1000.0)
    grads = upstream((33, 769), dtype)
    found, peer = run(fused, operation, tensors, grads), run(eager, operation, tensors, grads)
    if operation in WITH_NORM_BEHIND:  # at 1000 the rounding of z hides all other errors: each goes on from its own
        expected, of_peer = (from_its_z(operation, tensors, grads, results["z"]) for results in (found, peer))
        assert_as_good_as(found, peer, expected, of_peer)
    else:
        assert_as_good_as(found, peer, truth(operation, tensors, grads))


@pytest.mark.parametrize("norms", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_vectors_of_other_dtypes(
    operation: str, vectors: torch.dtype, norms: torch.dtype, implementation: Implementation
) -> None:
    """Each gradient comes in the dtype of its vector, and none of the vectors' digits are lost."""
    tensors = arguments(operation, (33, 70), torch.bfloat16, vectors=vectors, norms=norms)
    grads = upstream((33, 70), torch.bfloat16)
    found = run(fused, operation, tensors, grads)
    for name, value in found.items():
        of = tensors.get(name.removeprefix("d "))
        assert value.dtype == (torch.bfloat16 if of is None else of.dtype), name
    options = {"z_as": found["z"]} if operation in WITH_NORM_BEHIND else {}
    # The peer works in fp32, which holds what comes in, and rounds each result once.
    wide = {name: None if t is None else t.float() for name, t in tensors.items()}
    peer = run(eager, operation, wide, tuple(g.float() for g in grads), **options)
    peer = {name: value.to(found[name].dtype) for name, value in peer.items()}
    expected = run(eager, operation, widened(tensors), tuple(g.double() for g in grads), **options)
    assert_as_good_as(found, peer, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_z_is_that_of_edit_add(operation: str, dtype: torch.dtype, implementation: Implementation) -> None:
    tensors = arguments(operation, (33, 769), dtype)
    _, z = fused(operation, tensors)
    assert torch.equal(z, fused("edit_add", tensors))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference_in_fp64_is_the_plain_composition(operation: str) -> None:
    tensors, grads = widened(arguments(operation, (33, 70))), upstream((33, 70), torch.float64)
    expected = run(eager, operation, tensors, grads)
    for name, value in truth(operation, tensors, grads).items():
        # fp64 sums of 70 terms at most, each good to a rounding step of the largest
        bound = 70 * step(expected[name].abs().max(), torch.float64)
        assert bool(((value - expected[name]).abs() <= bound).all()), name


def _subsets(operation: str) -> list[tuple[str, ...]]:
    names = ARGUMENTS[operation][1:]
    return [absent for n in range(1, len(names) + 1) for absent in itertools.combinations(names, n)]


@pytest.mark.implementations
@pytest.mark.parametrize(
    ("operation", "absent"),
    [(operation, absent) for operation in OPERATIONS for absent in _subsets(operation)],
    ids=lambda v: v if isinstance(v, str) else "without-" + "-".join(v),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_argument_may_be_absent(operation: str, absent: tuple[str, ...], dtype: torch.dtype) -> None:
    tensors = arguments(operation, (33, 70), dtype) | dict.fromkeys(absent)
    _assert_all_as_good_as_eager(operation, [(tensors, upstream((33, 70), dtype))])


@pytest.mark.implementations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_WEIGHT_OFFSET)
def test_weight_offset(operation: str, dtype: torch.dtype) -> None:
    tensors = arguments(operation, (65, 130), dtype)
    _assert_all_as_good_as_eager(operation, [(tensors, upstream((65, 130), dtype))], weight_offset=1.0)


@pytest.mark.parametrize("operation", WITH_WEIGHT_OFFSET)
def test_weight_offset_needs_a_weight(operation: str, implementation: Implementation) -> None:
    """Without a weight there is nothing to offset: the norm is plain."""
    tensors = arguments(operation, (3, 70)) | {"weight": None}
    grads = upstream((3, 70), torch.float32)
    plain = run(fused, operation, tensors, grads)
    assert same_bits(run(fused, operation, tensors, grads, weight_offset=1.0), plain)


@pytest.mark.implementations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_without_z(operation: str, dtype: torch.dtype) -> None:
    tensors = arguments(operation, (199, 130), dtype)
    _assert_all_as_good_as_eager(operation, [(tensors, upstream((199, 130), dtype, number=1))], need_z=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_y_is_the_norm_of_the_z_returned(operation: str, dtype: torch.dtype, implementation: Implementation) -> None:
    tensors = arguments(operation, (199, 130), dtype, mean=100.0)
    y, z = fused(operation, tensors)
    affine = [tensors[name] for name in ("weight", "norm_bias") if name in tensors]
    norm = F.layer_norm if "layer" in operation else F.rms_norm
    expected = norm(z.double(), (130,), *(t.double() for t in affine), eps=1e-5)
    assert_as_good_as({"y": y}, {"y": norm(z, (130,), *affine, eps=1e-5)}, {"y": expected})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["edit", "edit_add"])
def test_rounded_once(operation: str, dtype: torch.dtype, implementation: Implementation) -> None:
    """Half a rounding step of the result, and of fp32 one for the product and for each sum."""
    tensors = arguments(operation, (199, 769), dtype)
    z = fused(operation, tensors)
    x, scale, bias, residual = (
        torch.zeros(()).double() if t is None else t.double()
        for t in map(tensors.get, ("x", "scale", "bias", "residual"))
    )
    exact = residual + scale * x + bias
    terms = residual.abs() + (scale * x).abs() + bias.abs()
    bound = 0.5 * step(torch.maximum(z.double().abs(), exact.abs()), dtype) + 3 * 2.0**-24 * terms
    assert bool(((z.double() - exact).abs() <= bound).all())


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fp32_is_rounded_to_the_nearest_and_even(dtype: torch.dtype, implementation: Implementation) -> None:
    """Every half, every middle between two, their neighbours in fp32, and NaNs of every kind, which stay NaNs."""
    values = between(dtype)
    if implementation.variant == "avx512_bf16":  # whose instruction takes subnormal numbers for zeros
        values = values[~(values.abs() < torch.finfo(torch.float32).tiny)]
    for bias in rows_of(values, 20_011):
        found = call(rk.edit, torch.zeros(1, len(bias), dtype=dtype), torch.ones(len(bias)), bias)
        assert_same_numbers(found[0], (bias + 0.0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_identity_changes_no_bit(dtype: torch.dtype, implementation: Implementation) -> None:
    tensors = arguments("edit_add", (33, 769), dtype)
    x, residual = tensors["x"], tensors["residual"]
    ones, zeros = torch.ones(769), torch.zeros(769)
    assert torch.equal(call(rk.edit, x, ones, zeros), x)
    assert torch.equal(call(rk.edit, x), x)
    assert torch.equal(call(rk.edit_add, x, residual, ones, zeros), residual + x)
    assert torch.equal(call(rk.edit_add, x, residual), residual + x)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
@pytest.mark.parametrize("operation", ["edit_add", *WITH_NORM_BEHIND])
def test_residual_of_another_dtype(
    operation: str, dtypes: tuple[torch.dtype, torch.dtype], implementation: Implementation
) -> None:
    """The result has the dtype that both fit in, each gradient that of its tensor."""
    tensors = arguments(operation, (33, 70), dtypes[0])
    tensors["residual"] = tensors["residual"].to(dtypes[1])
    both = torch.promote_types(*dtypes)
    grads = upstream((33, 70), both)
    found = run(fused, operation, tensors, grads)
    expected = run(fused, operation, tensors | {name: tensors[name].to(both) for name in ("x", "residual")}, grads)
    for name, value in found.items():
        of = tensors.get(name.removeprefix("d "))
        assert value.dtype == (both if of is None else of.dtype), name
        assert torch.equal(value, expected[name].to(value.dtype)), name


@pytest.mark.implementations
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_edits_chosen_by_row(operation: str, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    """Repeated ids, one id once, ids that no row has: their gradients are zero."""
    shape = (5, 41, 70)
    ids = torch.randint(0, 3, shape[:-1], dtype=ids_dtype) * 2
    ids[2, 7] = 7
    tensors = arguments(operation, shape, dtype, edits=9)
    trial = (tensors, upstream(shape, dtype))
    peer, expected = run(eager, operation, *trial, edit_ids=ids.long()), truth(operation, *trial, edit_ids=ids)
    for implementation in IMPLEMENTATIONS:
        with implementation.in_use():
            found = run(fused, operation, *trial, edit_ids=ids)
        assert_as_good_as(found, peer, expected)
        for name in ("d scale", "d bias"):
            assert found[name].shape == (9, 70)
            assert not found[name][[1, 3, 5, 6, 8]].any(), f"{implementation} {name}"
            assert bool(found[name][[0, 2, 4, 7]].any(-1).all())


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("compiled", COMPILED, ids=str)
def test_one_edit_for_all_rows_is_the_plain_edit(operation: str, compiled: Implementation) -> None:
    """To the last bit: the sums are taken in the same order."""
    tensors = arguments(operation, (70, 40), torch.bfloat16)
    grads = upstream((70, 40), torch.bfloat16)
    with compiled.in_use():
        plain = run(fused, operation, tensors, grads)
    rows = tensors | {name: tensors[name][None].repeat(2, 1) for name in ("scale", "bias")}
    with compiled.in_use():
        found = run(fused, operation, rows, grads, edit_ids=torch.ones(70, dtype=torch.int64))
    for name in ("d scale", "d bias"):
        found[name] = found[name][1]
    assert same_bits(found, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_row_is_the_same_whatever_edit_the_row_before_has(
    operation: str, dtype: torch.dtype, implementation: Implementation
) -> None:
    """Edits that take turns and edits in runs, one of them infinite: to the last bit."""
    tensors = arguments(operation, (24, 77), dtype)
    for name in ("scale", "bias"):
        tensors[name] = torch.stack([tensors[name], 0.5 * tensors[name], tensors[name].flip(0)])
    tensors["scale"][1, 5] = float("inf")
    ids = torch.arange(24) % 3
    order = torch.argsort(ids, stable=True)
    moved = tensors | {name: t[order] for name, t in tensors.items() if name in ("x", "residual")}
    turns, runs = fused(operation, tensors, edit_ids=ids), fused(operation, moved, edit_ids=ids[order])
    for found, expected in zip(outputs_of(runs), outputs_of(turns), strict=True):
        torch.testing.assert_close(found, expected[order], rtol=0, atol=0, equal_nan=True)


def _linear(x: Tensor, weight: Tensor, linear_bias: Tensor | None, scale: Tensor | None, bias: Tensor | None,
            residual: Tensor | None) -> Tensor:  # fmt: skip
    h = F.linear(x, weight, linear_bias)
    dtype = h.dtype
    h = h if scale is None else h * scale
    h = (h if bias is None else h + bias).to(dtype)
    return h if residual is None else residual + h


def _fused_linear(*values: Tensor | None) -> Tensor:
    return call(rk.linear_edit, *values)


def _linear_results(operation: Any, tensors: Tensors, gradient: Tensor) -> Results:
    asking = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in tensors.items()}
    z = operation(*asking.values())
    wanted = {name: t for name, t in asking.items() if t is not None}
    found = torch.autograd.grad(z, list(wanted.values()), gradient.to(z.dtype))
    return {"z": z.detach()} | {f"d {name}": g for name, g in zip(wanted, found, strict=True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "absent", [(), ("linear_bias",), ("scale",), ("bias",), ("residual",), ("scale", "bias")], ids=str
)
def test_linear_edit(absent: tuple[str, ...], dtype: torch.dtype, implementation: Implementation) -> None:
    tensors: Tensors = {
        "x": torch.randn(4, 9, 24).to(dtype),
        "weight": (torch.randn(40, 24) / 5).to(dtype),
        "linear_bias": torch.randn(40).to(dtype),
        "scale": torch.randn(40),
        "bias": torch.randn(40),
        "residual": torch.randn(4, 9, 40).to(dtype),
    }
    tensors |= dict.fromkeys(absent)
    gradient = torch.randn(4, 9, 40).to(dtype)
    found = _linear_results(_fused_linear, tensors, gradient)
    peer = _linear_results(_linear, tensors, gradient)
    assert_as_good_as(found, peer, _linear_results(_linear, widened(tensors), gradient))


def test_linear_edit_with_a_residual_of_another_dtype(implementation: Implementation) -> None:
    x, weight = torch.randn(5, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    scale, residual = torch.randn(40), torch.randn(5, 40)
    z = call(rk.linear_edit, x, weight, None, scale, None, residual)
    assert z.dtype == torch.float32
    assert torch.equal(z, call(rk.edit_add, call(F.linear, x, weight), residual, scale))


def test_linear_edit_of_rows_with_their_own_edits(implementation: Implementation) -> None:
    x, weight, scale = torch.randn(6, 24), torch.randn(40, 24), torch.randn(3, 40)
    ids = torch.tensor([2, 0, 0, 1, 2, 2])
    z = call(rk.linear_edit, x, weight, None, scale, None, edit_ids=ids)
    assert torch.equal(z, call(rk.edit, call(F.linear, x, weight), scale, edit_ids=ids))


@pytest.mark.parametrize("trained", [True, False], ids=["norm trained", "edit alone"])
@pytest.mark.parametrize("operation", ["rms_norm_edit", "layer_norm_edit"])
def test_vectors_whose_product_overflows(operation: str, trained: bool, implementation: Implementation) -> None:
    """``scale * weight`` is infinite in one column, and what comes there from behind is nothing: so is what goes on."""
    tensors = arguments(operation, (5, 70))
    tensors["scale"][3], tensors["weight"][3] = 1e20, 3e19
    (gradient,) = upstream((5, 70), torch.float32, number=1)
    gradient[:, 3] = 0.0
    results = []
    for used in (rk.backend("reference"), nullcontext()):
        with used:
            asking = {
                name: t.clone().requires_grad_(trained or name in ("x", "scale", "bias")) for name, t in tensors.items()
            }
            asked = [name for name, t in asking.items() if t.requires_grad]
            found = torch.autograd.grad(fused(operation, asking), [asking[name] for name in asked], gradient)
            results.append(dict(zip(asked, found, strict=True)))
    theirs, ours = results
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert values.isfinite().all()
        torch.testing.assert_close(ours[name], values, rtol=1e-4, atol=1e-4)
