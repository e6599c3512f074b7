"""A sum and the norm of it, computed one after the other, with one backward pass for both.

`edit_add_norm` needs to know the norm when it adds. Where the norm is not known until it is called, `sum_of` adds and
`norm_of` normalises, to the bits of `edit_add_norm`, gradients included: the node of the norm runs first in a backward
pass, hands its gradient to the node of the sum, and that runs the fused backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import by_name, choose
from ..backends.arguments import Edit, Norm, affine_edit, flat_edit
from .autograd import direct
from .fused import of_one_dtype
from .passes import (
    Gradients,
    derivative,
    edit_backward,
    edit_forward,
    edit_norm_backward,
    remember,
    remember_norm,
)

__all__ = ["Handover", "norm_of", "sum_of"]

_BARE = affine_edit()


class Handover:
    """What a sum is made of, for the norm that may follow; and what the norm's backward hands to that of the sum.

    Attributes:
        x, residual, edit: what was added.
        keeps_sum: whether the sum is used beside its norm. Where it is not, the backward of the sum reads none.
    """

    __slots__ = ("edit", "handed", "keeps_sum", "residual", "task", "x")

    def __init__(self, x: Tensor, residual: Tensor | None, edit: Edit) -> None:
        self.x, self.residual, self.edit = x, residual, edit
        self.keeps_sum = True
        self.task = -1
        self.handed: tuple[Any, ...] = ()

    def take(self) -> tuple[Any, ...]:
        """What the norm has handed over in the backward pass that is running, once; empty for nothing."""
        handed, task = self.handed, self.task
        self.handed, self.task = (), -1
        return handed if task == torch._C._current_graph_task_id() else ()


def sum_of(x: Tensor, residual: Tensor | None, edit: Edit) -> tuple[Tensor, Handover]:
    """`residual + dropout(edit(x))`, and what `norm_of` takes. Arguments as of :func:`red_kernels.ops.fused.edit_add`."""
    if residual is not None and residual.dtype != x.dtype:
        x, residual = of_one_dtype(x, residual)
    handover = Handover(x, residual, edit)
    scale, bias, *_ = flat_edit(edit)
    return _sum(x, residual, scale, bias, handover), handover


def norm_of(z: Tensor, handover: Handover, norm: Norm) -> Tensor:
    """The norm of a sum that `sum_of` has computed."""
    return _norm(z, norm.weight, norm.bias, norm, handover)


class SumFunction(Function):
    """``apply(x, residual, scale, bias, handover) -> z``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, scale: Tensor | None, bias: Tensor | None, handover: Handover
    ) -> Tensor:
        need = ctx.needs_input_grad
        ctx.handover = handover
        return edit_forward(ctx, x, residual, handover.edit, (need[0], need[2], need[3]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        need = ctx.needs_input_grad
        handed = ctx.handover.take()
        if not handed:
            dx, dscale, dbias = derivative(ctx, edit_backward, grads)
            return dx, grads[0] if need[1] else None, dscale, dbias, None
        dy, saved, ctx.norm, ctx.norm_dtypes = handed
        asked, ctx.needs = ctx.needs, (*need[:4], False, False)
        try:
            found = edit_norm_backward(ctx, by_name(ctx.backend), saved, dy, grads[0])
        finally:
            ctx.needs = asked
        return *found[:4], None


class NormOfSumFunction(Function):
    """``apply(z, weight, norm_bias, norm, handover) -> y``."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor | None, norm_bias: Tensor | None, norm: Norm, handover: Handover
    ) -> Tensor:
        x, residual, edit = handover.x, handover.residual, handover.edit
        backend = choose(x, "edit_norm")
        scale, bias, ids, seed = remember(ctx, backend, edit)
        y, _, mean, rstd = backend.operations.edit_norm_forward(x, residual, edit, norm, False)
        need = ctx.needs_input_grad
        remember_norm(ctx, norm, (need[0], False, False, False, need[1], need[2]))
        if any(need):
            ctx.handover = handover
            ctx.save_for_backward(z, x, residual, scale, bias, weight, ids, seed, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dy = grads[0]
        if dy is None:
            return None, None, None, None, None
        if torch.is_grad_enabled() or not ctx.needs_input_grad[0]:  # recorded: each node by itself
            dz, dweight, dbias = derivative(ctx, _norm_backward, grads)
            return dz, dweight, dbias, None, None
        saved, handover = ctx.saved_tensors, ctx.handover
        z, x, residual, scale, bias, weight, ids, seed, mean, rstd = saved
        if handover.keeps_sum:
            residual = bias = None
        else:
            z = None
        handover.task = torch._C._current_graph_task_id()
        handover.handed = (
            dy, (z, x, residual, scale, bias, weight, ids, seed, mean, rstd), ctx.norm, ctx.norm_dtypes,
        )  # fmt: skip
        dweight = dbias = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            _, dweight, dbias = _norm_backward(ctx, by_name(ctx.backend), saved, dy, through=False)
        return None, dweight, dbias, None, None


def _norm_backward(ctx: Any, backend: Any, saved: tuple[Any, ...], dy: Tensor, through: bool = True) -> Gradients:
    """The gradients of the sum and of the norm's parameters, where the sum's are not asked for together with them."""
    z, *_, weight, _, _, mean, rstd = saved
    asked, ctx.needs = ctx.needs, (ctx.needs[0] and through, *ctx.needs[1:])
    dtypes, ctx.vectors, p, ctx.dropout_p = ctx.vectors, (None, None), ctx.dropout_p, 0.0
    try:
        found = edit_norm_backward(ctx, backend, (z, None, None, None, None, weight, None, None, mean, rstd), dy, None)
    finally:
        ctx.needs, ctx.vectors, ctx.dropout_p = asked, dtypes, p
    return found[0], found[4], found[5]


_sum, _norm = map(direct, (SumFunction, NormOfSumFunction))
