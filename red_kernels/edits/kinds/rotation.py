"""RoAd: pairs of columns are rotated and scaled (arXiv 2409.00119, eq. 2 and 3, in the layout of PEFT's `road`)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import mixes
from .kind import Family, Folded, Kind, Part, Vectors

VARIANTS = (1, 2, 4)


def rotated(vectors: Vectors, variant: int) -> Vectors:
    """`first = alpha * cos(theta)` and `second = -+alpha * sin(theta)`, as wide as the output.

    Variant 1 has one angle and one size for each pair, variant 2 for each column. Variant 4 has separate ones for sine
    and cosine. In a group of 64 columns, column j < 32 and column j + 32 are a pair.
    """
    theta, alpha = vectors.get("theta"), vectors.get("alpha")
    assert theta is not None
    assert alpha is not None
    if variant == 1:
        theta, alpha = (
            each.unflatten(-1, (-1, 1, mixes.PAIR)).expand(*each.shape[:-1], -1, 2, -1) for each in (theta, alpha)
        )
        theta_of_sine, alpha_of_sine = theta, alpha
    elif variant == 2:
        theta, alpha = (each.unflatten(-1, (-1, 2, mixes.PAIR)) for each in (theta, alpha))
        theta_of_sine, alpha_of_sine = theta, alpha
    else:
        both = [each.unflatten(-1, (-1, 2, 2, mixes.PAIR)) for each in (theta, alpha)]
        theta, alpha = (each.select(-3, 0) for each in both)
        theta_of_sine, alpha_of_sine = (each.select(-3, 1) for each in both)
    first, second = alpha * theta.cos(), alpha_of_sine * theta_of_sine.sin()
    low, high = second.unbind(-2)
    return {"first": first.flatten(-3), "second": torch.stack((-low, high), -2).flatten(-3)}


def formula(h: Tensor, vectors: Vectors, variant: int) -> Tensor:
    """`alpha cos(theta) h -+ alpha sin(theta) h'`, where `h'` contains the partner of each column."""
    return mixes.formula(h, rotated(vectors, variant), 0)


def fold(weight: Tensor, bias: Tensor | None, vectors: Vectors, variant: int) -> Folded:
    """The rotation of each column of the weight, and of the bias."""
    made = rotated(vectors, variant)
    turned = mixes.formula(weight.t(), made, 0).t()
    return turned, None if bias is None else mixes.formula(bias, made, 0)


def fits(width: int) -> str | None:
    """Why outputs of this width cannot be rotated, or None."""
    return f"needs a multiple of {mixes.GROUP}" if width % mixes.GROUP else None


def part_of(kind: Kind, width: int, count: int) -> Kind:
    """A rotation, if each of `count` processes has whole groups. Raises ValueError otherwise."""
    if width % (count * mixes.GROUP):
        raise ValueError(f"turns groups of {mixes.GROUP} columns, which {count} processes cannot share evenly")
    return kind


def kind(variant: int) -> Kind:
    """The kind of a variant. Raises ValueError for an unknown one."""
    if variant not in VARIANTS:
        raise ValueError(f"kind: got 'rotation:{variant}', expected one of the variants 1, 2 and 4")

    def shape(width: int) -> tuple[int, ...]:
        return (variant * width // 2,)

    return Kind(
        "rotation" if variant == 1 else f"rotation:{variant}",
        (Part("theta", 0.0, shape), Part("alpha", 1.0, shape)),
        partial(formula, variant=variant),
        "alpha cos(theta) h + alpha sin(theta) h', with pairs of columns h, h' (RoAd)",
        kernel="mix",
        operands=partial(rotated, variant=variant),
        fold=partial(fold, variant=variant),
        fits=fits,
        family="rotation",
        part_of=part_of,
    )


ROTATION = Family(kind, 1, "the variant 1, 2 or 4: parameters for each pair, for each column, or for sine and cosine")
