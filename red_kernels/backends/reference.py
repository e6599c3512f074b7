"""The operations in plain PyTorch: the specification of every kernel.

Forward and backward formulas are explicit, so this file states what a kernel computes and may save. Arithmetic is in
fp32 (fp64 for fp64 activations) and each result is rounded once, to the activation's dtype. Shapes: activations
``(..., d)``; vectors ``(d,)``, or ``(n, d)`` with ids of the activation's leading shape, and ``n_edits`` is this n, or
1. A backward gets only the forward's vectors that it uses.

Source: RED, arXiv 2402.15179 (the edit ``scale * h + bias``); RoAd, arXiv 2409.00119 (rotations), ETHER, arXiv
2405.20271 (reflections); RMSNorm, arXiv 1910.07467; LayerNorm, arXiv 1607.06450; Philox4x32-10, Salmon et al., SC 2011
(the dropout mask).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import PAIR, Edit, Mix, Norm, Statistics

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


class EditGrads(NamedTuple):
    """Gradients of :func:`edit_forward`; None if not requested."""

    x: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


class EditNormGrads(NamedTuple):
    """Gradients of :func:`edit_norm_forward`; None if not requested."""

    x: Tensor | None
    residual: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    weight: Tensor | None
    norm_bias: Tensor | None


class NormEditGrads(NamedTuple):
    """Gradients of :func:`norm_edit_forward`; None if not requested."""

    x: Tensor | None
    weight: Tensor | None
    norm_bias: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


class MixGrads(NamedTuple):
    """Gradients of :func:`mix_forward`; None if not requested."""

    x: Tensor | None
    first: Tensor | None
    second: Tensor | None
    bias: Tensor | None


class MixNormGrads(NamedTuple):
    """Gradients of :func:`mix_norm_forward`; None if not requested."""

    x: Tensor | None
    residual: Tensor | None
    first: Tensor | None
    second: Tensor | None
    bias: Tensor | None
    weight: Tensor | None
    norm_bias: Tensor | None


def philox_words(seed: Tensor, rows: int, columns: int) -> Tensor:
    """The random words of a ``(rows, columns)`` activation: int64 values in ``[0, 2**32)``.

    Column ``j`` of row ``i`` takes word ``j % 4`` of Philox4x32-10 with the counter ``(j // 4, i, i >> 32, 0)`` and the
    two halves of ``seed`` (int64, one element) as key. Every backend draws these same words.
    """
    seed = seed.reshape(())
    quads = (columns + 3) // 4
    row = torch.arange(rows, device=seed.device, dtype=torch.int64)[:, None]
    counter = [
        torch.arange(quads, device=seed.device, dtype=torch.int64)[None, :].expand(rows, quads),
        (row & _WORD).expand(rows, quads),
        (row >> 32).expand(rows, quads),
        torch.zeros((), device=seed.device, dtype=torch.int64).expand(rows, quads),
    ]
    words = philox_rounds(counter, seed)
    return torch.stack(words, dim=-1).reshape(rows, 4 * quads)[:, :columns]


def philox_rounds(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 of counters in four words, all int64 in ``[0, 2**32)``; the key is ``seed``, int64."""
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for step in range(10):
        if step:
            key = [(k + s) & _WORD for k, s in zip(key, _PHILOX_KEY_STEPS, strict=True)]
        high0, low0 = _multiply_words(counter[0], _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_words(counter[2], _PHILOX_MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
    return counter


def _multiply_words(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product; int64 wraps, which keeps the 64 bits right."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def dropout_factor(seed: Tensor, dropout_p: float, like: Tensor) -> Tensor:
    """``1 / (1 - p)`` for a kept element, 0 for a dropped one, in the shape of ``like``."""
    d = like.shape[-1]
    words = philox_words(seed, like.numel() // d, d).reshape(like.shape)
    keep = words >= round(dropout_p * 2**32)
    factor = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return keep.to(_compute_dtype(like)) * factor


def edit_forward(x: Tensor, residual: Tensor | None, edit: Edit) -> Tensor:
    """``z = residual + dropout(scale * x + bias)`` (RED eq. 1, with the residual add behind it)."""
    z = _stream(x, residual, edit)
    return z.clone() if z is x else z


def edit_backward(dz: Tensor, x: Tensor | None, edit: Edit, n_edits: int, needs: tuple[bool, bool, bool]) -> EditGrads:
    """Gradients of :func:`edit_forward` for x, scale and bias, as in ``needs``; that of the residual is ``dz``."""
    return EditGrads(*_edit_grads(wide(dz), x, edit, n_edits, needs, dz.dtype))


def edit_norm_forward(
    x: Tensor, residual: Tensor | None, edit: Edit, norm: Norm, keep_z: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """``z`` as in :func:`edit_forward` and ``y = norm(z)``: ``(y, z, mean, rstd)``.

    The norm reads ``z`` rounded to the dtype of ``x``, like every reader of ``z``. This holds without ``keep_z`` too,
    when ``z`` is None: no other result depends on it.
    """
    z = _stream(x, residual, edit)
    normed, mean, rstd = normalise(wide(z), norm)
    kept = (z.clone() if z is x else z) if keep_z else None
    return _as(_affine(normed, norm), x.dtype), kept, mean, rstd


def edit_norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    edit: Edit,
    norm: Norm,
    statistics: Statistics,
    n_edits: int,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> EditNormGrads:
    """Gradients of :func:`edit_norm_forward`; a ``z`` that was not kept is recomputed from ``x`` and ``residual``."""
    if z is None:
        assert x is not None
        z = _stream(x, residual, edit)
    z32 = wide(z)
    g, dweight, dnorm_bias = _norm_backward(wide(dy), z32, norm, statistics, needs[4], needs[5])
    if dz is not None:
        g = g + wide(dz)
    dresidual = _as(g, dy.dtype) if needs[1] else None
    dx, dscale, dbias = _edit_grads(g, x, edit, n_edits, (needs[0], needs[2], needs[3]), dy.dtype)
    return EditNormGrads(dx, dresidual, dscale, dbias, dweight, dnorm_bias)


def statistics(z: Tensor | None, x: Tensor | None, residual: Tensor | None, edit: Edit, norm: Norm) -> Statistics:
    """The statistics of ``z``, or of its recomputation by :func:`edit_norm_forward` if it was not kept.

    For a backward that is itself differentiated: there they are not constants.
    """
    if z is None:
        assert x is not None
        z = _stream(x, residual, edit)
    return Statistics(*normalise(wide(z), norm)[1:])


def norm_edit_forward(x: Tensor, norm: Norm, edit: Edit) -> tuple[Tensor, Tensor | None, Tensor]:
    """``y = scale * norm(x) + bias``, an edit behind a post-norm (RED's ``res`` position). Returns (y, mean, rstd)."""
    normed, mean, rstd = normalise(wide(x), norm)
    y = _edit(_affine(normed, norm), None, edit)
    return _as(y, x.dtype), mean, rstd


def norm_edit_backward(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    edit: Edit,
    statistics: Statistics,
    n_edits: int,
    needs: tuple[bool, bool, bool, bool, bool],
) -> NormEditGrads:
    """Gradients of :func:`norm_edit_forward`."""
    x32, g = wide(x), wide(dy)
    h = _affine(_normalised(x32, statistics), norm) if needs[3] else None
    dh, dscale, dbias = _edit_grads(g, h, edit, n_edits, (True, needs[3], needs[4]), g.dtype)
    assert dh is not None
    dx, dweight, dnorm_bias = _norm_backward(dh, x32, norm, statistics, needs[1], needs[2])
    return NormEditGrads(_as(dx, dy.dtype) if needs[0] else None, dweight, dnorm_bias, dscale, dbias)


def mix_forward(x: Tensor, residual: Tensor | None, mix: Mix) -> Tensor:
    """``z = residual + dropout(mix(x))``; see :class:`~red_kernels.backends.arguments.Mix` for the formulas."""
    h = wide(x)
    first, second, bias = (_of_rows(vector, mix.ids, h) for vector in mix[:3])
    assert first is not None
    if mix.blocks:
        h = h - first * _dots(first, h, mix.blocks) + (0 if second is None else second * _dots(second, h, mix.blocks))
    else:
        assert second is not None
        h = first * h + second * _partners(h)
    h = h if bias is None else h + bias
    if mix.dropout is not None:
        h = h * dropout_factor(mix.dropout.seed, mix.dropout.p, h)
    return _as(h if residual is None else wide(residual) + h, x.dtype)


def mix_backward(dz: Tensor, x: Tensor | None, mix: Mix, n_edits: int, needs: tuple[bool, ...]) -> MixGrads:
    """Gradients of :func:`mix_forward` for x, first, second and bias; that of the residual is ``dz``."""
    return MixGrads(*_mix_grads(wide(dz), x, mix, n_edits, needs, dz.dtype))


def mix_norm_forward(
    x: Tensor, residual: Tensor | None, mix: Mix, norm: Norm
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``z`` as in :func:`mix_forward`, rounded, and ``y = norm(z)``: ``(y, z, mean, rstd)``."""
    z = mix_forward(x, residual, mix)
    normed, mean, rstd = normalise(wide(z), norm)
    return _as(_affine(normed, norm), x.dtype), z, mean, rstd


def mix_norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    x: Tensor | None,
    mix: Mix,
    norm: Norm,
    statistics: Statistics,
    n_edits: int,
    needs: tuple[bool, ...],
) -> MixNormGrads:
    """Gradients of :func:`mix_norm_forward`."""
    g, dweight, dnorm_bias = _norm_backward(wide(dy), wide(z), norm, statistics, needs[5], needs[6])
    if dz is not None:
        g = g + wide(dz)
    dresidual = _as(g, dy.dtype) if needs[1] else None
    dx, dfirst, dsecond, dbias = _mix_grads(g, x, mix, n_edits, (needs[0], *needs[2:5]), dy.dtype)
    return MixNormGrads(dx, dresidual, dfirst, dsecond, dbias, dweight, dnorm_bias)


def _mix_grads(
    g: Tensor, x: Tensor | None, mix: Mix, n_edits: int, needs: tuple[bool, ...], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, in ``dtype``, first, second and bias, with ``g`` the gradient of ``dropout(mix(x))``."""
    if mix.dropout is not None:
        g = g * dropout_factor(mix.dropout.seed, mix.dropout.p, g)
    blocks = mix.blocks
    first, second = (_of_rows(vector, mix.ids, g) for vector in mix[:2])
    dx = dfirst = dsecond = None
    assert first is not None
    if needs[0] and blocks:
        dx = g - first * _dots(first, g, blocks) + (0 if second is None else second * _dots(second, g, blocks))
    elif needs[0]:
        assert second is not None
        dx = first * g + _partners(second * g)
    if needs[1] or needs[2]:
        assert x is not None
        h = wide(x)
        if needs[1]:
            dfirst = -_reflected(first, g, h, blocks) if blocks else g * h
        if needs[2]:
            assert second is not None
            dsecond = _reflected(second, g, h, blocks) if blocks else g * _partners(h)
    dfirst, dsecond, dbias = (
        None if one is None else _column_sum(one, mix.ids, n_edits)
        for one in (dfirst, dsecond, g if needs[3] else None)
    )
    return None if dx is None else _as(dx, dtype), dfirst, dsecond, dbias


def _reflected(u: Tensor, g: Tensor, h: Tensor, blocks: int) -> Tensor:
    """Each row's term in the gradient of ``u`` in ``u * (u . h)``."""
    return g * _dots(u, h, blocks) + h * _dots(u, g, blocks)


def _dots(u: Tensor, h: Tensor, blocks: int) -> Tensor:
    """``u . h`` of each block, at each of its columns."""
    width = h.shape[-1] // blocks
    sums = (u * h).unflatten(-1, (blocks, width)).sum(-1, keepdim=True)
    return sums.expand(*sums.shape[:-1], width).flatten(-2)


def _partners(h: Tensor) -> Tensor:
    """The columns with each pair exchanged."""
    return h.unflatten(-1, (-1, 2, PAIR)).flip(-2).flatten(-3)


def _of_rows(vector: Tensor | None, ids: Tensor | None, like: Tensor) -> Tensor | None:
    return None if vector is None else _per_row(vector, ids, like)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    return _as(x, _compute_dtype(x))


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    # A no-op conversion would have a second name in a trace, and torch 2.11 then loses the gradients.
    return x if x.dtype == dtype else x.to(dtype)


def _per_row(vector: Tensor, edit_ids: Tensor | None, like: Tensor) -> Tensor:
    vector = _as(vector, _compute_dtype(like))
    return vector if edit_ids is None else vector[edit_ids]


def _column_sum(values: Tensor, edit_ids: Tensor | None, n_edits: int) -> Tensor:
    d = values.shape[-1]
    values = values.reshape(-1, d)
    if edit_ids is None:
        return values.sum(0)
    return values.new_zeros(n_edits, d).index_add(0, edit_ids.reshape(-1), values)


def _edit(x: Tensor, residual: Tensor | None, edit: Edit) -> Tensor:
    h = wide(x)
    vectors = {name: None if v is None else _per_row(v, edit.ids, h) for name, v in edit.vectors.items()}
    h = edit.kind.formula(h, vectors)
    if edit.dropout is not None:
        h = h * dropout_factor(edit.dropout.seed, edit.dropout.p, h)
    return h if residual is None else wide(residual) + h


def _stream(x: Tensor, residual: Tensor | None, edit: Edit) -> Tensor:
    """``z``, rounded to the dtype of ``x``; it may be ``x`` itself."""
    return _as(_edit(x, residual, edit), x.dtype)


def _edit_grads(
    g: Tensor, x: Tensor | None, edit: Edit, n_edits: int, needs: tuple[bool, bool, bool], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, in ``dtype``, scale and bias, with ``g`` the gradient of ``dropout(scale * x + bias)``."""
    if edit.dropout is not None:
        g = g * dropout_factor(edit.dropout.seed, edit.dropout.p, g)
    scale = edit.vectors.get("scale")
    dx = dscale = dbias = None
    if needs[0]:
        dx = _as(g if scale is None else g * _per_row(scale, edit.ids, g), dtype)
    if needs[1]:
        assert x is not None
        dscale = _column_sum(g * wide(x), edit.ids, n_edits)
    if needs[2]:
        dbias = _column_sum(g, edit.ids, n_edits)
    return dx, dscale, dbias


def normalise(z: Tensor, norm: Norm) -> tuple[Tensor, Tensor | None, Tensor]:
    """``z`` in the wide dtype, with mean 0 (if ``norm`` is centered) and mean square 1 in each row; and statistics."""
    mean = None
    if norm.centered:
        # Distances from one of the values: equal values have none, and their sum does not overflow.
        origin = z[..., :1].detach()
        mean = origin[..., 0] + (z - origin).mean(-1)
        mean = mean + (z - mean[..., None]).mean(-1)  # the rounding error of the first sum
        z = z - mean[..., None]
    rstd = torch.rsqrt(z.square().mean(-1) + norm.eps)
    return z * rstd[..., None], mean, rstd


def _normalised(z: Tensor, statistics: Statistics) -> Tensor:
    mean, rstd = statistics
    return (z if mean is None else z - mean[..., None]) * rstd[..., None]


def _affine(normed: Tensor, norm: Norm) -> Tensor:
    if norm.weight is not None:
        normed = normed * (_as(norm.weight, normed.dtype) + norm.offset)
    return normed if norm.bias is None else normed + _as(norm.bias, normed.dtype)


def _norm_backward(
    dy: Tensor, z: Tensor, norm: Norm, statistics: Statistics, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dz = rstd * (g - normed * mean(g * normed) - mean(g))``, ``g = dy * weight``; RMSNorm lacks the last term."""
    normed = _normalised(z, statistics)
    dweight = _column_sum(dy * normed, None, 1) if need_weight else None
    dbias = _column_sum(dy, None, 1) if need_bias else None
    g = dy if norm.weight is None else dy * (_as(norm.weight, dy.dtype) + norm.offset)
    dz = g - normed * (g * normed).mean(-1, keepdim=True)
    if statistics.mean is not None:
        dz = dz - g.mean(-1, keepdim=True)
    return dz * statistics.rstd[..., None], dweight, dbias
