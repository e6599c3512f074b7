"""The ``torch.autograd.Function`` of each public operation: what is saved, what is asked for; no arithmetic.

``apply`` takes checked arguments (see :mod:`red_kernels.functional`): activations of one shape and dtype,
``edit_ids`` int64 or None, ``seed`` an int64 tensor of one element on the device of ``x``, or None for no dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import reference
from .backends import by_name, choose

_transforms_active = torch._C._are_functorch_transforms_active
Saved = tuple[Any, ...]  # what save_for_backward was given


def apply(function: Any, *arguments: Any) -> Any:
    """``function.apply`` without torch's search for dead functorch wrappers, a third of what it costs.

    There can be such only where a function under ``vmap`` or ``grad`` let a tensor of its own escape. Not for use under
    such transforms: see :func:`plain_only`.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    base: Any = super(Function, function)
    return base.apply(*arguments)


def plain_only(*tensors: Tensor | None) -> bool:
    """Whether an operation on these has to be plain PyTorch: under ``torch.func`` and for forward-mode derivatives."""
    if _transforms_active():
        return True
    return forward_ad._current_level >= 0 and forward_mode(*tensors)


def forward_mode(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors has a tangent of an open ``torch.autograd.forward_ad.dual_level``."""
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():  # what is traced is for all tensors
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class EditFunction(Function):
    """``apply(x, scale, bias, edit_ids) -> y``; see :func:`red_kernels.edit`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, bias: Tensor | None, edit_ids: Tensor | None) -> Tensor:
        return _edit_forward(ctx, x, None, scale, bias, edit_ids, None, 0.0, (0, 1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _derivative(ctx, _edit_backward, grads)


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
        return _edit_forward(ctx, x, residual, scale, bias, edit_ids, seed, dropout_p, (0, 2, 3))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dscale, dbias, _ = _derivative(ctx, _edit_backward, grads)
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
        tensors = (x, residual, scale, bias, weight, None, edit_ids, seed)
        needs = (*ctx.needs_input_grad[:5], False)
        return _edit_norm_forward(ctx, tensors, needs, dropout_p, eps, weight_offset, False, need_z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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
        tensors = (x, residual, scale, bias, weight, norm_bias, edit_ids, seed)
        needs = ctx.needs_input_grad[:6]
        return _edit_norm_forward(ctx, tensors, needs, dropout_p, eps, 0.0, True, need_z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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
        return _norm_edit_forward(ctx, (x, weight, None, scale, bias, edit_ids), needs, eps, weight_offset, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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
        tensors = (x, weight, norm_bias, scale, bias, edit_ids)
        return _norm_edit_forward(ctx, tensors, ctx.needs_input_grad[:5], eps, 0.0, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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
        _remember(ctx, backend.NAME, 0.0, scale, bias)
        need = ctx.needs_input_grad
        ctx.linear = (weight.dtype, None if linear_bias is None else linear_bias.dtype)
        again = need[4] and backend is reference  # a second derivative needs what h was made of
        ctx.save_for_backward(
            x if need[1] or again else None,
            weight if need[0] or again else None,
            h if need[4] and not again else None,
            linear_bias if again else None,
            scale if need[0] or need[1] or need[2] else None,
            edit_ids,
        )
        return backend.edit_forward(h, residual, scale, bias, edit_ids, None, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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
        fused = getattr(choose(x, "linear_edit"), "linear_edit_forward", None)
        z = None if fused is None else fused(x, weight, linear_bias, residual, scale, bias, edit_ids)
        if z is None:
            h = F.linear(x, weight, linear_bias)
            z = choose(h, "edit").edit_forward(h, residual, scale, bias, edit_ids, None, 0.0)
        return z


def _remember(ctx: Any, backend: str, dropout_p: float, scale: Tensor | None, bias: Tensor | None) -> None:
    """What every backward needs beside its tensors. The backend by name: autograd's threads do not share the choice."""
    ctx.backend = backend
    ctx.dropout_p = dropout_p
    ctx.vectors = (None if scale is None else scale.dtype, None if bias is None else bias.dtype)
    first = scale if scale is not None else bias
    ctx.n_edits = 1 if first is None or first.dim() == 1 else first.shape[0]
    ctx.set_materialize_grads(False)


def _edit_forward(
    ctx: Any,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    edit_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    places: tuple[int, int, int],
) -> Tensor:
    backend = choose(x, "edit")
    _remember(ctx, backend.NAME, dropout_p, scale, bias)
    need = ctx.needs_input_grad
    ctx.needs = tuple(need[place] for place in places)
    ctx.save_for_backward(x if ctx.needs[1] else None, scale if ctx.needs[0] else None, edit_ids, seed)
    return backend.edit_forward(x, residual, scale, bias, edit_ids, seed, dropout_p)


def _edit_backward(ctx: Any, backend: Any, saved: Saved, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if dz is None:
        return None, None, None, None
    x, scale, edit_ids, seed = saved
    dx, dscale, dbias = _edit_grads(ctx, backend, dz, x, scale, edit_ids, seed, ctx.needs)
    return dx, dscale, dbias, None


def _edit_grads(
    ctx: Any,
    backend: Any,
    dz: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    edit_ids: Tensor | None,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    unchanged = needs[0] and scale is None and seed is None  # then dx is dz, and nothing need be written
    asked = (needs[0] and not unchanged, needs[1], needs[2])
    if any(asked):
        dx, dscale, dbias = backend.edit_backward(dz, x, scale, edit_ids, seed, ctx.dropout_p, ctx.n_edits, asked)
    else:
        dx = dscale = dbias = None
    return dz if unchanged else dx, _as(dscale, ctx.vectors[0]), _as(dbias, ctx.vectors[1])


def _edit_norm_forward(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    dropout_p: float,
    eps: float,
    weight_offset: float,
    centered: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor | None]:
    x, residual, scale, bias, weight, norm_bias, edit_ids, seed = tensors
    assert x is not None
    backend = choose(x, "edit_norm")
    _remember(ctx, backend.NAME, dropout_p, scale, bias)
    y, z, mean, rstd = backend.edit_norm_forward(
        x, residual, scale, bias, weight, norm_bias, edit_ids, seed, dropout_p, eps, weight_offset, centered, need_z
    )
    ctx.needs = needs
    ctx.eps, ctx.weight_offset = eps, weight_offset
    ctx.norm_dtypes = (None if weight is None else weight.dtype, None if norm_bias is None else norm_bias.dtype)
    if any(needs):
        recompute = not need_z  # without z, the edit is done again from what it was made of
        ctx.save_for_backward(
            z,
            x if needs[2] or recompute else None,
            residual if recompute else None,
            scale if needs[0] or recompute else None,
            bias if recompute else None,
            weight,
            edit_ids,
            seed,
            mean,
            rstd,
        )
    return y, z


def _edit_norm_backward(
    ctx: Any, backend: Any, saved: Saved, dy: Tensor | None, dz: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs
    if not any(needs):
        return None, None, None, None, None, None
    z, x, residual, scale, bias, weight, edit_ids, seed, mean, rstd = saved
    if dy is None:  # only z was used: the norm has no part in it
        if dz is None:
            return None, None, None, None, None, None
        dx, dscale, dbias = _edit_grads(ctx, backend, dz, x, scale, edit_ids, seed, (needs[0], needs[2], needs[3]))
        return dx, dz if needs[1] else None, dscale, dbias, None, None
    if torch.is_grad_enabled():  # recorded: the statistics depend on what they were taken of
        mean, rstd = reference.statistics(
            z, x, residual, scale, bias, edit_ids, seed, ctx.dropout_p, ctx.eps, mean is not None
        )
    unchanged = needs[0] and scale is None and seed is None  # dx and dresidual are one tensor: write it once
    asked = (needs[0] and not unchanged, needs[1] or unchanged, *needs[2:])
    dx, dresidual, dscale, dbias, dweight, dnorm_bias = backend.edit_norm_backward(
        dy, dz, z, x, residual, scale, bias, weight, edit_ids, seed, mean, rstd,
        ctx.dropout_p, ctx.weight_offset, ctx.n_edits, asked,
    )  # fmt: skip
    return (
        dresidual if unchanged else dx,
        dresidual if needs[1] else None,
        _as(dscale, ctx.vectors[0]),
        _as(dbias, ctx.vectors[1]),
        _as(dweight, ctx.norm_dtypes[0]),
        _as(dnorm_bias, ctx.norm_dtypes[1]),
    )


def _norm_edit_forward(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    eps: float,
    weight_offset: float,
    centered: bool,
) -> Tensor:
    x, weight, norm_bias, scale, bias, edit_ids = tensors
    assert x is not None
    backend = choose(x, "norm_edit")
    _remember(ctx, backend.NAME, 0.0, scale, bias)
    y, mean, rstd = backend.norm_edit_forward(x, weight, norm_bias, scale, bias, edit_ids, eps, weight_offset, centered)
    ctx.needs = needs
    ctx.eps, ctx.weight_offset = eps, weight_offset
    ctx.norm_dtypes = (None if weight is None else weight.dtype, None if norm_bias is None else norm_bias.dtype)
    if any(needs):
        ctx.save_for_backward(x, weight, norm_bias if needs[3] else None, scale, edit_ids, mean, rstd)
    return y


def _norm_edit_backward(ctx: Any, backend: Any, saved: Saved, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None or not any(ctx.needs):
        return None, None, None, None, None
    x, weight, norm_bias, scale, edit_ids, mean, rstd = saved
    if torch.is_grad_enabled():
        mean, rstd = reference.statistics(x, None, None, None, None, None, None, 0.0, ctx.eps, mean is not None)
    dx, dweight, dnorm_bias, dscale, dbias = backend.norm_edit_backward(
        dy, x, weight, norm_bias, scale, edit_ids, mean, rstd, ctx.weight_offset, ctx.n_edits, ctx.needs
    )
    return (
        dx,
        _as(dweight, ctx.norm_dtypes[0]),
        _as(dnorm_bias, ctx.norm_dtypes[1]),
        _as(dscale, ctx.vectors[0]),
        _as(dbias, ctx.vectors[1]),
    )


def _linear_edit_backward(ctx: Any, backend: Any, saved: Saved, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    if dz is None:
        return None, None, None, None, None, None, None
    x, weight, h, linear_bias, scale, edit_ids = saved
    need = ctx.needs_input_grad
    if need[4] and h is None:
        h = F.linear(x, weight, linear_bias)
    elif need[4] and torch.is_grad_enabled():
        raise _no_second_derivative("LinearEditFunction")
    through = need[0] or need[1] or need[2]
    dh, dscale, dbias = _edit_grads(ctx, backend, dz, h, scale, edit_ids, None, (through, need[4], need[5]))
    dx = dweight = dlinear_bias = None
    if dh is not None:
        rows = dh.reshape(-1, dh.shape[-1])
        dx = dh.matmul(weight) if need[0] else None
        dweight = rows.t().matmul(x.reshape(-1, x.shape[-1])) if need[1] else None
        dlinear_bias = rows.sum(0) if need[2] else None
    return dx, dweight, dlinear_bias, dz if need[3] else None, dscale, dbias, None


def _as(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)


def _derivative(ctx: Any, backward: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Run a backward, recorded where that can be.

    The reference's is plain PyTorch, which autograd records under ``create_graph=True``, and which takes tangents. The
    kernels' results are marked under ``create_graph=True``, so that differentiating them again says why not.
    """
    saved = ctx.saved_tensors  # once: checkpointing recomputes them, and only once
    if forward_mode(*grads, *saved):
        return backward(ctx, reference, saved, *grads)
    backend = by_name(ctx.backend)
    if backend is reference or not torch.is_grad_enabled():
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
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise _no_second_derivative(ctx.name)


def _no_second_derivative(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} has no second derivative: kernels can be differentiated once. Where a second derivative is needed, "
        "run the forward under rk.backend('reference'), or all of it with RED_KERNELS_BACKEND=reference"
    )
