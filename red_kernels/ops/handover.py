"""A sum and its norm as two nodes of autograd, with one forward and one backward pass for both.

`sum_of` computes the sum, and in the same pass its norm if that is known; `norm_of` returns the norm. A norm that is
not known until its call is computed then, to the same bits. In a backward pass the node of the norm runs first. It
hands its gradient to the node of the sum, which runs the fused backward. It does so only if nobody can request the
gradient of the sum itself. Otherwise each node computes its own part.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import by_name, choose, choose_backward
from ..backends.arguments import Edit, Norm, affine_edit, flat_edit, mix_of_edit
from .autograd import direct
from .inputs import of_one_dtype
from .mixing import mix_backward, mix_forward, mix_norm_backward, mix_norm_of_sum
from .passes import (
    Gradients,
    derivative,
    edit_backward,
    edit_forward,
    edit_norm_backward,
    remember,
    remember_norm,
)

__all__ = ["Handover", "norm_backward", "norm_of", "sum_of"]

_BARE = affine_edit()


class Handover:
    """The values that the forward of a sum passes to that of its norm, and the norm's backward to the sum's.

    Attributes:
        edit, norm: of the sum; and of the norm, if it is known.
        normed: the norm's result: the value and the statistics of the rows.
        total: the sum.
        nodes: of the sum's backend, which has made its node in C++. C++ does all of this then, and `value` is the
            norm's.
    """

    __slots__ = ("edit", "handed", "nodes", "norm", "normed", "total", "value")

    def __init__(self, edit: Edit, norm: Norm | None, nodes: Any = None, value: Tensor | None = None) -> None:
        self.edit, self.norm, self.nodes, self.value = edit, norm, nodes, value
        self.normed: tuple[Tensor, Tensor | None, Tensor] | None = None
        self.total: weakref.ref[Tensor] | None = None
        self.handed: dict[int, tuple[Any, ...]] = {}  # keyed by the backward pass: several threads may run one

    def take(self) -> tuple[Any, ...]:
        """The norm's gradients from the running backward pass, once; empty if there are none."""
        return self.handed.pop(torch._C._current_graph_task_id(), ())

    def may_hand_over(self) -> bool:
        """Whether the running backward pass returns nobody the gradient of the sum.

        A pass for given tensors may include the sum; a pass for all leaves reaches this module's leaf.
        """
        total = None if self.total is None else self.total()
        if total is not None and (total.retains_grad or total._backward_hooks is not None):
            return False
        if torch._C._current_graph_task_id() in self.handed:  # from another norm
            return False
        return bool(torch._C._will_engine_execute_node(_leaf_node()))


@functools.cache
def _leaf() -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), requires_grad=True)


@functools.cache
def _leaf_node() -> Any:
    with torch.enable_grad(), torch.inference_mode(False):
        return torch.autograd.graph.get_gradient_edge(_leaf()).node


def sum_of(x: Tensor, residual: Tensor | None, edit: Edit, norm: Norm | None = None) -> tuple[Tensor, Handover]:
    """`residual + dropout(edit(x))`, and the argument of `norm_of`, which may contain the norm already.

    Arguments as in :func:`red_kernels.ops.fused.edit_add_norm`.
    """
    if residual is not None and residual.dtype != x.dtype:
        x, residual = of_one_dtype(x, residual)
    nodes = choose(x, "edit_norm").nodes
    if nodes is not None and edit.kind.kernel == "affine":
        if norm is None:
            return nodes.edit(x, residual, edit), Handover(edit, norm, nodes)
        z, y = nodes.sum_norm(x, residual, edit, norm)
        return z, Handover(edit, norm, nodes, y)
    handover = Handover(edit, norm)
    mixed = edit.kind.kernel == "mix"
    vectors = mix_of_edit(edit)[:3] if mixed else flat_edit(edit)[:2]
    leaf = None  # it must not be the only input that requires gradients
    if any(tensor is not None and tensor.requires_grad for tensor in (x, residual, *vectors)):
        _leaf_node()
        leaf = _leaf()
    z = (_mixed_sum if mixed else _sum)(x, residual, *vectors, leaf, handover)
    handover.total = weakref.ref(z)
    return z, handover


def norm_of(z: Tensor, handover: Handover, norm: Norm) -> Tensor:
    """The norm of a sum that `sum_of` has computed."""
    if handover.nodes is None:
        return _norm(z, norm.weight, norm.bias, norm, handover)
    value, handover.value = handover.value, None
    return handover.nodes.norm_of(z, norm) if value is None else value


class SumFunction(Function):
    """``apply(x, residual, scale, bias, leaf, handover) -> z``; ``leaf`` identifies a backward pass for all leaves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        leaf: Tensor | None,
        handover: Handover,
    ) -> Tensor:
        need, edit, norm = ctx.needs_input_grad, handover.edit, handover.norm
        needs = (need[0], need[2], need[3])
        ctx.handover = handover
        if norm is None:
            return edit_forward(ctx, x, residual, edit, needs)
        backend = choose(x, "edit_norm")
        scale, _, ids, seed = remember(ctx, choose_backward(x, "edit_norm", backend), edit)
        ctx.needs = needs
        ctx.save_for_backward(x if needs[1] else None, scale if needs[0] else None, ids, seed)
        y, z, *statistics = backend.operations.edit_norm_forward(x, residual, edit, norm, True)
        handover.normed = (y, *statistics)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        need = ctx.needs_input_grad
        handed = ctx.handover.take()
        if not handed:
            dx, dscale, dbias = derivative(ctx, edit_backward, grads)
            return dx, grads[0] if need[1] else None, dscale, dbias, None, None
        dy, z, weight, mean, rstd, ctx.norm, ctx.norm_dtypes = handed
        x, scale, ids, seed = ctx.saved_tensors
        asked, ctx.needs = ctx.needs, (*need[:4], False, False)
        saved = (z, x, None, scale, None, weight, ids, seed, mean, rstd)
        try:
            found = edit_norm_backward(ctx, by_name(ctx.backend), saved, dy, grads[0])
        finally:
            ctx.needs = asked
        return *found[:4], None, None


class MixedSumFunction(Function):
    """``apply(x, residual, first, second, bias, leaf, handover) -> z``, as :class:`SumFunction` for mixes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        first: Tensor,
        second: Tensor | None,
        bias: Tensor | None,
        leaf: Tensor | None,
        handover: Handover,
    ) -> Tensor:
        need, own, norm = ctx.needs_input_grad, mix_of_edit(handover.edit), handover.norm
        needs = (need[0], *need[2:5])
        ctx.handover = handover
        if norm is None:
            return mix_forward(ctx, x, residual, own, needs)
        z, handover.normed = mix_norm_of_sum(ctx, x, residual, own, norm, needs)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        need = ctx.needs_input_grad
        handed = ctx.handover.take()
        if not handed:
            dx, *vectors = derivative(ctx, mix_backward, grads)
            return dx, grads[0] if need[1] else None, *vectors, None, None
        dy, z, weight, mean, rstd, ctx.norm, ctx.norm_dtypes = handed
        asked, ctx.needs = ctx.needs, (*need[:5], False, False)
        try:
            found = mix_norm_backward(
                ctx, by_name(ctx.backend), (*ctx.saved_tensors, z, weight, mean, rstd), dy, grads[0]
            )
        finally:
            ctx.needs = asked
        return *found[:5], None, None


class NormOfSumFunction(Function):
    """``apply(z, weight, norm_bias, norm, handover) -> y``."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor | None, norm_bias: Tensor | None, norm: Norm, handover: Handover
    ) -> Tensor:
        backend = choose(z, "edit_norm")
        remember(ctx, choose_backward(z, "edit_norm", backend), _BARE)
        if handover.normed is None:
            # Of the sum itself: its inputs may have been changed in place since.
            y, _, mean, rstd = backend.operations.edit_norm_forward(z, None, _BARE, norm, False)
        else:
            y, mean, rstd = handover.normed
            handover.normed = None
        need = ctx.needs_input_grad
        remember_norm(ctx, norm, (need[0], False, False, False, need[1], need[2]))
        if any(need):
            ctx.handover = handover
            ctx.save_for_backward(z, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dy = grads[0]
        if dy is None:
            return None, None, None, None, None
        need, handover = ctx.needs_input_grad, ctx.handover
        if torch.is_grad_enabled() or not need[0] or not handover.may_hand_over():  # each node computes its own part
            return *derivative(ctx, norm_backward, grads), None, None
        saved = ctx.saved_tensors
        handover.handed[torch._C._current_graph_task_id()] = (dy, *saved, ctx.norm, ctx.norm_dtypes)
        dweight = dbias = None
        if need[1] or need[2]:
            _, dweight, dbias = norm_backward(ctx, by_name(ctx.backend), saved, dy, through=False)
        return None, dweight, dbias, None, None


def norm_backward(ctx: Any, backend: Any, saved: tuple[Any, ...], dy: Tensor, through: bool = True) -> Gradients:
    """The gradients of the sum and of the norm's parameters."""
    z, weight, mean, rstd = saved
    asked, ctx.needs = ctx.needs, (ctx.needs[0] and through, *ctx.needs[1:])
    try:
        found = edit_norm_backward(ctx, backend, (z, None, None, None, None, weight, None, None, mean, rstd), dy, None)
    finally:
        ctx.needs = asked
    return found[0], found[4], found[5]


_sum, _mixed_sum, _norm = map(direct, (SumFunction, MixedSumFunction, NormOfSumFunction))
