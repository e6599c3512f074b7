"""RED's edit, `scale * h + bias` (arXiv 2402.15179, eq. 1), and the edits with only one of its two vectors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .kind import FORMULAS, Dropout, Edit, Folded, Kind, Part, Vectors

SCALE = Part("scale", 1.0, key="activation_scaling", row=True)
SHIFT = Part("bias", 0.0, key="activation_bias", row=True)


def formula(h: Tensor, vectors: Vectors) -> Tensor:
    """`scale * h + bias`."""
    scale, bias = vectors.get("scale"), vectors.get("bias")
    if scale is not None:
        h = h * scale
    return h if bias is None else h + bias


def fold(weight: Tensor, bias: Tensor | None, vectors: Vectors) -> Folded:
    """`(scale * W) x + (scale * b + bias)`."""
    scale, shift = vectors.get("scale"), vectors.get("bias")
    if scale is not None:
        weight = scale[:, None] * weight
        bias = None if bias is None else scale * bias
    if shift is not None:
        bias = shift.clone() if bias is None else bias + shift
    return weight, bias


def chain(first: Vectors, second: Vectors) -> Vectors:
    """`scale2 * (scale1 * h + bias1) + bias2`, in fp32 at least."""
    scale, bias = _wide(first.get("scale")), _wide(first.get("bias"))
    next_scale, next_bias = _wide(second.get("scale")), _wide(second.get("bias"))
    if next_scale is not None:
        scale = next_scale if scale is None else next_scale * scale
        bias = None if bias is None else next_scale * bias
    if next_bias is not None:
        bias = next_bias if bias is None else bias + next_bias
    return {"scale": scale, "bias": bias}


def _wide(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.to(torch.promote_types(vector.dtype, torch.float32))


def _kind(name: str, help: str, *parts: Part) -> Kind:
    return Kind(name, parts, formula, help, kernel="affine", fold=fold, chain=chain, part_of=_part_of)


def _part_of(kind: Kind, width: int, count: int) -> Kind:
    return kind  # column by column


ALL = _kind("all", "scale * h + bias", SCALE, SHIFT)
SCALING = _kind("scaling", "scale * h", SCALE)
BIAS = _kind("bias", "h + bias", SHIFT)
# SSF (arXiv 2210.08823, sec. 3.2) has the same formula, and starts near the identity.
SSF = replace(
    ALL,
    name="ssf",
    parts=(
        replace(SCALE, draw=partial(nn.init.normal_, mean=1.0, std=0.02)),
        replace(SHIFT, draw=partial(nn.init.normal_, std=0.02)),
    ),
    help="scale * h + bias, initialised around 1 and 0 (SSF)",
    identity=False,
)


def affine_edit(
    scale: Tensor | None = None, bias: Tensor | None = None, ids: Tensor | None = None, dropout: Dropout | None = None
) -> Edit:
    """The edit `scale * h + bias` of given vectors; None is the identity."""
    # As `Edit(...)`, without a Python call: it runs in every operation.
    return _made(Edit, (ALL, {"scale": scale, "bias": bias}, ids, dropout))


_made = tuple.__new__
FORMULAS["affine"] = lambda kind: formula
