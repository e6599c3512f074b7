"""The public operations, with their shapes and checks. Their ``torch.autograd.Function`` classes are public too.

Every operation takes activations of shape ``(..., d)`` in float32, bfloat16, float16 (or float64, in plain PyTorch).
The vectors ``scale`` and ``bias`` have shape ``(d,)`` in any of these dtypes. With ``edit_ids``, integers of shape
``x.shape[:-1]``, they have shape ``(n, d)``, and each row uses its own edit. Each of ``scale``, ``bias``,
``residual``, ``weight`` and ``norm_bias`` may be None. Arithmetic is in fp32 (fp64 for fp64). Results are rounded once,
to the dtype of ``x`` (of ``x + residual`` if these differ). Gradients are computed only for inputs that require them.

Derivatives: a kernel has one; differentiating it again raises RuntimeError. Under ``rk.backend("reference")``, and for
float64, every operation has derivatives of any order. Forward-mode derivatives (``torch.func.jvp``,
``torch.autograd.forward_ad``) and the other transforms of ``torch.func`` run in plain PyTorch on every backend.

Errors: TypeError if a tensor is not dense and floating-point or a number is not real. ValueError for shapes, devices
and numbers out of range. IndexError for ``edit_ids`` out of range. RuntimeError if the chosen backend is missing.

Source: RED, arXiv 2402.15179.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.arguments import Edit, Norm, affine_edit
from . import checks, fused
from .autograd import (
    EditAddFunction,
    EditAddLayerNormFunction,
    EditAddRMSNormFunction,
    EditFunction,
    LayerNormEditFunction,
    LinearEditFunction,
    LinearEditInferenceFunction,
    RMSNormEditFunction,
    direct,
)
from .passes import plain_only

__all__ = [
    "EditAddFunction",
    "EditAddLayerNormFunction",
    "EditAddRMSNormFunction",
    "EditFunction",
    "LayerNormEditFunction",
    "LinearEditFunction",
    "RMSNormEditFunction",
    "edit",
    "edit_add",
    "edit_add_layer_norm",
    "edit_add_rms_norm",
    "layer_norm_edit",
    "linear_edit",
    "rms_norm_edit",
]


def edit(
    x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, edit_ids: Tensor | None = None
) -> Tensor:
    """RED's edit, ``scale * x + bias`` at every row (RED eq. 1).

    Returns a tensor of the shape and dtype of ``x``. Errors: see the module.
    """
    return fused.edit(x, _edit(x, scale, bias, edit_ids))


def edit_add(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    edit_ids: Tensor | None = None,
) -> Tensor:
    """The edit and the residual add behind it: ``residual + dropout(scale * x + bias)``.

    Dropout applies only if ``training``. A seed drawn from torch's generator determines its mask, so a recomputation
    under activation checkpointing drops the same elements. Errors: see the module.
    """
    own = _edit_in_sum(x, residual, scale, bias, edit_ids, dropout_p, training)
    return fused.edit_add(x, residual, own)


def edit_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    training: bool = False,
    edit_ids: Tensor | None = None,
    need_z: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Edit, residual add and the next sublayer's RMSNorm in one pass.

    Returns ``(y, z)``: ``z = residual + dropout(scale * x + bias)`` and ``y = z / rms(z) * (weight_offset + weight)``
    with ``rms(z) = sqrt(mean(z**2) + eps)``. ``weight_offset=1`` is for norms that store ``weight - 1``. With
    ``need_z=False``, ``z`` is None and is not written; ``y`` is the same. Errors: see the module.
    """
    norm = Norm(weight, None, eps, weight_offset)
    own = _edit_in_sum(x, residual, scale, bias, edit_ids, dropout_p, training, norm)
    return fused.edit_add_norm(x, residual, own, norm, need_z)


def edit_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    edit_ids: Tensor | None = None,
    need_z: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Edit, residual add and LayerNorm in one pass.

    Returns ``(y, z)``: ``z = residual + dropout(scale * x + bias)`` and ``y = LayerNorm(z)`` with ``weight`` and
    ``norm_bias`` of shape ``(d,)``. Post-norm models never read ``z``: with ``need_z=False`` it is None, and is neither
    written nor rounded before the norm. Errors: see the module.
    """
    norm = Norm(weight, norm_bias, eps, 0.0, True)
    own = _edit_in_sum(x, residual, scale, bias, edit_ids, dropout_p, training, norm)
    return fused.edit_add_norm(x, residual, own, norm, need_z)


def rms_norm_edit(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    edit_ids: Tensor | None = None,
) -> Tensor:
    """An edit behind an RMSNorm: ``scale * RMSNorm(x) + bias``, with the shape of ``x``. Errors: see the module."""
    own = _edit(x, scale, bias, edit_ids)
    norm = Norm(weight, None, eps, weight_offset)
    checks.norm(norm, x)
    return fused.norm_edit(x, norm, own)


def layer_norm_edit(
    x: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    edit_ids: Tensor | None = None,
) -> Tensor:
    """An edit behind a LayerNorm (RED's ``res`` position in a post-norm model): ``scale * LayerNorm(x) + bias``.

    Returns a tensor of the shape and dtype of ``x``. Errors: see the module.
    """
    own = _edit(x, scale, bias, edit_ids)
    norm = Norm(weight, norm_bias, eps, 0.0, True)
    checks.norm(norm, x)
    return fused.norm_edit(x, norm, own)


def linear_edit(
    x: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    edit_ids: Tensor | None = None,
) -> Tensor:
    """``residual + scale * (x @ weight.T + linear_bias) + bias``.

    ``x`` is ``(..., k)``, ``weight`` ``(d, k)``, ``linear_bias`` ``(d,)`` and ``residual`` ``(..., d)``. It is composed
    of torch's own matrix product and :func:`edit_add`; under autocast the product runs in the autocast dtype. Without
    gradients a backend may compute all of it in one kernel, which does not round the product in between.
    Errors: see the module.
    """
    checks.activation(x)
    checks.activation(weight, "weight")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (d, {x.shape[-1]}), the width of x, with d >= 1"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, expected the device of x, {x.device}")
    output = x.new_empty(1).expand(*x.shape[:-1], weight.shape[0])  # the shape for the checks of the rest
    checks.norm_vector(linear_bias, output, "linear_bias")
    checks.edit_vectors(output, scale, bias, edit_ids)
    if residual is not None:
        checks.same_shape(residual, output, "residual")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    else:
        for name, tensor in (("weight", weight), ("linear_bias", linear_bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype}, expected that of x, {x.dtype}")
    own = affine_edit(scale, bias, _ids(edit_ids))
    tensors = (x, weight, linear_bias, residual, scale, bias)
    if plain_only(*tensors) or (residual is not None and residual.dtype != x.dtype):
        return fused.edit_add(F.linear(x, weight, linear_bias), residual, own)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if torch.compiler.is_compiling():
        return LinearEditFunction.apply(*tensors, own.ids)
    return direct(LinearEditFunction if recorded else LinearEditInferenceFunction)(*tensors, own.ids)


def _ids(edit_ids: Tensor | None) -> Tensor | None:
    return edit_ids if edit_ids is None else edit_ids.to(torch.int64)


def _edit(x: Tensor, scale: Tensor | None, bias: Tensor | None, edit_ids: Tensor | None) -> Edit:
    """Check an activation and its edit."""
    checks.activation(x)
    checks.edit_vectors(x, scale, bias, edit_ids)
    return affine_edit(scale, bias, _ids(edit_ids))


def _edit_in_sum(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    edit_ids: Tensor | None,
    dropout_p: float,
    training: bool,
    norm: Norm | None = None,
) -> Edit:
    """Check the arguments that operations with a residual share; draw the dropout seed after the last check."""
    checks.activation(x)
    checks.edit_vectors(x, scale, bias, edit_ids)
    if residual is not None:
        checks.same_shape(residual, x, "residual")
    checks.dropout(dropout_p)
    if norm is not None:
        checks.norm(norm, x)
    return affine_edit(scale, bias, _ids(edit_ids), fused.drawn_dropout(dropout_p, training, x))
