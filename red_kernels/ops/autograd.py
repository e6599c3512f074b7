"""The ``torch.autograd.Function`` of each public operation, and those that take bundles.

``apply`` of the public ones takes checked arguments one by one (see :mod:`red_kernels.ops.fused`). Activations have
one shape and dtype. ``edit_ids`` is int64 or None. ``seed`` is an int64 tensor of one element on the device of ``x``,
or None for no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from ..backends import REFERENCE, choose
from ..backends.arguments import Edit, Norm, edit_of
from .passes import (
    Gradients,
    derivative,
    edit_backward,
    edit_forward,
    edit_norm_backward,
    edit_norm_forward,
    linear_edit_backward,
    norm_edit_backward,
    norm_edit_forward,
    remember,
)


class EditFunction(Function):
    """``apply(x, scale, bias, edit_ids) -> y``; see :func:`red_kernels.edit`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, bias: Tensor | None, edit_ids: Tensor | None) -> Tensor:
        need = ctx.needs_input_grad
        return edit_forward(ctx, x, None, edit_of(scale, bias, edit_ids), (need[0], need[1], need[2]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *derivative(ctx, edit_backward, grads), None


class EditAddFunction(Function):
    """``apply(x, residual, scale, bias, edit_ids, seed, dropout_p) -> z``; see :func:`red_kernels.edit_add`.

    ``seed`` is an int64 tensor of one element on the device of ``x``, or None for no dropout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        edit_ids: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        need = ctx.needs_input_grad
        edit = edit_of(scale, bias, edit_ids, seed, dropout_p)
        return edit_forward(ctx, x, residual, edit, (need[0], need[2], need[3]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dx, dscale, dbias = derivative(ctx, edit_backward, grads)
        return dx, grads[0] if ctx.needs_input_grad[1] else None, dscale, dbias, None, None, None


class EditAddRMSNormFunction(Function):
    """``apply(x, residual, scale, bias, weight, edit_ids, seed, dropout_p, eps, weight_offset, need_z) -> (y, z)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | None,
        edit_ids: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        eps: float,
        weight_offset: float,
        need_z: bool,
    ) -> tuple[Tensor, Tensor | None]:
        edit = edit_of(scale, bias, edit_ids, seed, dropout_p)
        norm = Norm(weight, None, eps, weight_offset)
        return edit_norm_forward(ctx, x, residual, edit, norm, need_z, (*ctx.needs_input_grad[:5], False))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        found = derivative(ctx, edit_norm_backward, grads)
        return *found[:5], None, None, None, None, None, None


class EditAddLayerNormFunction(Function):
    """``apply(x, residual, scale, bias, weight, norm_bias, edit_ids, seed, dropout_p, eps, need_z) -> (y, z)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | None,
        norm_bias: Tensor | None,
        edit_ids: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        eps: float,
        need_z: bool,
    ) -> tuple[Tensor, Tensor | None]:
        edit = edit_of(scale, bias, edit_ids, seed, dropout_p)
        norm = Norm(weight, norm_bias, eps, 0.0, True)
        return edit_norm_forward(ctx, x, residual, edit, norm, need_z, ctx.needs_input_grad[:6])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *derivative(ctx, edit_norm_backward, grads), None, None, None, None, None


class RMSNormEditFunction(Function):
    """``apply(x, weight, scale, bias, edit_ids, eps, weight_offset) -> y``; see :func:`red_kernels.rms_norm_edit`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        edit_ids: Tensor | None,
        eps: float,
        weight_offset: float,
    ) -> Tensor:
        need = ctx.needs_input_grad
        needs = (need[0], need[1], False, need[2], need[3])
        norm = Norm(weight, None, eps, weight_offset)
        return norm_edit_forward(ctx, x, norm, edit_of(scale, bias, edit_ids), needs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dx, dweight, _, dscale, dbias = derivative(ctx, norm_edit_backward, grads)
        return dx, dweight, dscale, dbias, None, None, None


class LayerNormEditFunction(Function):
    """``apply(x, weight, norm_bias, scale, bias, edit_ids, eps) -> y``; see :func:`red_kernels.layer_norm_edit`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        norm_bias: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        edit_ids: Tensor | None,
        eps: float,
    ) -> Tensor:
        norm = Norm(weight, norm_bias, eps, 0.0, True)
        return norm_edit_forward(ctx, x, norm, edit_of(scale, bias, edit_ids), ctx.needs_input_grad[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *derivative(ctx, norm_edit_backward, grads), None, None


class LinearEditFunction(Function):
    """``apply(x, weight, linear_bias, residual, scale, bias, edit_ids) -> z``; see :func:`red_kernels.linear_edit`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        linear_bias: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        edit_ids: Tensor | None,
    ) -> Tensor:
        h = F.linear(x, weight, linear_bias)
        backend = choose(h, "edit")
        edit = edit_of(scale, bias, edit_ids)
        remember(ctx, backend, edit)
        need = ctx.needs_input_grad
        ctx.linear = (weight.dtype, None if linear_bias is None else linear_bias.dtype)
        again = need[4] and backend is REFERENCE  # a second derivative needs the input of h
        ctx.save_for_backward(
            x if need[1] or again else None,
            weight if need[0] or again else None,
            h if need[4] and not again else None,
            linear_bias if again else None,
            scale if need[0] or need[1] or need[2] else None,
            edit_ids,
        )
        return backend.operations.edit_forward(h, residual, edit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return derivative(ctx, linear_edit_backward, grads)


class LinearEditInferenceFunction(Function):
    """:class:`LinearEditFunction` without gradients: one kernel, if the backend has one that wins.

    It is a Function, so that vmap and forward-mode AD raise a clear error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        linear_bias: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        edit_ids: Tensor | None,
    ) -> Tensor:
        edit = edit_of(scale, bias, edit_ids)
        fused = getattr(choose(x, "linear_edit").operations, "linear_edit_forward", None)
        z = None if fused is None else fused(x, weight, linear_bias, residual, edit)
        if z is None:
            h = F.linear(x, weight, linear_bias)
            z = choose(h, "edit").operations.edit_forward(h, residual, edit)
        return z


class BundledEditFunction(Function):
    """``apply(x, residual, scale, bias, edit) -> z``: the inputs with gradients, and the edit of these vectors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, scale: Tensor | None, bias: Tensor | None, edit: Edit
    ) -> Tensor:
        need = ctx.needs_input_grad
        return edit_forward(ctx, x, residual, edit, (need[0], need[2], need[3]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dx, dscale, dbias = derivative(ctx, edit_backward, grads)
        return dx, grads[0] if ctx.needs_input_grad[1] else None, dscale, dbias, None


class BundledEditNormFunction(Function):
    """``apply(x, residual, scale, bias, weight, norm_bias, edit, norm, need_z) -> (y, z)``.

    ``edit`` and ``norm`` contain the vectors before them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | None,
        norm_bias: Tensor | None,
        edit: Edit,
        norm: Norm,
        need_z: bool,
    ) -> tuple[Tensor, Tensor | None]:
        return edit_norm_forward(ctx, x, residual, edit, norm, need_z, ctx.needs_input_grad[:6])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *derivative(ctx, edit_norm_backward, grads), None, None, None


class BundledNormEditFunction(Function):
    """``apply(x, weight, norm_bias, scale, bias, norm, edit) -> y``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        norm_bias: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        edit: Edit,
    ) -> Tensor:
        return norm_edit_forward(ctx, x, norm, edit, ctx.needs_input_grad[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *derivative(ctx, norm_edit_backward, grads), None, None


def direct(function: Any) -> Callable[..., Any]:
    """``function.apply`` without torch's search for dead functorch wrappers, a third of its cost.

    Dead wrappers exist only if a tensor escaped from ``vmap`` or ``grad``. Not for use under these transforms (see
    :func:`red_kernels.ops.passes.plain_only`), nor while torch.compile traces.
    """
    base: Any = super(Function, function)
    return base.apply
