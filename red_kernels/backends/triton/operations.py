"""The six operations on the kernels: what is allocated, which tile, which grid. No arithmetic.

Arguments and results are those of :mod:`red_kernels.backends.reference`. Inputs that are not contiguous are copied.
Nothing here waits for the device, and every size is known from shapes, so that CUDA graphs can capture it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import Edit, Norm, Statistics, edit_of, flat_edit
from ..reference import EditGrads, EditNormGrads, NormEditGrads
from . import rules
from .kernels import edit, norm, sums, wide
from .launch import Kernel, architecture

_edit_forward, _edit_backward = Kernel(edit.edit_forward), Kernel(edit.edit_backward)
_norm_forward, _norm_backward = Kernel(norm.norm_forward), Kernel(norm.norm_backward)
_wide_forward, _wide_averages = Kernel(wide.wide_forward), Kernel(wide.wide_averages)
_wide_backward = Kernel(wide.wide_backward, registers=255)
_add_lines, _add_edits = Kernel(sums.add_lines), Kernel(sums.add_edits)

KERNELS = (
    _edit_forward, _edit_backward, _norm_forward, _norm_backward,
    _wide_forward, _wide_averages, _wide_backward, _add_lines, _add_edits,
)  # fmt: skip

_LEAST_STRETCH = 16  # rows of a worker, but for the last ones


def edit_forward(x: Tensor, residual: Tensor | None, edit: Edit) -> Tensor:
    scale, bias, edit_ids, seed, p = flat_edit(edit)
    x, residual, scale, bias, edit_ids = _dense(x), _maybe(residual), _maybe(scale), _maybe(bias), _maybe(edit_ids)
    z = torch.empty_like(x)
    d = x.shape[-1]
    rows = x.numel() // d
    if rows:
        tile = rules.edit_forward(d, x.element_size(), architecture(x))
        _edit_forward(
            (-(-rows // tile.rows), -(-d // tile.chunk), 1),
            (x, residual, scale, bias, edit_ids, seed, z),
            (rows, _count(scale, bias, edit_ids), *_dropout(seed, p)),
            (d, tile.rows, tile.chunk),
            tile.warps,
        )
    return z


def edit_backward(dz: Tensor, x: Tensor | None, edit: Edit, n_edits: int, needs: tuple[bool, bool, bool]) -> EditGrads:
    scale, _, edit_ids, seed, p = flat_edit(edit)
    dz, scale = _dense(dz), _maybe(scale) if needs[0] else None
    x = _maybe(x) if needs[1] else None
    d = dz.shape[-1]
    rows = dz.numel() // d
    dx = torch.empty_like(dz) if needs[0] else None
    if not rows:
        return EditGrads(dx, *_no_sums(dz, needs[1:], edit_ids, n_edits))
    tile = rules.edit_backward(d, dz.element_size(), architecture(dz))
    slabs = -(-d // tile.chunk)
    work = _work(dz, rows, tile, slabs, edit_ids, n_edits, needs[1], needs[2])
    _edit_backward(
        (work.programs, slabs, 1),
        (dz, x, scale, work.ids, work.order, work.owners, seed, dx, *work.edit_lines),
        (rows, n_edits, work.length, *_dropout(seed, p)),
        (d, tile.rows, tile.chunk),
        tile.warps,
    )
    return EditGrads(dx, *_finish(work, (), dz, n_edits))


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
    if z is not None:  # else it is made again from what it was made of
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
            x, residual, scale, bias = _dense(x), _maybe(residual), _maybe(scale), _maybe(bias)
            weight, norm_bias, edit_ids = _maybe(weight), _maybe(norm_bias), _maybe(edit_ids)
            break
    d = x.shape[-1]
    rows = x.numel() // d
    y = torch.empty_like(x)
    z = torch.empty_like(x) if keep_z else None
    rstd = _statistic(x)
    mean = torch.empty_like(rstd) if centered else None
    if rows:
        tensors = (x, residual, scale, bias, weight, norm_bias, edit_ids, seed, y, z, mean, rstd)
        numbers = (rows, _count(scale, bias, edit_ids), *_dropout(seed, p), eps, offset)
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
    dy, dz, z, x, residual = _dense(dy), _maybe(dz), _maybe(z), _maybe(x), _maybe(residual)
    scale, bias, weight, norm_bias = _maybe(scale), _maybe(bias), _maybe(norm.weight), _maybe(norm.bias)
    d = dy.shape[-1]
    rows = dy.numel() // d
    dx = torch.empty_like(dy) if needs[0] else None
    dresidual = torch.empty_like(dy) if needs[1] else None
    if not rows:
        found = (*_no_sums(dy, needs[2:4], edit_ids, n_edits), *_no_sums(dy, needs[4:], None, 1))
        return dx, dresidual, *found
    chip, size = architecture(dy), dy.element_size()
    by_edit = edit_ids is not None and any(needs[2:4])
    tile = rules.norm_backward(d, size, chip, sum(needs[2:]) + (seed is not None) + (z is None) + 2 * by_edit)
    slab = rules.wide_backward(d, size, chip)
    slabs = 1 if tile is not None else -(-d // slab.chunk)
    work = _work(dy, rows, tile or slab, slabs, edit_ids, n_edits, needs[2], needs[3])
    norm_lines = tuple(_lines(dy, work.programs) if need else None for need in needs[4:])
    drop = _dropout(seed, p)
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
        _wide_averages(
            (rows, 1, 1),
            (dy, z, x, residual, scale, bias, weight, _maybe(edit_ids), *saved, averages),
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
    return dx, dresidual, *_finish(work, norm_lines, dy, n_edits)


class _Work(NamedTuple):
    """How a backward's rows are dealt out, and the buffers that its programs sum into; see :mod:`.device`."""

    programs: int  # for each slab
    ids: Tensor | None  # of each row, or sorted if there is an order
    order: Tensor | None  # the row at each place
    offsets: Tensor | None  # the place where each edit begins
    owners: Tensor | None
    length: int  # rows of a worker, 0 without an order
    edit_lines: tuple[Tensor | None, Tensor | None]  # for scale and bias


def _work(
    like: Tensor,
    rows: int,
    tile: rules.RowTile | rules.SlabTile,
    slabs: int,
    edit_ids: Tensor | None,
    n_edits: int,
    need_scale: bool,
    need_bias: bool,
) -> _Work:
    programs = max(1, min(tile.programs * architecture(like).multiprocessors // slabs, -(-rows // tile.rows)))
    ids = None if edit_ids is None else _dense(edit_ids).reshape(-1)
    if ids is None or not (need_scale or need_bias):
        lines = (_lines(like, programs) if need_scale else None, _lines(like, programs) if need_bias else None)
        return _Work(programs, ids, None, None, None, 0, lines)
    # A worker has some rows, so that not every row has a line of its own to be written and read.
    programs = min(programs, -(-rows // (tile.rows * _LEAST_STRETCH)))
    ids, order = torch.sort(ids, stable=True)
    offsets = torch.searchsorted(ids, torch.arange(n_edits + 1, dtype=ids.dtype, device=ids.device))
    workers = programs * tile.rows
    owners = torch.empty(2 * workers, dtype=torch.int64, device=ids.device)
    count = n_edits + 2 * workers
    lines = (_lines(like, count) if need_scale else None, _lines(like, count) if need_bias else None)
    return _Work(programs, ids, order, offsets, owners, -(-rows // workers), lines)


def _finish(
    work: _Work, norm_lines: tuple[Tensor | None, ...], like: Tensor, n_edits: int
) -> tuple[Tensor | None, ...]:
    """Add up what the programs left: the gradients of scale and bias, and those of the norm's vectors."""
    d, chip = like.shape[-1], architecture(like)
    edit_outs: tuple[Tensor | None, ...] = ()
    plain = (*work.edit_lines, *norm_lines)
    if work.order is not None:
        plain = norm_lines
        edit_outs = tuple(None if t is None else _lines(like, n_edits) for t in work.edit_lines)
        ins, outs = [t for t in work.edit_lines if t is not None], [t for t in edit_outs if t is not None]
        rest = [None] * (2 - len(ins))
        tile = rules.finish_edits(d, chip)
        _add_edits(
            (n_edits, -(-d // tile.chunk), len(ins)),
            (*ins, *rest, work.owners, work.offsets, *outs, *rest),
            (n_edits, work.length),
            (d, tile.rows, tile.chunk),
            tile.warps,
        )
    plain_outs = tuple(None if t is None else torch.empty(d, dtype=torch.float32, device=like.device) for t in plain)
    ins, outs = [t for t in plain if t is not None], [t for t in plain_outs if t is not None]
    if ins:
        rest = [None] * (4 - len(ins))
        tile = rules.finish(d, chip)
        _add_lines(
            (-(-d // tile.chunk), len(ins), 1),
            (*ins, *rest, *outs, *rest),
            (work.programs,),
            (d, tile.rows, tile.chunk),
            tile.warps,
        )
    return *edit_outs, *plain_outs


def _no_sums(like: Tensor, needs: tuple[bool, ...], edit_ids: Tensor | None, n_edits: int) -> tuple[Tensor | None, ...]:
    """The column sums of no rows."""
    shape = (like.shape[-1],) if edit_ids is None else (n_edits, like.shape[-1])
    return tuple(torch.zeros(shape, dtype=torch.float32, device=like.device) if need else None for need in needs)


def _statistic(x: Tensor) -> Tensor:
    """A number for each row. Sizes one by one take half the host time that a torch.Size does."""
    sizes = x.shape[:-1]
    if not sizes:
        return torch.empty((), dtype=torch.float32, device=x.device)
    return torch.empty(*sizes, dtype=torch.float32, device=x.device)


def _lines(like: Tensor, count: int) -> Tensor:
    return torch.empty(count, like.shape[-1], dtype=torch.float32, device=like.device)


def _dense(t: Tensor) -> Tensor:
    return t if t.is_contiguous() else t.contiguous()


def _maybe(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _count(scale: Tensor | None, bias: Tensor | None, edit_ids: Tensor | None) -> int:
    """How many edits there are to choose from."""
    if edit_ids is None:
        return 1
    vectors = scale if scale is not None else bias
    return 1 if vectors is None else vectors.shape[0]


def _dropout(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    """The least word that is kept, and the factor of what is kept."""
    if seed is None:
        return 0, 1.0
    threshold = round(dropout_p * 2**32)
    if threshold == 2**32:  # nothing is kept, and no word of 32 bits says so
        return 0, 0.0
    return threshold, 1.0 / (1.0 - dropout_p)
