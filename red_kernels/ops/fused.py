"""The operations on bundles, whose arguments nobody checks: for those who have proved that they fit.

``x`` and ``residual`` are dense floating activations ``(..., d)``; the vectors of ``own``, the edit, and of ``norm``
fit them, and the ids are int64 and in range. The edit's kind has the kernel "affine": ``scale * h + bias``. The
operations that check are those of :mod:`red_kernels.ops.functional`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference
from ..backends.arguments import Dropout, Edit, Norm, flat_edit, operands_of
from . import checks
from .autograd import (
    EditAddFunction,
    EditAddLayerNormFunction,
    EditAddRMSNormFunction,
    EditFunction,
    LayerNormEditFunction,
    RMSNormEditFunction,
    applied,
    plain_only,
)

__all__ = ["drawn_dropout", "edit", "edit_add", "edit_add_norm", "norm_edit"]


def edit(x: Tensor, own: Edit) -> Tensor:
    """The edit of ``x``, without a dropout."""
    own = operands_of(own)
    scale, bias, ids, _, _ = flat_edit(own)
    if plain_only(x, scale, bias):
        return reference.edit_forward(x, None, own)
    return applied(EditFunction)(x, scale, bias, ids)


def edit_add(x: Tensor, residual: Tensor | None, own: Edit) -> Tensor:
    """``residual + dropout(edit(x))``."""
    x, residual, own = *_of_one_dtype(x, residual), operands_of(own)
    edits = flat_edit(own)
    if plain_only(x, residual, edits[0], edits[1]):
        return reference.edit_forward(x, residual, own)
    return applied(EditAddFunction)(x, residual, *edits)


def edit_add_norm(
    x: Tensor, residual: Tensor | None, own: Edit, norm: Norm, need_z: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``z = residual + dropout(edit(x))`` and ``y = norm(z)``, as ``(y, z)``; ``z`` is None with ``need_z=False``."""
    x, residual, own = *_of_one_dtype(x, residual), operands_of(own)
    scale, bias, *rest = flat_edit(own)
    weight, norm_bias, eps, offset, centered = norm
    if plain_only(x, residual, scale, bias, weight, norm_bias):
        return reference.edit_norm_forward(x, residual, own, norm, need_z)[:2]
    if centered:
        function = applied(EditAddLayerNormFunction)
        return function(x, residual, scale, bias, weight, norm_bias, *rest, eps, need_z)
    function = applied(EditAddRMSNormFunction)
    return function(x, residual, scale, bias, weight, *rest, eps, offset, need_z)


def norm_edit(x: Tensor, norm: Norm, own: Edit) -> Tensor:
    """``edit(norm(x))``, without a dropout."""
    own = operands_of(own)
    scale, bias, ids, _, _ = flat_edit(own)
    weight, norm_bias, eps, offset, centered = norm
    if plain_only(x, weight, norm_bias, scale, bias):
        return reference.norm_edit_forward(x, norm, own)[0]
    if centered:
        return applied(LayerNormEditFunction)(x, weight, norm_bias, scale, bias, ids, eps)
    return applied(RMSNormEditFunction)(x, weight, scale, bias, ids, eps, offset)


def drawn_dropout(p: float, training: bool, like: Tensor) -> Dropout | None:
    """A dropout whose seed is drawn from torch's generator of the device of ``like``; None for none.

    So a recomputation under activation checkpointing, which restores the generator, drops the same elements. Raises
    ValueError for what is no probability.
    """
    if not training or p == 0.0:
        return None
    checks.dropout(p)
    return Dropout(p, torch.randint(0, 2**62, (1,), dtype=torch.int64, device=like.device))


def _of_one_dtype(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if residual is None or residual.dtype == x.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)
