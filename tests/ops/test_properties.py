"""Random shapes, strides, dtypes and absent arguments: each call equals that on plain copies, and the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    ACTIVATIONS,
    ARGUMENTS,
    DTYPES,
    HALVES,
    IMPLEMENTATIONS,
    INTERPRETED,
    OPERATIONS,
    TEST_ALL,
    WITH_DROPOUT,
    WITH_NORM_BEHIND,
    WITH_WEIGHT_OFFSET,
    Tensors,
    arguments,
    call,
    fused,
    outputs_of,
    step,
)
from torch import Tensor

import red_kernels as rk


def _examples(number: int) -> int:
    return number if TEST_ALL or not INTERPRETED else number // 6


LAYOUTS = ("plain", "sliced", "stepped", "transposed", "offset", "expanded rows", "expanded columns", "expanded")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A tensor of this shape and dtype with other strides; its numbers change only where it is expanded."""
    shape = t.shape
    if layout == "sliced":  # out of wider rows
        wide = t.new_full((*shape[:-1], shape[-1] + 3), float("nan"))
        wide[..., 2:-1] = t
        return wide[..., 2:-1]
    if layout == "stepped":  # every other column
        wide = t.new_full((*shape[:-1], 2 * shape[-1]), float("nan"))
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        flat = t.new_full((t.numel() + 1,), float("nan"))
        flat[1:] = t.reshape(-1)
        return flat[1:].view(shape)
    if layout == "expanded rows" and t.numel():
        return t.reshape(-1, shape[-1])[0].expand(shape)
    if layout == "expanded columns":
        return t[..., :1].expand(shape)
    if layout == "expanded" and t.numel():
        return t.reshape(-1)[0].expand(shape)
    return t


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, Tensors, tuple[Tensor, ...], dict[str, Any], tuple[str, ...]]:
    """An operation, its tensors, the gradients of its results, its options, and the tensors that ask for gradients."""
    operation = draw(st.sampled_from(OPERATIONS))
    shape = (*draw(st.lists(st.integers(0, 6), max_size=3)), draw(st.integers(1, 80)))
    dtype = draw(st.sampled_from(DTYPES))
    of = st.sampled_from((*DTYPES, torch.float64))
    edits = draw(st.none() | st.integers(1, 4))
    tensors = arguments(operation, shape, dtype, edits=edits, seed=draw(st.integers(0, 2**20)))
    options: dict[str, Any] = {}
    for name in ARGUMENTS[operation]:
        if name != "x" and draw(st.integers(0, 3)) == 0:
            tensors[name] = None
        elif name in ACTIVATIONS:
            tensors[name] = laid_out(tensors[name], draw(st.sampled_from(LAYOUTS)))
        else:
            tensors[name] = laid_out(tensors[name].to(draw(of)), draw(st.sampled_from(LAYOUTS[:5])))
    if edits is not None:
        if tensors["scale"] is None and tensors["bias"] is None:
            tensors["bias"] = torch.ones(edits, shape[-1])
        ids = torch.randint(0, edits, shape[:-1], generator=torch.Generator().manual_seed(1))
        options["edit_ids"] = ids.to(draw(st.sampled_from((torch.int64, torch.int32))))
    if operation in WITH_DROPOUT and draw(st.booleans()):
        options |= {"dropout_p": draw(st.sampled_from((0.1, 0.5, 1.0))), "training": True}
    if operation in WITH_WEIGHT_OFFSET and draw(st.booleans()):
        options["weight_offset"] = 1.0
    if operation in WITH_NORM_BEHIND and draw(st.booleans()):
        options["need_z"] = False
    grads = tuple(laid_out(torch.randn(shape).to(dtype), draw(st.sampled_from(LAYOUTS))) for _ in range(2))
    present = [name for name, t in tensors.items() if t is not None]
    asking = tuple(draw(st.lists(st.sampled_from(present), unique=True, min_size=1)))
    return operation, tensors, grads, options, asking


def _results(
    operation: str, tensors: Tensors, grads: tuple[Tensor, ...], options: dict[str, Any], asking: tuple[str, ...]
) -> dict[str, Tensor]:
    torch.manual_seed(11)  # of the dropout
    given = {name: None if t is None else t.detach().requires_grad_(name in asking) for name, t in tensors.items()}
    results = outputs_of(fused(operation, given, **options))
    used = [(t, g.to(t.dtype)) for t, g in zip(results, grads, strict=False) if t.requires_grad]
    wanted = [given[name] for name in asking]
    found = torch.autograd.grad([t for t, _ in used], wanted, [g for _, g in used], allow_unused=True)
    values = dict(zip(("y", "z"), (t.detach() for t in results), strict=False))
    return values | {f"d {name}": g for name, g in zip(asking, found, strict=True) if g is not None}


@pytest.mark.implementations
@settings(max_examples=_examples(400))
@given(calls())
def test_strides_change_nothing(
    call: tuple[str, Tensors, tuple[Tensor, ...], dict[str, Any], tuple[str, ...]],
) -> None:
    """On every implementation; and every gradient asked for comes with the shape and dtype of its tensor."""
    operation, tensors, grads, options, asking = call
    plain = {name: None if t is None else t.contiguous().clone() for name, t in tensors.items()}
    for implementation in IMPLEMENTATIONS:
        with implementation.in_use():
            found = _results(operation, tensors, grads, options, asking)
            expected = _results(operation, plain, tuple(g.contiguous() for g in grads), options, asking)
        assert {f"d {name}" for name in asking} <= found.keys()
        for name, value in found.items():
            of = tensors.get(name.removeprefix("d "), tensors["x"])
            assert (value.shape, value.dtype) == (of.shape, of.dtype), (implementation, name)
            if implementation.ours and implementation.device == "cpu":
                assert torch.equal(value, expected[name]), (implementation, name)
            elif value.numel():
                # PyTorch's own sums may run in the order of the strides, and a kernel on a GPU is another one for odd
                # addresses, its sums in another order: in fp32, at most a step for each term of both (terms as large as
                # the gradients may cancel). What is then rounded to half may go to either neighbour.
                terms = max(tensors["x"].shape[-1], tensors["x"].numel() // tensors["x"].shape[-1])
                close, other = value.double(), expected[name].double()
                largest = max(float(t.abs().max()) for t in (other, *grads) if t.numel())
                bound = 2 * terms * step(torch.tensor(largest), torch.float32)
                if value.dtype in HALVES:
                    bound = bound + step(torch.maximum(close.abs(), other.abs()), value.dtype)
                assert bool(((close - other).abs() <= bound).all()), name


@pytest.mark.implementations
@settings(max_examples=_examples(200))
@given(
    operation=st.sampled_from(("edit", "edit_add")),
    rows=st.integers(0, 300),
    d=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
    size=st.sampled_from((1e-3, 1.0, 100.0)),
)
def test_error_bounds(operation: str, rows: int, d: int, dtype: torch.dtype, seed: int, size: float) -> None:
    """From the theory: half a step of the result, an fp32 half step for each operation, n of them for a sum of n."""
    tensors = {name: t * size for name, t in arguments(operation, (rows, d), dtype, seed=seed).items()}
    gradient = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wide = {name: t.double() for name, t in tensors.items()}
    x, scale, bias, g = wide["x"], wide["scale"], wide["bias"], gradient.double()
    residual = wide.get("residual", torch.zeros(()).double())
    unit = 2.0**-24
    exact = {
        "y": (residual + scale * x + bias, 3 * unit * (residual.abs() + (scale * x).abs() + bias.abs())),
        "d x": (scale * g, unit * (scale * g).abs()),
        "d scale": ((x * g).sum(0), (rows + 1) * unit * (x * g).abs().sum(0)),
        "d bias": (g.sum(0), rows * unit * g.abs().sum(0)),
    }
    for implementation in IMPLEMENTATIONS:
        with implementation.in_use():
            found = _results(operation, tensors, (gradient, gradient), {}, ("x", "scale", "bias"))
        for name, (value, bound) in exact.items():
            close = found[name].double()
            bound = bound * 1.001 + 0.5 * step(torch.maximum(close.abs(), value.abs()), found[name].dtype)
            assert bool(((close - value).abs() <= bound).all()), (implementation, name)


@settings(max_examples=100)
@given(
    rows=st.integers(1, 60),
    d=st.integers(1, 200),
    centered=st.booleans(),
    seed=st.integers(0, 2**20),
    p=st.sampled_from((0.0, 0.3)),
)
def test_compiled_kernels_agree_with_one_another(rows: int, d: int, centered: bool, seed: int, p: float) -> None:
    """The edit and its dropout to the last bit, whatever the width of the vectors."""
    operation = "edit_add_layer_norm" if centered else "edit_add_rms_norm"
    tensors = arguments(operation, (rows, d), torch.bfloat16, seed=seed)
    found = []
    for implementation in IMPLEMENTATIONS:
        if implementation.variant not in (None, "base"):  # base has no fused multiply-add
            with implementation.in_use():
                torch.manual_seed(seed)
                found.append(outputs_of(call(rk.edit_add, tensors["x"], tensors["residual"], tensors["scale"],
                                             tensors["bias"], dropout_p=p, training=True)))  # fmt: skip
    assert all(torch.equal(*pair) for one in found[1:] for pair in zip(found[0], one, strict=True))
