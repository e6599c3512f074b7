"""The ``torch.autograd.Function`` of each public operation: what is saved, what is asked for; no arithmetic.

``apply`` takes checked arguments one by one (see :mod:`red_kernels.ops.fused`): activations of one shape and dtype,
``edit_ids`` int64 or None, ``seed`` an int64 tensor of one element on the device of ``x``, or None for no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..backends import REFERENCE, Backend, by_name, choose
from ..backends.arguments import Edit, Norm, Statistics, edit_of, flat_edit
from ..backends.reference import statistics

_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch.compiler.is_compiling
Saved = tuple[Any, ...]  # what save_for_backward was given
Gradients = tuple[Tensor | None, ...]


def applied(function: Any) -> Callable[..., Any]:
    """``function.apply`` without torch's search for dead functorch wrappers, a third of what it costs.

    There can be such only where a function under ``vmap`` or ``grad`` let a tensor of its own escape. Not for use under
    such transforms: see :func:`plain_only`.
    """
    if _tracing():
        return function.apply
    base: Any = super(Function, function)
    return base.apply


def plain_only(*tensors: Tensor | None) -> bool:
    """Whether an operation on these has to be plain PyTorch: under ``torch.func`` and for forward-mode derivatives."""
    if _transforms_active():
        return True
    return forward_ad._current_level >= 0 and forward_mode(*tensors)


def forward_mode(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors has a tangent of an open ``torch.autograd.forward_ad.dual_level``."""
    if forward_ad._current_level < 0:
        return False
    if _tracing():  # what is traced is for all tensors
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class EditFunction(Function):
    """``apply(x, scale, bias, edit_ids) -> y``; see :func:`red_kernels.edit`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, bias: Tensor | None, edit_ids: Tensor | None) -> Tensor:
        need = ctx.needs_input_grad
        return _edit_forward(ctx, x, None, edit_of(scale, bias, edit_ids), (need[0], need[1], need[2]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *_derivative(ctx, _edit_backward, grads), None


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
        return _edit_forward(ctx, x, residual, edit, (need[0], need[2], need[3]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dx, dscale, dbias = _derivative(ctx, _edit_backward, grads)
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
        return _edit_norm_forward(ctx, x, residual, edit, norm, need_z, (*ctx.needs_input_grad[:5], False))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        found = _derivative(ctx, _edit_norm_backward, grads)
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
        return _edit_norm_forward(ctx, x, residual, edit, norm, need_z, ctx.needs_input_grad[:6])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *_derivative(ctx, _edit_norm_backward, grads), None, None, None, None, None


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
        return _norm_edit_forward(ctx, x, norm, edit_of(scale, bias, edit_ids), needs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dx, dweight, _, dscale, dbias = _derivative(ctx, _norm_edit_backward, grads)
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
        return _norm_edit_forward(ctx, x, norm, edit_of(scale, bias, edit_ids), ctx.needs_input_grad[:5])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *_derivative(ctx, _norm_edit_backward, grads), None, None


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
        _remember(ctx, backend, edit)
        need = ctx.needs_input_grad
        ctx.linear = (weight.dtype, None if linear_bias is None else linear_bias.dtype)
        again = need[4] and backend is REFERENCE  # a second derivative needs what h was made of
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
        return _derivative(ctx, _linear_edit_backward, grads)


class LinearEditInferenceFunction(Function):
    """:class:`LinearEditFunction` where no gradient is asked for: in one kernel, if the backend has one that wins.

    A Function for the sake of what goes over Functions: forward-mode derivatives and vmap say that they cannot.
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


def _remember(ctx: Any, backend: Backend, edit: Edit) -> None:
    """What every backward needs beside its tensors. The backend by name: autograd's threads do not share the choice."""
    scale, bias, _, _, ctx.dropout_p = flat_edit(edit)
    ctx.backend = backend.name
    ctx.vectors = (None if scale is None else scale.dtype, None if bias is None else bias.dtype)
    first = scale if scale is not None else bias
    ctx.n_edits = 1 if first is None or first.dim() == 1 else first.shape[0]
    ctx.set_materialize_grads(False)


def _edit_forward(ctx: Any, x: Tensor, residual: Tensor | None, edit: Edit, needs: tuple[bool, bool, bool]) -> Tensor:
    backend = choose(x, "edit")
    _remember(ctx, backend, edit)
    ctx.needs = needs
    scale, _, edit_ids, seed, _ = flat_edit(edit)
    ctx.save_for_backward(x if needs[1] else None, scale if needs[0] else None, edit_ids, seed)
    return backend.operations.edit_forward(x, residual, edit)


def _edit_backward(ctx: Any, backend: Backend, saved: Saved, dz: Tensor | None) -> Gradients:
    if dz is None:
        return None, None, None
    x, scale, edit_ids, seed = saved
    return _edit_grads(ctx, backend, dz, x, edit_of(scale, None, edit_ids, seed, ctx.dropout_p), ctx.needs)


def _edit_grads(
    ctx: Any, backend: Backend, dz: Tensor, x: Tensor | None, edit: Edit, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    unchanged = needs[0] and _leaves(edit)  # then dx is dz, and nothing need be written
    asked = (needs[0] and not unchanged, needs[1], needs[2])
    dx = dscale = dbias = None
    if any(asked):
        dx, dscale, dbias = backend.operations.edit_backward(dz, x, edit, ctx.n_edits, asked)
    return dz if unchanged else dx, _as(dscale, ctx.vectors[0]), _as(dbias, ctx.vectors[1])


def _leaves(edit: Edit) -> bool:
    """Whether an edit leaves the gradient of what it is applied to as it is."""
    return edit.dropout is None and edit.vectors["scale"] is None


def _edit_norm_forward(
    ctx: Any, x: Tensor, residual: Tensor | None, edit: Edit, norm: Norm, need_z: bool, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None]:
    backend = choose(x, "edit_norm")
    _remember(ctx, backend, edit)
    y, z, mean, rstd = backend.operations.edit_norm_forward(x, residual, edit, norm, need_z)
    _remember_norm(ctx, norm, needs)
    if any(needs):
        scale, bias, edit_ids, seed, _ = flat_edit(edit)
        recompute = not need_z  # without z, the edit is done again from what it was made of
        ctx.save_for_backward(
            z,
            x if needs[2] or recompute else None,
            residual if recompute else None,
            scale if needs[0] or recompute else None,
            bias if recompute else None,
            norm.weight,
            edit_ids,
            seed,
            mean,
            rstd,
        )
    return y, z


def _remember_norm(ctx: Any, norm: Norm, needs: tuple[bool, ...]) -> None:
    weight, bias = norm.weight, norm.bias
    ctx.norm, ctx.needs = norm[2:], needs  # what is no tensor
    ctx.norm_dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)


def _edit_norm_backward(ctx: Any, backend: Backend, saved: Saved, dy: Tensor | None, dz: Tensor | None) -> Gradients:
    needs = ctx.needs
    if not any(needs):
        return None, None, None, None, None, None
    z, x, residual, scale, bias, weight, edit_ids, seed, mean, rstd = saved
    edit = edit_of(scale, bias, edit_ids, seed, ctx.dropout_p)
    if dy is None:  # only z was used: the norm has no part in it
        if dz is None:
            return None, None, None, None, None, None
        dx, dscale, dbias = _edit_grads(ctx, backend, dz, x, edit, (needs[0], needs[2], needs[3]))
        return dx, dz if needs[1] else None, dscale, dbias, None, None
    norm, found = Norm(weight, None, *ctx.norm), Statistics(mean, rstd)
    if torch.is_grad_enabled():  # recorded: the statistics depend on what they were taken of
        found = statistics(z, x, residual, edit, norm)
    unchanged = needs[0] and _leaves(edit)  # dx and dresidual are one tensor: write it once
    asked = (needs[0] and not unchanged, needs[1] or unchanged, *needs[2:])
    dx, dresidual, dscale, dbias, dweight, dnorm_bias = backend.operations.edit_norm_backward(
        dy, dz, z, x, residual, edit, norm, found, ctx.n_edits, asked
    )
    return (
        dresidual if unchanged else dx,
        dresidual if needs[1] else None,
        _as(dscale, ctx.vectors[0]),
        _as(dbias, ctx.vectors[1]),
        _as(dweight, ctx.norm_dtypes[0]),
        _as(dnorm_bias, ctx.norm_dtypes[1]),
    )


def _norm_edit_forward(ctx: Any, x: Tensor, norm: Norm, edit: Edit, needs: tuple[bool, ...]) -> Tensor:
    backend = choose(x, "norm_edit")
    _remember(ctx, backend, edit)
    y, mean, rstd = backend.operations.norm_edit_forward(x, norm, edit)
    _remember_norm(ctx, norm, needs)
    if any(needs):
        scale = edit.vectors["scale"]
        ctx.save_for_backward(x, norm.weight, norm.bias if needs[3] else None, scale, edit.ids, mean, rstd)
    return y


def _norm_edit_backward(ctx: Any, backend: Backend, saved: Saved, dy: Tensor | None) -> Gradients:
    if dy is None or not any(ctx.needs):
        return None, None, None, None, None
    x, weight, norm_bias, scale, edit_ids, mean, rstd = saved
    norm, edit, found = Norm(weight, norm_bias, *ctx.norm), edit_of(scale, None, edit_ids), Statistics(mean, rstd)
    if torch.is_grad_enabled():
        found = statistics(x, None, None, edit, norm)
    dx, dweight, dnorm_bias, dscale, dbias = backend.operations.norm_edit_backward(
        dy, x, norm, edit, found, ctx.n_edits, ctx.needs
    )
    return (
        dx,
        _as(dweight, ctx.norm_dtypes[0]),
        _as(dnorm_bias, ctx.norm_dtypes[1]),
        _as(dscale, ctx.vectors[0]),
        _as(dbias, ctx.vectors[1]),
    )


def _linear_edit_backward(ctx: Any, backend: Backend, saved: Saved, dz: Tensor | None) -> Gradients:
    if dz is None:
        return None, None, None, None, None, None, None
    x, weight, h, linear_bias, scale, edit_ids = saved
    need = ctx.needs_input_grad
    if need[4] and h is None:
        h = F.linear(x, weight, linear_bias)
    elif need[4] and torch.is_grad_enabled():
        raise _no_second_derivative("LinearEditFunction")
    through = need[0] or need[1] or need[2]
    edit = edit_of(scale, None, edit_ids)
    dh, dscale, dbias = _edit_grads(ctx, backend, dz, h, edit, (through, need[4], need[5]))
    dx = dweight = dlinear_bias = None
    if dh is not None:
        rows = dh.reshape(-1, dh.shape[-1])
        dx = dh.matmul(weight) if need[0] else None
        dweight = rows.t().matmul(x.reshape(-1, x.shape[-1])) if need[1] else None
        dlinear_bias = rows.sum(0) if need[2] else None
    return dx, dweight, dlinear_bias, dz if need[3] else None, dscale, dbias, None


def _as(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)


def _derivative(ctx: Any, backward: Any, grads: Gradients) -> Gradients:
    """Run a backward, recorded where that can be.

    The reference's is plain PyTorch, which autograd records under ``create_graph=True``, and which takes tangents. The
    kernels' results are marked under ``create_graph=True``, so that differentiating them again says why not.
    """
    saved = ctx.saved_tensors  # once: checkpointing recomputes them, and only once
    if forward_mode(*grads, *saved):
        return backward(ctx, REFERENCE, saved, *grads)
    backend = by_name(ctx.backend)
    if backend is REFERENCE or not torch.is_grad_enabled():
        return backward(ctx, backend, saved, *grads)
    with torch.no_grad():
        found = backward(ctx, backend, saved, *grads)
    name = type(ctx).__name__.removesuffix("Backward")
    # The mark hangs on all that the gradients depend on, so that no way to a second derivative goes past it.
    on = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
    return tuple(None if g is None else _SecondDerivative.apply(name, g.detach(), *on) for g in found)


class _SecondDerivative(Function):
    """Passes a first gradient through; its own backward is the error."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *on: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        raise _no_second_derivative(ctx.name)


def _no_second_derivative(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} has no second derivative: kernels can be differentiated once. Where a second derivative is needed, "
        "run the forward under rk.backend('reference'), or all of it with RED_KERNELS_BACKEND=reference"
    )
