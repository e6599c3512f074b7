"""Edits that mix the columns of a row, rotations and reflections, with the sum and the norm behind them.

The formulas are those of :class:`red_kernels.backends.arguments.Mix`. Shapes, dtypes, gradients and errors are as in
:mod:`red_kernels.ops.functional`. Rotations need a width that is a multiple of 64, reflections one that is a multiple
of ``blocks``. A backend without kernels for them runs the reference.

Sources: RoAd, arXiv 2409.00119 (rotations); ETHER, arXiv 2405.20271 (reflections).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import REFERENCE, Backend, choose, reference
from ..backends.arguments import PAIR, Dropout, Mix, Norm, Statistics
from . import checks
from .ambient import PLAIN, TANGENTS, ambient
from .autograd import direct
from .inputs import drawn_dropout, of_one_dtype
from .passes import Gradients, Saved, derivative, plain_only, remember_norm

__all__ = [
    "MixFunction",
    "MixNormFunction",
    "mix",
    "mix_add",
    "mix_add_layer_norm",
    "mix_add_rms_norm",
    "mix_backward",
    "mix_forward",
    "mix_norm_backward",
    "mix_norm_forward",
    "mixed",
    "mixed_norm",
]


def mix(
    x: Tensor,
    first: Tensor,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    blocks: int = 0,
    edit_ids: Tensor | None = None,
) -> Tensor:
    """A rotation (``blocks=0``) or reflections of ``x``, with its shape and dtype. See :func:`mix_add`."""
    return mixed(x, None, _checked(x, None, first, second, bias, blocks, edit_ids))


def mix_add(
    x: Tensor,
    residual: Tensor | None,
    first: Tensor,
    second: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    blocks: int = 0,
    dropout_p: float = 0.0,
    training: bool = False,
    edit_ids: Tensor | None = None,
) -> Tensor:
    """``residual + dropout(mix(x) + bias)``.

    Args:
        x: ``(..., d)``.
        residual: of the same shape, or None.
        first: ``(d,)``, or ``(n, d)`` with ``edit_ids``.
        second: the same, or None.
        bias: the same, or None.
        blocks: 0 for a rotation, ``first * x + second * x'`` with ``x'[j] = x[j ^ 32]``; else the number of blocks of
            columns that are reflected, ``x - first * (first . x) + second * (second . x)`` in each.
        dropout_p: as for :func:`red_kernels.edit_add`.
        training: the same.
        edit_ids: the same.

    Errors: see :mod:`red_kernels.ops.functional`; ValueError for a width that does not fit ``blocks``.
    """
    own = _checked(x, residual, first, second, bias, blocks, edit_ids)
    checks.dropout(dropout_p)
    return mixed(x, residual, own._replace(dropout=drawn_dropout(dropout_p, training, x)))


def mix_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    blocks: int = 0,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    training: bool = False,
    edit_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``z`` as of :func:`mix_add`, and its RMSNorm, as ``(y, z)``; see :func:`red_kernels.edit_add_rms_norm`."""
    return _with_norm(
        x, residual, first, second, bias, Norm(weight, None, eps, weight_offset), blocks, dropout_p, training, edit_ids
    )


def mix_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
    *,
    blocks: int = 0,
    dropout_p: float = 0.0,
    training: bool = False,
    edit_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``z`` as of :func:`mix_add`, and its LayerNorm, as ``(y, z)``; see :func:`red_kernels.edit_add_layer_norm`."""
    norm = Norm(weight, norm_bias, eps, 0.0, True)
    return _with_norm(x, residual, first, second, bias, norm, blocks, dropout_p, training, edit_ids)


def _with_norm(
    x: Tensor,
    residual: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    blocks: int,
    dropout_p: float,
    training: bool,
    edit_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    own = _checked(x, residual, first, second, bias, blocks, edit_ids)
    checks.dropout(dropout_p)
    checks.norm(norm, x)
    return mixed_norm(x, residual, own._replace(dropout=drawn_dropout(dropout_p, training, x)), norm)


def _checked(
    x: Tensor,
    residual: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    bias: Tensor | None,
    blocks: int,
    edit_ids: Tensor | None,
) -> Mix:
    checks.activation(x)
    if residual is not None:
        checks.same_shape(residual, x, "residual")
    checks.mix_vectors(x, first, second, bias, blocks, PAIR, edit_ids)
    return Mix(first, second, bias, blocks, None if edit_ids is None else edit_ids.to(torch.int64))


def mixed(x: Tensor, residual: Tensor | None, own: Mix) -> Tensor:
    """:func:`mix_add` of a bundle, without checks."""
    if residual is not None and residual.dtype != x.dtype:
        x, residual = of_one_dtype(x, residual)
    if _plainly(x, residual, *own[:3]):
        return reference.mix_forward(x, residual, own)
    return _mix(x, residual, *own[:3], own)


def mixed_norm(x: Tensor, residual: Tensor | None, own: Mix, norm: Norm) -> tuple[Tensor, Tensor]:
    """The same with a norm behind the sum, as ``(y, z)``."""
    if residual is not None and residual.dtype != x.dtype:
        x, residual = of_one_dtype(x, residual)
    if _plainly(x, residual, *own[:3], norm.weight, norm.bias):
        return reference.mix_norm_forward(x, residual, own, norm)[:2]
    return _mix_norm(x, residual, *own[:3], norm.weight, norm.bias, own, norm)


def _plainly(*tensors: Tensor | None) -> bool:
    """Whether plain PyTorch must run: when a compiler traces, fusion is its task."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return bool(ambient() & (PLAIN + TANGENTS)) and plain_only(*tensors)


def _backend(x: Tensor, operation: str) -> Backend:
    backend = choose(x, operation)
    return backend if hasattr(backend.operations, "mix_forward") else REFERENCE


def _remember(ctx: Any, backend: Backend, own: Mix) -> tuple[Tensor | None, Tensor | None]:
    """The context of every backward beside its tensors. Returns the ids and the seed."""
    ctx.backend, ctx.blocks = backend.name, own.blocks
    ctx.n_edits = 1 if own.ids is None else own.first.shape[0]
    ctx.vectors = tuple(None if vector is None else vector.dtype for vector in own[:3])
    seed, ctx.dropout_p = own.seed_and_p
    ctx.set_materialize_grads(False)
    return own.ids, seed


def mix_forward(ctx: Any, x: Tensor, residual: Tensor | None, own: Mix, needs: tuple[bool, ...]) -> Tensor:
    """``needs``: of x, first, second and bias."""
    backend = _backend(x, "edit")
    ctx.needs = needs
    _save(ctx, x, own, needs, _remember(ctx, backend, own))
    z: Tensor = backend.operations.mix_forward(x, residual, own)
    return z


def _save(ctx: Any, x: Tensor, own: Mix, needs: tuple[bool, ...], *rest: Any) -> None:
    vectors = needs[1] or needs[2]
    through = needs[0] or vectors
    first, second = (own.first, own.second) if through else (None, None)
    ctx.save_for_backward(x if vectors else None, first, second, *(t for some in rest for t in some))


def mix_backward(ctx: Any, backend: Backend, saved: Saved, dz: Tensor | None) -> Gradients:
    """Gradients of x, first, second and bias."""
    needs = ctx.needs
    if dz is None or not any(needs):
        return None, None, None, None
    x, first, second, ids, seed = saved[:5]
    if first is None:  # only the bias is needed: any vector serves
        first = dz.new_zeros((ctx.n_edits, dz.shape[-1]) if ids is not None else dz.shape[-1:], dtype=torch.float32)
        second = first
    dx, *vectors = backend.operations.mix_backward(dz, x, _mix_of(ctx, first, second, ids, seed), ctx.n_edits, needs)
    return dx, *_as(ctx, vectors)


def mix_norm_forward(
    ctx: Any, x: Tensor, residual: Tensor | None, own: Mix, norm: Norm, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor]:
    """``needs``: of x, residual, first, second, bias, and the norm's weight and bias."""
    backend = _backend(x, "edit_norm")
    tail = _remember(ctx, backend, own)
    y, z, mean, rstd = backend.operations.mix_norm_forward(x, residual, own, norm)
    remember_norm(ctx, norm, needs)
    if any(needs):
        _save(ctx, x, own, (needs[0], *needs[2:5]), tail, (z, norm.weight, mean, rstd))
    return y, z


def mix_norm_of_sum(
    ctx: Any, x: Tensor, residual: Tensor | None, own: Mix, norm: Norm, needs: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor, Tensor | None, Tensor]]:
    """As :func:`mix_forward`, with the norm of the sum: the sum, and the norm with its rows' statistics."""
    backend = _backend(x, "edit_norm")
    ctx.needs = needs
    _save(ctx, x, own, needs, _remember(ctx, backend, own))
    y, z, mean, rstd = backend.operations.mix_norm_forward(x, residual, own, norm)
    return z, (y, mean, rstd)


def mix_norm_backward(ctx: Any, backend: Backend, saved: Saved, dy: Tensor | None, dz: Tensor | None) -> Gradients:
    """Gradients of x, residual, first, second, bias, and the norm's weight and bias."""
    needs = ctx.needs
    if not any(needs) or (dy is None and dz is None):
        return (None,) * 7
    x, first, second, ids, seed, z, weight, mean, rstd = saved
    if dy is None:  # only z was used
        ctx.needs = (needs[0], *needs[2:5])
        try:
            dx, *vectors = mix_backward(ctx, backend, saved, dz)
        finally:
            ctx.needs = needs
        return dx, dz if needs[1] else None, *vectors, None, None
    norm, statistics = Norm(weight, None, *ctx.norm), Statistics(mean, rstd)
    if torch.is_grad_enabled():  # recorded: the statistics depend on their input
        statistics = Statistics(*reference.normalise(reference.wide(z), norm)[1:])
    if first is None:
        first = second = z.new_zeros(
            (ctx.n_edits, z.shape[-1]) if ids is not None else z.shape[-1:], dtype=torch.float32
        )
    own = _mix_of(ctx, first, second, ids, seed)
    dx, dresidual, *rest = backend.operations.mix_norm_backward(dy, dz, z, x, own, norm, statistics, ctx.n_edits, needs)
    norms = (_to(g, dtype) for g, dtype in zip(rest[3:], ctx.norm_dtypes, strict=True))
    return dx, dresidual, *_as(ctx, rest[:3]), *norms


def _mix_of(ctx: Any, first: Tensor, second: Tensor | None, ids: Tensor | None, seed: Tensor | None) -> Mix:
    return Mix(first, second, None, ctx.blocks, ids, None if seed is None else Dropout(ctx.dropout_p, seed))


def _as(ctx: Any, gradients: Any) -> Gradients:
    return tuple(_to(g, dtype) for g, dtype in zip(gradients, ctx.vectors, strict=True))


def _to(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)


class MixFunction(Function):
    """``apply(x, residual, first, second, bias, mix) -> z``; ``mix`` contains the vectors before it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, first: Tensor, second: Any, bias: Any, own: Mix
    ) -> Tensor:
        need = ctx.needs_input_grad
        return mix_forward(ctx, x, residual, own, (need[0], *need[2:5]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dx, *vectors = derivative(ctx, mix_backward, grads)
        return dx, grads[0] if ctx.needs_input_grad[1] else None, *vectors, None


class MixNormFunction(Function):
    """``apply(x, residual, first, second, bias, weight, norm_bias, mix, norm) -> (y, z)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        first: Tensor,
        second: Any,
        bias: Any,
        weight: Any,
        norm_bias: Any,
        own: Mix,
        norm: Norm,
    ) -> tuple[Tensor, Tensor]:
        return mix_norm_forward(ctx, x, residual, own, norm, ctx.needs_input_grad[:7])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        return *derivative(ctx, mix_norm_backward, grads), None, None


_mix, _mix_norm = map(direct, (MixFunction, MixNormFunction))
