"""Kinds of edit of another package: one of formulas alone, and one for which the package's kernels serve."""

from __future__ import annotations

from torch import Tensor

from red_kernels.edits.kinds import Kind, Part, affine, register_kind
from red_kernels.edits.kinds.kind import Vectors


def curved(h: Tensor, vectors: Vectors) -> Tensor:
    """`h + curve * h * h`."""
    curve = vectors.get("curve")
    return h if curve is None else h + curve * h * h


def powers(vectors: Vectors) -> Vectors:
    """`exp(log_scale)` is what the kernels scale by."""
    log_scale = vectors.get("log_scale")
    return {"scale": None if log_scale is None else log_scale.exp(), "bias": vectors.get("bias")}


CURVED = Kind("curved", (Part("curve"),), curved, "h + curve * h * h")
EXPONENTIAL = Kind(
    "exponential",
    (Part("log_scale"), affine.SHIFT),
    lambda h, vectors: affine.formula(h, powers(vectors)),
    "exp(log_scale) * h + bias",
    kernel="affine",
    operands=powers,
    fold=lambda weight, bias, vectors: affine.fold(weight, bias, powers(vectors)),
)


def register() -> None:
    for kind in (CURVED, EXPONENTIAL):
        register_kind(kind)
