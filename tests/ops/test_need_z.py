"""Whether ``z`` is kept changes nothing else: the norm sees it as rounded in both forms, and so does the backward,
which without ``z`` makes it again.

To the last bit, where nothing but that differs. On a GPU making ``z`` again takes registers, so the backward may have
another layout, whose sums are in another order: there the tests of those kernels hold gradients to the same bits, for
layouts that are the same.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    ARGUMENTS,
    DTYPES,
    EPS,
    HALVES,
    WITH_NORM_BEHIND,
    Implementation,
    Results,
    arguments,
    assert_as_good_as,
    fused,
    kept_and_not,
    same_bits,
    upstream,
)
from torch import Tensor

# Whole vectors and tails, where a vector may begin or one element behind, and rows for the kernels of wide rows only.
CASES = [
    ((33, 96), True), ((1, 1), True), ((65, 7), False), ((9, 769), True), ((5, 768), False), ((3, 2304), True),
    ((2, 16391), True), ((2, 16640), False),
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout_p": 0.25, "training": True},
    "edit_ids": {"edits": 3},
    "all options": {"dropout_p": 0.25, "training": True, "edits": 3},
}
ABSENT: dict[str, tuple[str, ...]] = {
    "all": (),
    "no residual": ("residual",),
    "no edit": ("scale", "bias"),
    "x alone": ARGUMENTS["edit_add_layer_norm"][1:],
}
ASKING = {"all": None, "edit and activations": ("x", "residual", "scale", "bias")}


def _assert_the_same(found: Results, expected: Results, implementation: Implementation) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name == "y" or implementation.backend not in ("cuda", "triton"):
            assert same_bits({name: value}, {name: expected[name]}), name
            continue
        eps = torch.finfo(value.dtype).eps if value.dtype != torch.float32 else 0.0
        bound = 1e-5 * expected[name].abs().max() + eps * expected[name].abs()
        assert bool(((value - expected[name]).abs() <= bound).all()), name


def _unaligned(t: Tensor) -> Tensor:
    """The same numbers, one element behind where a vector may begin."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
@pytest.mark.parametrize(("shape", "aligned"), CASES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("asked", ASKING)
def test_the_same_bits(
    asked: str,
    absent: str,
    name: str,
    shape: tuple[int, int],
    aligned: bool,
    operation: str,
    dtype: torch.dtype,
    implementation: Implementation,
) -> None:
    options = dict(OPTIONS[name])
    edits = options.pop("edits", None)
    tensors = arguments(operation, shape, dtype, edits=edits)
    tensors |= {key: None for key in ABSENT[absent] if key in tensors}
    if edits is not None:
        if tensors["scale"] is None and tensors["bias"] is None:
            return  # nothing to choose from
        options["edit_ids"] = torch.arange(shape[0]) * 2 % edits
    if not aligned:
        tensors = {key: None if t is None else _unaligned(t) for key, t in tensors.items()}
    (dy,) = upstream(shape, dtype, number=1)
    kept, made_again = kept_and_not(operation, tensors, dy, ASKING[asked], **options)
    _assert_the_same(made_again, kept, implementation)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_a_residual_of_another_dtype(
    operation: str, dtypes: tuple[torch.dtype, torch.dtype], implementation: Implementation
) -> None:
    """The dtype that ``z`` is rounded to is that of the results."""
    tensors = arguments(operation, (9, 130), dtypes[0])
    tensors["residual"] = tensors["residual"].to(dtypes[1])
    (dy,) = upstream((9, 130), torch.promote_types(*dtypes), number=1)
    kept, made_again = kept_and_not(operation, tensors, dy)
    assert made_again["y"].dtype == dy.dtype
    _assert_the_same(made_again, kept, implementation)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_the_norm_sees_z_as_rounded(operation: str, dtype: torch.dtype, implementation: Implementation) -> None:
    """A residual of 1000 leaves of ``x`` a few steps of the dtype, and LayerNorm makes the difference large."""
    tensors = arguments(operation, (33, 130), dtype) | {"scale": None, "bias": None}
    tensors["residual"] = torch.full((33, 130), 1000.0, dtype=dtype)
    y, _ = fused(operation, tensors, need_z=False)
    z = tensors["residual"] + tensors["x"]
    affine = [tensors[name] for name in ("weight", "norm_bias") if name in tensors]
    norm = F.layer_norm if "layer" in operation else F.rms_norm
    expected = norm(z.double(), (130,), *(t.double() for t in affine), eps=EPS)
    assert_as_good_as({"y": y}, {"y": norm(z, (130,), *affine, eps=EPS)}, {"y": expected})
