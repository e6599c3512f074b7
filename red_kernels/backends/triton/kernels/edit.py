"""The edit and the residual add behind it. Rows are independent columnwise, so a program has a slab of columns.

``z = residual + dropout(scale * x + bias)``. Absent arguments are None, and are compiled away. Formulas:
:mod:`red_kernels.backends.reference`.
"""

import triton
import triton.language as tl

from .device import (
    RUNTIME,
    edit_gradient,
    edited,
    finish,
    first_edit,
    flush,
    line_of,
    load,
    load_ids,
    places,
    store,
    store_edits,
    tiles,
)


@triton.jit(do_not_specialize=RUNTIME)
def edit_forward(
    x, residual, scale, bias, ids, seed, z,
    rows: tl.int64, edits: tl.int64, threshold: tl.int64, factor: tl.float32,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile for each program; the grid is (tiles, slabs)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * CHUNK
    live = row < rows
    id = load_ids(ids, row, live) if ids is not None else None
    h = load(x, row, live, first, D, CHUNK)
    r = load(residual, row, live, first, D, CHUNK) if residual is not None else None
    h = edited(h, scale, bias, id, edits, seed, threshold, factor, row, first, D, ROWS, CHUNK)
    if residual is not None:
        h = r.to(tl.float32) + h
    store(z, h, row, live, first, D, CHUNK)


@triton.jit(do_not_specialize=RUNTIME)
def edit_backward(
    dz, x, scale, ids, order, owners, seed, dx, dscale, dbias,
    rows: tl.int64, edits: tl.int64, length: tl.int64, threshold: tl.int64, factor: tl.float32,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The grid is (programs for each slab, slabs); ``dscale`` and ``dbias`` are the buffers of column sums, or None.

    With ``order`` the rows are read in the order of their ``ids``, which are then sorted.
    """
    SORTED: tl.constexpr = order is not None
    first = tl.program_id(1) * CHUNK
    sum_scale = tl.zeros([ROWS, CHUNK], tl.float32)
    sum_bias = tl.zeros([ROWS, CHUNK], tl.float32)
    if SORTED:
        current = first_edit(ids, rows, length, ROWS)
        opening = current
        changes = tl.zeros([ROWS], tl.int32)
    begin, end, step = tiles(rows, length, ROWS, SORTED)
    for tile in range(begin, end, step):
        place = places(tile, length, ROWS, SORTED)
        live = place < rows
        row = tl.load(order + place, mask=live, other=0) if SORTED else place
        id = load_ids(ids, place, live) if ids is not None else None
        g = load(dz, row, live, first, D, CHUNK)
        h = load(x, row, live, first, D, CHUNK) if x is not None else g
        if SORTED:
            done = live & (id != current)
            if tl.max(done.to(tl.int32), axis=0) > 0:  # rare: then the sums change threads to be written
                line = line_of(current, changes, edits, ROWS)
                if dscale is not None:
                    sum_scale = flush(dscale, sum_scale, line, done, first, D, CHUNK)
                if dbias is not None:
                    sum_bias = flush(dbias, sum_bias, line, done, first, D, CHUNK)
                changes += done.to(tl.int32)
                current = tl.where(live, id, current)
        gx, edit = edit_gradient(g.to(tl.float32), scale, id, edits, seed, threshold, factor, row, first,
                                 D, ROWS, CHUNK, dx is not None)  # fmt: skip
        if dscale is not None:
            sum_scale += edit * h.to(tl.float32)
        if dbias is not None:
            sum_bias += edit
        if dx is not None:
            store(dx, gx, row, live, first, D, CHUNK)
    if SORTED:
        if tl.program_id(1) == 0:
            store_edits(owners, opening, current, changes, ROWS)
    if dscale is not None:
        finish(dscale, sum_scale, edits, first, D, ROWS, CHUNK, SORTED)
    if dbias is not None:
        finish(dbias, sum_bias, edits, first, D, ROWS, CHUNK, SORTED)
