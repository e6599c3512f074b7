"""The six operations on the kernels: allocation, tiles, grids. No arithmetic.

Arguments and results are those of :mod:`red_kernels.backends.reference`. Non-contiguous inputs are copied. Nothing here
waits for the device, and every size follows from shapes, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Edit, Norm, Statistics, edit_of, flat_edit
from ..reference import EditGrads, EditNormGrads, NormEditGrads
from . import rules
from .dealing import KERNELS as DEALING
from .dealing import dense, drop_numbers, finish, lines_of, maybe, no_sums, statistic, work_of
from .kernels import edit, norm, wide
from .launch import Kernel, architecture

_edit_forward, _edit_backward = Kernel(edit.edit_forward), Kernel(edit.edit_backward)
_norm_forward, _norm_backward = Kernel(norm.norm_forward), Kernel(norm.norm_backward)
_wide_forward, wide_averages = Kernel(wide.wide_forward), Kernel(wide.wide_averages)
_wide_backward = Kernel(wide.wide_backward, registers=255)

KERNELS = (
    _edit_forward, _edit_backward, _norm_forward, _norm_backward,
    _wide_forward, wide_averages, _wide_backward, *DEALING,
)  # fmt: skip


def edit_forward(x: Tensor, residual: Tensor | None, edit: Edit) -> Tensor:
    scale, bias, edit_ids, seed, p = flat_edit(edit)
    x, residual, scale, bias, edit_ids = dense(x), maybe(residual), maybe(scale), maybe(bias), maybe(edit_ids)
    z = torch.empty_like(x)
    d = x.shape[-1]
    rows = x.numel() // d
    if rows:
        tile = rules.edit_forward(d, x.element_size(), architecture(x))
        _edit_forward(
            (-(-rows // tile.rows), -(-d // tile.chunk), 1),
            (x, residual, scale, bias, edit_ids, seed, z),
            (rows, _count(scale, bias, edit_ids), *drop_numbers(seed, p)),
            (d, tile.rows, tile.chunk),
            tile.warps,
        )
    return z


def edit_backward(dz: Tensor, x: Tensor | None, edit: Edit, n_edits: int, needs: tuple[bool, bool, bool]) -> EditGrads:
    scale, _, edit_ids, seed, p = flat_edit(edit)
    dz, scale = dense(dz), maybe(scale) if needs[0] else None
    x = maybe(x) if needs[1] else None
    d = dz.shape[-1]
    rows = dz.numel() // d
    dx = torch.empty_like(dz) if needs[0] else None
    if not rows:
        return EditGrads(dx, *no_sums(dz, needs[1:], edit_ids, n_edits))
    tile = rules.edit_backward(d, dz.element_size(), architecture(dz))
    slabs = -(-d // tile.chunk)
    work = work_of(dz, rows, tile, slabs, edit_ids, n_edits, needs[1:])
    _edit_backward(
        (work.programs, slabs, 1),
        (dz, x, scale, work.ids, work.order, work.owners, seed, dx, *work.edit_lines),
        (rows, n_edits, work.length, *drop_numbers(seed, p)),
        (d, tile.rows, tile.chunk),
        tile.warps,
    )
    return EditGrads(dx, *finish(work, (), dz, n_edits))


def edit_norm_forward(
    x: Tensor, residual: Tensor | None, edit: Edit, norm: Norm, keep_z: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    return _forward(x, residual, edit, norm, keep_z, False)


def norm_edit_forward(x: Tensor, norm: Norm, edit: Edit) -> tuple[Tensor, Tensor | None, Tensor]:
    y, _, mean, rstd = _forward(x, None, edit, norm, False, True)
    return y, mean, rstd


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
    norm = norm._replace(bias=None)
    if z is not None:  # otherwise it is recomputed from its inputs
        scale, _, ids, seed, p = flat_edit(edit)
        edit, residual = edit_of(scale if needs[0] else None, None, ids, seed, p), None
        x = x if needs[2] else None
    return EditNormGrads(*_backward(dy, dz, z, x, residual, edit, norm, statistics, n_edits, needs, False))


def norm_edit_backward(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    edit: Edit,
    statistics: Statistics,
    n_edits: int,
    needs: tuple[bool, bool, bool, bool, bool],
) -> NormEditGrads:
    all_needs = (needs[0], False, needs[3], needs[4], needs[1], needs[2])
    norm = norm if needs[3] else norm._replace(bias=None)
    dx, _, dscale, dbias, dweight, dnorm_bias = _backward(
        dy, None, x, None, None, edit, norm, statistics, n_edits, all_needs, True
    )
    return NormEditGrads(dx, dweight, dnorm_bias, dscale, dbias)


def _forward(
    x: Tensor, residual: Tensor | None, edit: Edit, norm: Norm, keep_z: bool, edit_last: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Both forwards with a norm: ``(y, z, mean, rstd)``."""
    scale, bias, edit_ids, seed, p = flat_edit(edit)
    weight, norm_bias, eps, offset, centered = norm
    for t in (x, residual, scale, bias, weight, norm_bias, edit_ids):
        if t is not None and not t.is_contiguous():
            x, residual, scale, bias = dense(x), maybe(residual), maybe(scale), maybe(bias)
            weight, norm_bias, edit_ids = maybe(weight), maybe(norm_bias), maybe(edit_ids)
            break
    d = x.shape[-1]
    rows = x.numel() // d
    y = torch.empty_like(x)
    z = torch.empty_like(x) if keep_z else None
    rstd = statistic(x)
    mean = torch.empty_like(rstd) if centered else None
    if rows:
        tensors = (x, residual, scale, bias, weight, norm_bias, edit_ids, seed, y, z, mean, rstd)
        numbers = (rows, _count(scale, bias, edit_ids), *drop_numbers(seed, p), eps, offset)
        tile = rules.norm_forward(d, x.element_size(), architecture(x))
        if tile is None:
            tile = rules.wide_norm(d, x.element_size(), architecture(x))
            _wide_forward((rows, 1, 1), tensors, numbers, (d, tile.chunk, edit_last), tile.warps)
        else:
            constants = (d, tile.rows, tile.chunk, tile.chunks, edit_last)
            _norm_forward((-(-rows // tile.rows), 1, 1), tensors, numbers, constants, tile.warps)
    return y, z, mean, rstd


def _backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    edit: Edit,
    norm: Norm,
    statistics: Statistics,
    n_edits: int,
    needs: tuple[bool, ...],
    edit_last: bool,
) -> tuple[Tensor | None, ...]:
    """Both backwards with a norm: the gradients of x, residual, scale, bias, weight and norm_bias."""
    scale, bias, edit_ids, seed, p = flat_edit(edit)
    dy, dz, z, x, residual = dense(dy), maybe(dz), maybe(z), maybe(x), maybe(residual)
    scale, bias, weight, norm_bias = maybe(scale), maybe(bias), maybe(norm.weight), maybe(norm.bias)
    d = dy.shape[-1]
    rows = dy.numel() // d
    dx = torch.empty_like(dy) if needs[0] else None
    dresidual = torch.empty_like(dy) if needs[1] else None
    if not rows:
        found = (*no_sums(dy, needs[2:4], edit_ids, n_edits), *no_sums(dy, needs[4:], None, 1))
        return dx, dresidual, *found
    chip, size = architecture(dy), dy.element_size()
    by_edit = edit_ids is not None and any(needs[2:4])
    tile = rules.norm_backward(d, size, chip, sum(needs[2:]) + (seed is not None) + (z is None) + 2 * by_edit)
    slab = rules.wide_backward(d, size, chip)
    slabs = 1 if tile is not None else -(-d // slab.chunk)
    work = work_of(dy, rows, tile or slab, slabs, edit_ids, n_edits, needs[2:4])
    norm_lines = tuple(lines_of(dy, work.programs) if need else None for need in needs[4:])
    drop = drop_numbers(seed, p)
    saved = (seed, *statistics)
    results = (dx, dresidual, *work.edit_lines, *norm_lines)
    numbers = (rows, n_edits, work.length, *drop, norm.offset)
    inputs = (dy, dz, z, x, residual, scale, bias, weight, norm_bias, work.ids, work.order, work.owners)
    if tile is not None:
        constants = (d, tile.rows, tile.chunk, tile.chunks, edit_last)
        _norm_backward((work.programs, 1, 1), (*inputs, *saved, *results), numbers, constants, tile.warps)
    else:
        row = rules.wide_norm(d, size, chip)
        averages = torch.empty((2, rows), dtype=torch.float32, device=dy.device)
        wide_averages(
            (rows, 1, 1),
            (dy, z, x, residual, scale, bias, weight, maybe(edit_ids), *saved, averages),
            (rows, n_edits, *drop, norm.offset),
            (d, row.chunk, edit_last),
            row.warps,
        )
        _wide_backward(
            (work.programs, slabs, 1),
            (*inputs, *saved, averages, *results),
            numbers,
            (d, slab.rows, slab.chunk, edit_last),
            slab.warps,
        )
    return dx, dresidual, *finish(work, norm_lines, dy, n_edits)


def _count(scale: Tensor | None, bias: Tensor | None, edit_ids: Tensor | None) -> int:
    """The number of edits to choose from."""
    if edit_ids is None:
        return 1
    vectors = scale if scale is not None else bias
    return 1 if vectors is None else vectors.shape[0]
