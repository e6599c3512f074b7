"""The CUDA kernels that are compiled for a norm behind an edit as most calls have it: which they get, and their bits.

They get a call only where nothing is missing and everything lies one behind the other (norm_forward_exact.cuh,
norm_backward_exact.cuh in csrc/cuda). Otherwise other kernels run, and what they compute has the same bits.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from op_cases import (
    ARGUMENTS,
    CUDA,
    DTYPES,
    EMULATED,
    HALVES,
    WITH_NORM_BEHIND,
    Results,
    Tensors,
    arguments,
    fused,
    outputs_of,
    same_bits,
    upstream,
)
from torch import Tensor

from red_kernels.backends import cuda

if not CUDA:
    pytest.skip(
        f"no CUDA kernels here, neither on a GPU nor in the emulator: {cuda.load_error()}", allow_module_level=True
    )

from cuda_cases import H200, emulating, held, rows_of

pytestmark = [
    pytest.mark.implementations,
    pytest.mark.skipif(not EMULATED, reason="needs the emulator, which says what was launched"),
]
DEVICE = H200._replace(multiprocessors=1)
# All of a thread's vectors are there: 1, 2, 3, 4 and, of fp32, 6 of them; a warp for a row, or several.
WIDTHS = (256, 512, 768, 1024, 1536, 2048, 2304, 4096, 5120, 8192)
CLUSTERED = 16384
EDIT_VECTORS = ("x", "residual", "scale", "bias")
POST_NORM = (768, 1024)  # BERT's
EXACT = ["norm_forward_exact", "norm_backward_exact"]
GENERAL = ["norm_forward", "norm_backward"]


def launched() -> list[str]:
    """The norms' kernels that were started since this was last called."""
    text = ctypes.create_string_buffer(8192)
    ctypes.CDLL(os.environ["RED_KERNELS_CUDA_EMULATED"]).red_kernels_cuda_launched(text, ctypes.c_size_t(8192))
    return [name for name in text.value.decode().split() if name.startswith("norm_")]


def run(
    operation: str,
    tensors: Tensors,
    grads: tuple[Tensor | None, ...],
    asking: tuple[str, ...] = EDIT_VECTORS,
    **options: Any,
) -> tuple[Results, list[str]]:
    """Results and gradients with the tensors as they lie, and which kernels made them. A gradient may be missing."""
    given = {name: t if t is None else t.detach().requires_grad_(name in asking) for name, t in tensors.items()}
    launched()
    with emulating(DEVICE), CUDA[0].in_use():
        results = outputs_of(fused(operation, given, **options))
        kept = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        found = torch.autograd.grad([r for r, _ in kept], [given[name] for name in asking], [g for _, g in kept])
    named = dict(zip(("y", "z"), results, strict=False)) | {f"d {n}": g for n, g in zip(asking, found, strict=True)}
    return {name: t.detach().contiguous() for name, t in named.items()}, launched()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [*WIDTHS, CLUSTERED])
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_calls_as_most_are(operation: str, d: int, dtype: torch.dtype) -> None:
    """They get these kernels, which are right and find the same bits twice."""
    shape = (rows_of(d), d)
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype)
    found, names = run(operation, tensors, grads)
    clustered = d == CLUSTERED and dtype == torch.float32  # forward too, where these kernels have none
    assert names == (["norm_forward", EXACT[1]] if clustered else EXACT)
    assert same_bits(found, run(operation, tensors, grads)[0])
    with emulating(DEVICE):
        assert same_bits({n: t for n, t in held(operation, tensors, grads, EDIT_VECTORS).items() if n in found}, found)


def _strided(t: Tensor) -> Tensor:
    rows, d = t.shape
    return torch.full((rows, d + 8), torch.nan, dtype=t.dtype)[:, :d].copy_(t)


# What is not as the kernels need it, and which of the two then do not run.
STRIDED = {"x": (True, True), "residual": (True, False), "dy": (False, True), "dz": (False, True)}


@pytest.mark.parametrize("which", STRIDED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_rows_apart(operation: str, d: int, dtype: torch.dtype, which: str) -> None:
    shape = (rows_of(d), d)
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype)
    expected, _ = run(operation, tensors, grads)
    if which in tensors:
        tensors = tensors | {which: _strided(tensors[which])}
    else:
        grads = tuple(_strided(g) if name == which else g for name, g in zip(("dy", "dz"), grads, strict=True))
    found, names = run(operation, tensors, grads)
    general = [
        name.removesuffix("_exact") if other else name for name, other in zip(EXACT, STRIDED[which], strict=True)
    ]
    assert names == general
    assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_a_weight_in_fp32(operation: str, d: int, dtype: torch.dtype) -> None:
    """The same numbers, so that what the forward finds is the same; a backward has another layout, and other sums."""
    shape = (rows_of(d), d)
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype)
    expected, _ = run(operation, tensors, grads)
    found, names = run(operation, tensors | {"weight": tensors["weight"].float()}, grads)
    assert names == GENERAL
    assert all(same_bits({"": found[name]}, {"": expected[name]}) for name in ("y", "z"))


# Gradients that nobody asks for, the other results being as they are.
FEWER = [
    ("x", "residual"),
    ("x", "residual", "bias"),
    ("x", "scale", "bias"),
    ("residual", "scale", "bias"),
    ("scale",),
]


@pytest.mark.parametrize("asking", FEWER, ids="-".join)
@pytest.mark.parametrize("d", [768, 2048, 4096])
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_fewer_gradients(operation: str, d: int, asking: tuple[str, ...]) -> None:
    shape, dtype = (rows_of(d), d), torch.bfloat16
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype)
    expected, _ = run(operation, tensors, grads)
    found, names = run(operation, tensors, grads, asking)
    assert names == [EXACT[0], "norm_backward"]
    if {"x", "scale"} <= {*asking}:  # the kernel reads as much, so that the layout is the same
        assert same_bits(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("d", [768, 2048, 4096])
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_other_arguments(operation: str, d: int) -> None:
    """What is missing or added takes the others: no gradient of z, bias or residual; 1 + weight, dropout, edit_ids."""
    shape, dtype = (rows_of(d), d), torch.bfloat16
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype)
    assert run(operation, tensors, (grads[0], None))[1] == [EXACT[0], "norm_backward"]
    assert run(operation, tensors | {"bias": None}, grads, ("x", "residual", "scale"))[1] == GENERAL
    assert run(operation, tensors | {"residual": None}, grads, ("x", "scale", "bias"))[1] == GENERAL
    added = "norm_bias" not in ARGUMENTS[operation]  # RMSNorm has the offset
    if added:
        assert run(operation, tensors, grads, weight_offset=1.0)[1] == GENERAL
    else:
        assert run(operation, tensors | {"norm_bias": None}, grads)[1] == ["norm_forward", EXACT[1]]
    assert run(operation, tensors, grads, dropout_p=0.5, training=True)[1] == ["norm_forward", "norm_backward_more"]
    banks = tensors | {name: tensors[name].expand(2, d).clone() for name in ("scale", "bias")}
    ids = torch.arange(shape[0]) % 2
    assert run(operation, banks, grads, edit_ids=ids)[1] == GENERAL
    assert run(operation, tensors, grads, ARGUMENTS[operation])[1] == [EXACT[0], "norm_backward"]


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("need_z", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [*POST_NORM, 2312])
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_post_norm_and_dropout(operation: str, d: int, dtype: torch.dtype, need_z: bool, p: float) -> None:
    """They have a backward of their own, to the same bits wherever the rows lie."""
    if need_z and not p:
        return  # neither
    shape = (rows_of(d), d)
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype, number=1 + need_z)
    drawn = {"dropout_p": p, "training": True} if p else {}
    options = drawn | ({} if need_z else {"need_z": False})
    torch.manual_seed(7)
    found, names = run(operation, tensors, grads, **options)
    assert names[1:] == ["norm_backward_more"]
    apart = tensors | {name: _strided(tensors[name]) for name in ("x", "residual")}
    torch.manual_seed(7)
    assert same_bits(run(operation, apart, tuple(_strided(g) for g in grads), **options)[0], found)
    with emulating(DEVICE):
        held(operation, tensors, grads, EDIT_VECTORS, p, need_z=need_z)
    if not need_z:  # other vectors than the usual ones take the general kernel
        assert run(operation, tensors | {"bias": tensors["bias"].bfloat16()}, grads, **options)[1][1:] == GENERAL[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_widths_that_leave_threads_idle(operation: str, dtype: torch.dtype) -> None:
    for d in (72, 2312):
        shape = (5, d)
        found = run(operation, arguments(operation, shape, dtype), upstream(shape, dtype))
        assert found[1] == GENERAL


@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
@pytest.mark.parametrize("d", [768, 4096])
def test_zeros_keep_their_signs(operation: str, d: int) -> None:
    """A weight of -0 stays what it is where nothing is added to it, in both kernels."""
    shape = (5, d)
    tensors, grads = arguments(operation, shape, torch.bfloat16), upstream(shape, torch.bfloat16)
    tensors["weight"] = torch.full((d,), -0.0, dtype=torch.bfloat16)
    expected, _ = run(operation, tensors, grads)
    found, names = run(operation, tensors | {"x": _strided(tensors["x"])}, grads)
    assert names == GENERAL
    assert same_bits(found, expected)
