"""The operations on bundles, without checks, for callers that have checked the arguments.

``x`` and ``residual`` are dense floating-point activations ``(..., d)``. The vectors of ``own``, the edit, and of
``norm`` fit them. The ids are int64 and in range. The edit's vectors are the operands of the kernel "affine",
``scale`` and ``bias``, or of "mix" (:func:`red_kernels.backends.arguments.operands_of`). The operations with checks
are those of :mod:`red_kernels.ops.functional` and :mod:`red_kernels.ops.mixing`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, reference
from ..backends.arguments import Edit, Norm, affine_edit, flat_edit, mix_of_edit
from .ambient import PLAIN, TANGENTS, ambient
from .autograd import (
    BundledEditFunction,
    BundledEditNormFunction,
    BundledNormEditFunction,
    EditAddFunction,
    EditAddLayerNormFunction,
    EditAddRMSNormFunction,
    EditFunction,
    LayerNormEditFunction,
    RMSNormEditFunction,
    direct,
)
from .inputs import drawn_dropout, of_one_dtype
from .mixing import mixed, mixed_norm
from .passes import plain_only

__all__ = ["drawn_dropout", "edit", "edit_add", "edit_add_norm", "norm_edit", "of_one_dtype"]

_BARE = affine_edit()
# For untraced calls: a tracer does not see tensors inside a tuple and takes them for constants.
_edit, _edit_norm, _norm_edit = map(direct, (BundledEditFunction, BundledEditNormFunction, BundledNormEditFunction))


def edit(x: Tensor, own: Edit) -> Tensor:
    """The edit of ``x``, without dropout."""
    if own.kind.kernel == "mix":
        return mixed(x, None, mix_of_edit(own))
    fused = _nodes(x, "edit")
    if fused is not None:
        return fused.edit(x, None, own)
    scale, bias, ids, _, _ = flat_edit(own)
    if plain_only(x, scale, bias):
        return reference.edit_forward(x, None, own)
    if _traced():
        return EditFunction.apply(x, scale, bias, ids)
    return _edit(x, None, scale, bias, own)


def edit_add(x: Tensor, residual: Tensor | None, own: Edit) -> Tensor:
    """``residual + dropout(edit(x))``."""
    if own.kind.kernel == "mix":
        return mixed(x, residual, mix_of_edit(own))
    if residual is not None and residual.dtype != x.dtype:
        x, residual = of_one_dtype(x, residual)
    fused = _nodes(x, "edit")
    if fused is not None:
        return fused.edit(x, residual, own)
    scale, bias, *rest = flat_edit(own)
    if plain_only(x, residual, scale, bias):
        return reference.edit_forward(x, residual, own)
    if _traced():
        return EditAddFunction.apply(x, residual, scale, bias, *rest)
    return _edit(x, residual, scale, bias, own)


def edit_add_norm(
    x: Tensor, residual: Tensor | None, own: Edit, norm: Norm, need_z: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``z = residual + dropout(edit(x))`` and ``y = norm(z)``, as ``(y, z)``; ``z`` is None with ``need_z=False``."""
    if own.kind.kernel == "mix":
        return mixed_norm(x, residual, mix_of_edit(own), norm)
    if residual is not None and residual.dtype != x.dtype:
        x, residual = of_one_dtype(x, residual)
    fused = _nodes(x, "edit_norm")
    if fused is not None:
        return fused.edit_norm(x, residual, own, norm, need_z)
    scale, bias, ids, seed, p = flat_edit(own)
    weight, norm_bias, eps, offset, centered = norm
    if plain_only(x, residual, scale, bias, weight, norm_bias):
        return reference.edit_norm_forward(x, residual, own, norm, need_z)[:2]
    if not _traced():
        return _edit_norm(x, residual, scale, bias, weight, norm_bias, own, norm, need_z)
    if centered:
        return EditAddLayerNormFunction.apply(x, residual, scale, bias, weight, norm_bias, ids, seed, p, eps, need_z)
    return EditAddRMSNormFunction.apply(x, residual, scale, bias, weight, ids, seed, p, eps, offset, need_z)


def norm_edit(x: Tensor, norm: Norm, own: Edit) -> Tensor:
    """``edit(norm(x))``, without dropout; mixes take two passes."""
    if own.kind.kernel == "mix":
        return edit(edit_add_norm(x, None, _BARE, norm, False)[0], own)
    fused = _nodes(x, "norm_edit")
    if fused is not None:
        return fused.norm_edit(x, norm, own)
    scale, bias, ids, _, _ = flat_edit(own)
    weight, norm_bias, eps, offset, centered = norm
    if plain_only(x, weight, norm_bias, scale, bias):
        return reference.norm_edit_forward(x, norm, own)[0]
    if not _traced():
        return _norm_edit(x, weight, norm_bias, scale, bias, norm, own)
    if centered:
        return LayerNormEditFunction.apply(x, weight, norm_bias, scale, bias, ids, eps)
    return RMSNormEditFunction.apply(x, weight, scale, bias, ids, eps, offset)


def _nodes(x: Tensor, operation: str) -> Any:
    """The C++ nodes of the backend for ``x``; None if it has none, or if Python has to run the operation."""
    if torch.compiler.is_compiling() or ambient() & (PLAIN + TANGENTS):
        return None
    return choose(x, operation).nodes


def _traced() -> bool:
    """Whether torch.compile or torch.jit.trace is tracing."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
