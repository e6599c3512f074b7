"""Forward and backward of each pair of operations on bundles: saved tensors and requested gradients.

The only arithmetic here is the products of a linear layer's backward. ``ctx`` is the context of a
``torch.autograd.Function`` of :mod:`red_kernels.ops.autograd`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from ..backends import REFERENCE, Backend, by_name, choose, choose_backward
from ..backends.arguments import Edit, Norm, Statistics, edit_of, flat_edit
from ..backends.reference import statistics

_transforms_active = torch._C._are_functorch_transforms_active
Saved = tuple[Any, ...]  # the arguments of save_for_backward
Gradients = tuple[Tensor | None, ...]
_made: Any = tuple.__new__  # builds a NamedTuple without a Python call
FlatEdit = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def plain_only(*tensors: Tensor | None) -> bool:
    """Whether an operation on these must be plain PyTorch: under ``torch.func`` and for forward-mode derivatives."""
    if _transforms_active():
        return True
    return forward_ad._current_level >= 0 and forward_mode(*tensors)


def forward_mode(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors has a tangent of an open ``torch.autograd.forward_ad.dual_level``."""
    if forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling():  # a trace is for all tensors
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def remember(ctx: Any, backend: Backend, edit: Edit) -> FlatEdit:
    """The context of every backward beside its tensors. It stores the backend's name: autograd's threads do not share
    the choice.

    Returns the edit's tensors one by one.
    """
    ctx.backend = backend.name
    scale, bias, ids, seed, ctx.dropout_p = flat_edit(edit)
    ctx.vectors = (None if scale is None else scale.dtype, None if bias is None else bias.dtype)
    ctx.n_edits = 1
    if ids is not None:
        first = scale if scale is not None else bias
        ctx.n_edits = 1 if first is None else first.shape[0]
    ctx.set_materialize_grads(False)
    return scale, bias, ids, seed


def edit_forward(ctx: Any, x: Tensor, residual: Tensor | None, edit: Edit, needs: tuple[bool, bool, bool]) -> Tensor:
    backend = choose(x, "edit")
    scale, _, edit_ids, seed = remember(ctx, backend, edit)
    ctx.needs = needs
    ctx.save_for_backward(x if needs[1] else None, scale if needs[0] else None, edit_ids, seed)
    return backend.operations.edit_forward(x, residual, edit)


def edit_backward(ctx: Any, backend: Backend, saved: Saved, dz: Tensor | None) -> Gradients:
    if dz is None:
        return None, None, None
    x, scale, edit_ids, seed = saved
    return _edit_grads(ctx, backend, dz, x, edit_of(scale, None, edit_ids, seed, ctx.dropout_p), ctx.needs)


def _edit_grads(
    ctx: Any, backend: Backend, dz: Tensor, x: Tensor | None, edit: Edit, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    unchanged = needs[0] and _leaves(edit)  # then dx is dz, and needs no write
    asked = (needs[0] and not unchanged, needs[1], needs[2])
    dx = dscale = dbias = None
    if any(asked):
        dx, dscale, dbias = backend.operations.edit_backward(dz, x, edit, ctx.n_edits, asked)
    return dz if unchanged else dx, _as(dscale, ctx.vectors[0]), _as(dbias, ctx.vectors[1])


def _leaves(edit: Edit) -> bool:
    """Whether an edit leaves the gradient of its input unchanged."""
    return edit.dropout is None and edit.vectors["scale"] is None


def edit_norm_forward(
    ctx: Any, x: Tensor, residual: Tensor | None, edit: Edit, norm: Norm, need_z: bool, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None]:
    backend = choose(x, "edit_norm")
    scale, bias, edit_ids, seed = remember(ctx, choose_backward(x, "edit_norm", backend), edit)
    y, z, mean, rstd = backend.operations.edit_norm_forward(x, residual, edit, norm, need_z)
    remember_norm(ctx, norm, needs)
    if any(needs):
        recompute = not need_z  # without z, the backward computes the edit again from its inputs
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


def remember_norm(ctx: Any, norm: Norm, needs: tuple[bool, ...]) -> None:
    weight, bias = norm.weight, norm.bias
    ctx.norm, ctx.needs = norm[2:], needs  # the rest, without tensors
    ctx.norm_dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)


def edit_norm_backward(ctx: Any, backend: Backend, saved: Saved, dy: Tensor | None, dz: Tensor | None) -> Gradients:
    needs = ctx.needs
    if not any(needs):
        return None, None, None, None, None, None
    z, x, residual, scale, bias, weight, edit_ids, seed, mean, rstd = saved
    edit = edit_of(scale, bias, edit_ids, seed, ctx.dropout_p)
    if dy is None:  # only z was used: the norm takes no part
        if dz is None:
            return None, None, None, None, None, None
        dx, dscale, dbias = _edit_grads(ctx, backend, dz, x, edit, (needs[0], needs[2], needs[3]))
        return dx, dz if needs[1] else None, dscale, dbias, None, None
    norm, found = _made(Norm, (weight, None, *ctx.norm)), _made(Statistics, (mean, rstd))
    if torch.is_grad_enabled():  # recorded: the statistics depend on their input
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


def norm_edit_forward(ctx: Any, x: Tensor, norm: Norm, edit: Edit, needs: tuple[bool, ...]) -> Tensor:
    backend = choose(x, "norm_edit")
    scale, _, edit_ids, _ = remember(ctx, backend, edit)
    y, mean, rstd = backend.operations.norm_edit_forward(x, norm, edit)
    remember_norm(ctx, norm, needs)
    if any(needs):
        ctx.save_for_backward(x, norm.weight, norm.bias if needs[3] else None, scale, edit_ids, mean, rstd)
    return y


def norm_edit_backward(ctx: Any, backend: Backend, saved: Saved, dy: Tensor | None) -> Gradients:
    if dy is None or not any(ctx.needs):
        return None, None, None, None, None
    x, weight, norm_bias, scale, edit_ids, mean, rstd = saved
    norm, edit = _made(Norm, (weight, norm_bias, *ctx.norm)), edit_of(scale, None, edit_ids)
    found = _made(Statistics, (mean, rstd))
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


def linear_edit_backward(ctx: Any, backend: Backend, saved: Saved, dz: Tensor | None) -> Gradients:
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


def derivative(ctx: Any, backward: Any, grads: Gradients) -> Gradients:
    """Run a backward, recorded if possible.

    The reference's backward is plain PyTorch: autograd records it under ``create_graph=True``, and it takes tangents.
    The
    kernels' results are marked under ``create_graph=True``, so that differentiating them again raises a clear error.
    """
    saved = ctx.saved_tensors  # once: checkpointing recomputes them, and only once
    if forward_ad._current_level >= 0 and forward_mode(*grads, *saved):
        return backward(ctx, REFERENCE, saved, *grads)
    backend = by_name(ctx.backend)
    if backend is REFERENCE or not torch.is_grad_enabled():
        return backward(ctx, backend, saved, *grads)
    with torch.no_grad():
        found = backward(ctx, backend, saved, *grads)
    name = _public_name(ctx)
    # The mark depends on every input of the gradients, so every second derivative meets it.
    on = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
    return tuple(None if g is None else _SecondDerivative.apply(name, g.detach(), *on) for g in found)


def _public_name(ctx: Any) -> str:
    """The name of the public Function with the same result as the Function of ``ctx``."""
    name = type(ctx).__name__.removesuffix("Backward")
    if name in ("BundledEditFunction", "SumFunction"):
        return "EditAddFunction"
    if not name.startswith("Bundled") and name != "NormOfSumFunction":
        return name
    title = "LayerNorm" if ctx.norm[-1] else "RMSNorm"
    return f"{title}EditFunction" if name == "BundledNormEditFunction" else f"EditAdd{title}Function"


class _SecondDerivative(Function):
    """Passes a first gradient through; its own backward raises the error."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *on: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        raise _no_second_derivative(ctx.name)


def _no_second_derivative(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} has no second derivative: kernels can be differentiated once. For a second derivative, run the "
        "forward under rk.backend('reference'), or the process with RED_KERNELS_BACKEND=reference"
    )
