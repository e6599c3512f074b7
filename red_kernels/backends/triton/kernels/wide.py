"""Norms with an edit before or behind them, for rows too wide for the registers of a program: piece by piece.

The same arguments and results as in :mod:`.norm`. Forward, a program reads its row twice, the second time through the
cache. Backward, one kernel computes the two averages of each row for its gradient; with these every column is
independent, as in :mod:`.edit`: 8 passes over an activation instead of 6.
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
    over_width,
    places,
    reciprocal_root,
    store,
    store_edits,
    tiles,
)
from .norm_math import affine, norm_gradient, norm_terms, stream


@triton.jit(do_not_specialize=RUNTIME)
def wide_forward(
    x, residual, scale, bias, weight, norm_bias, ids, seed, y, z, mean, rstd,
    rows: tl.int64, edits: tl.int64, threshold: tl.int64, factor: tl.float32, eps: tl.float32,
    weight_offset: tl.float32,
    D: tl.constexpr, CHUNK: tl.constexpr, EDIT_LAST: tl.constexpr,
):  # fmt: skip
    """One row for each program."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = row < rows
    id = load_ids(ids, row, live) if ids is not None else None
    squares = tl.zeros([1, CHUNK], tl.float32)
    spread = tl.zeros([1], tl.float32)
    near = tl.zeros([1], tl.float32)
    middle = tl.zeros([1], tl.float32)
    count = tl.zeros([1], tl.float32)
    for first in range(0, D, CHUNK):
        v = load(x, row, live, first, D, CHUNK)
        if EDIT_LAST:
            v = v.to(tl.float32)
        else:
            r = load(residual, row, live, first, D, CHUNK) if residual is not None else v
            v = stream(v, v, r, scale, bias, id, edits, seed, threshold, factor, row, first, D, 1, CHUNK,
                       False, residual is not None)  # fmt: skip
            if z is not None:
                store(z, v, row, live, first, D, CHUNK)
        if mean is not None:
            # Mean and squared distances of the piece are joined to those so far (Chan et al. 1983). A large mean costs
            # no digits, since all values are relative to one value of the row, from which equal values have no
            # distance. It is the value nearest to the first piece's mean, since another may be an outlier.
            lane = tl.arange(0, CHUNK)
            inside = (first + lane < D)[None, :]
            n = tl.full([1], 0.0, tl.float32) + tl.minimum(D - first, CHUNK)
            if first == 0:
                rough = tl.sum(tl.where(inside, v, 0.0) / n[:, None], axis=1)
                far = tl.where(inside, tl.abs(v - rough[:, None]), float("inf"))
                near = tl.max(tl.where(far == tl.min(far, axis=1)[:, None], v, float("-inf")), axis=1)
            average = near + tl.sum(tl.where(inside, v - near[:, None], 0.0) / n[:, None], axis=1)
            v = tl.where(inside, v - average[:, None], 0.0)
            lost = tl.sum(v, axis=1) / n
            away = average - near + lost - middle
            within = tl.sum(v * v, axis=1) - n * lost * lost
            spread += tl.where(within < 0.0, 0.0, within) + away * away * (count * n / (count + n))
            middle += away * (n / (count + n))
            count += n
        else:
            squares += v * v
    if mean is not None:
        middle = near + middle
        tl.store(mean + row, middle)
    else:
        spread = tl.sum(squares, axis=1)
    scaled = reciprocal_root(over_width(spread, D) + eps)
    tl.store(rstd + row, scaled)
    tl.debug_barrier()  # other threads' writes to z are read below
    for first in range(0, D, CHUNK):
        a = load(x, row, live, first, D, CHUNK) if z is None else load(z, row, live, first, D, CHUNK)
        if EDIT_LAST:
            v = a.to(tl.float32)
        else:
            r = load(residual, row, live, first, D, CHUNK) if z is None and residual is not None else a
            v = stream(a, a, r, scale, bias, id, edits, seed, threshold, factor, row, first, D, 1, CHUNK,
                       z is not None, residual is not None)  # fmt: skip
        if mean is not None:
            v = v - middle[:, None]
        v = affine(v * scaled[:, None], weight, norm_bias, weight_offset, first, D, 1, CHUNK)
        if EDIT_LAST:
            v = edited(v, scale, bias, id, edits, None, threshold, factor, row, first, D, 1, CHUNK)
        store(y, v, row, live, first, D, CHUNK)


@triton.jit(do_not_specialize=RUNTIME)
def wide_averages(
    dy, z, x, residual, scale, bias, weight, ids, seed, mean, rstd, averages,
    rows: tl.int64, edits: tl.int64, threshold: tl.int64, factor: tl.float32, weight_offset: tl.float32,
    D: tl.constexpr, CHUNK: tl.constexpr, EDIT_LAST: tl.constexpr,
):  # fmt: skip
    """One row for each program: the averages of ``g * normed`` and of ``g``, g the weighted gradient: ``(2, rows)``."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = row < rows
    id = load_ids(ids, row, live) if ids is not None else None
    scaled = tl.load(rstd + row)
    middle = tl.load(mean + row) if mean is not None else None
    products = tl.zeros([1, CHUNK], tl.float32)
    plain = tl.zeros([1, CHUNK], tl.float32)
    for first in range(0, D, CHUNK):
        g = load(dy, row, live, first, D, CHUNK)
        a = load(x, row, live, first, D, CHUNK) if z is None else load(z, row, live, first, D, CHUNK)
        r = load(residual, row, live, first, D, CHUNK) if z is None and residual is not None else a
        v = stream(a, a, r, scale, bias, id, edits, seed, threshold, factor, row, first, D, 1, CHUNK,
                   z is not None, residual is not None)  # fmt: skip
        normed, _, weighted = norm_terms(g, v, scale, weight, id, edits, weight_offset, middle, scaled, first,
                                         D, 1, CHUNK, EDIT_LAST)  # fmt: skip
        products += normed * weighted
        plain += weighted
    tl.store(averages + row, over_width(tl.sum(products, axis=1), D))
    tl.store(averages + rows + row, over_width(tl.sum(plain, axis=1), D))


@triton.jit(do_not_specialize=RUNTIME)
def wide_backward(
    dy, dz, z, x, residual, scale, bias, weight, norm_bias, ids, order, owners, seed, mean, rstd, averages,
    dx, dresidual, dscale, dbias, dweight, dnorm_bias,
    rows: tl.int64, edits: tl.int64, length: tl.int64, threshold: tl.int64, factor: tl.float32,
    weight_offset: tl.float32,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, EDIT_LAST: tl.constexpr,
):  # fmt: skip
    """The grid is (programs for each slab, slabs), as in :func:`.edit.edit_backward`."""
    SORTED: tl.constexpr = order is not None
    first = tl.program_id(1) * CHUNK
    sum_scale = tl.zeros([ROWS, CHUNK], tl.float32)
    sum_bias = tl.zeros([ROWS, CHUNK], tl.float32)
    sum_weight = tl.zeros([ROWS, CHUNK], tl.float32)
    sum_norm_bias = tl.zeros([ROWS, CHUNK], tl.float32)
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
        g = load(dy, row, live, first, D, CHUNK)
        g2 = load(dz, row, live, first, D, CHUNK) if dz is not None else g
        v = load(z, row, live, first, D, CHUNK) if z is not None else g
        h = load(x, row, live, first, D, CHUNK) if x is not None else g
        r = load(residual, row, live, first, D, CHUNK) if residual is not None else g
        scaled = tl.load(rstd + row, mask=live, other=0.0)
        middle = tl.load(mean + row, mask=live, other=0.0) if mean is not None else None
        c1 = tl.load(averages + row, mask=live, other=0.0)
        c2 = tl.load(averages + rows + row, mask=live, other=0.0)
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
        v = stream(v, h, r, scale, bias, id, edits, seed, threshold, factor, row, first, D, ROWS, CHUNK,
                   z is not None, residual is not None)  # fmt: skip
        normed, gy, weighted = norm_terms(g, v, scale, weight, id, edits, weight_offset, middle, scaled, first,
                                          D, ROWS, CHUNK, EDIT_LAST)  # fmt: skip
        total = norm_gradient(normed, weighted, scaled, c1, c2, mean is not None)
        if EDIT_LAST:
            edit, gx = g.to(tl.float32), total
            h = affine(normed, weight, norm_bias, weight_offset, first, D, ROWS, CHUNK)
        else:
            if dz is not None:
                total = total + g2.to(tl.float32)
            gx, edit = edit_gradient(total, scale, id, edits, seed, threshold, factor, row, first,
                                     D, ROWS, CHUNK, dx is not None)  # fmt: skip
        if dscale is not None:
            sum_scale += edit * h.to(tl.float32)
        if dbias is not None:
            sum_bias += edit
        if dweight is not None:
            sum_weight += gy * normed
        if dnorm_bias is not None:
            sum_norm_bias += gy
        if dx is not None:
            store(dx, gx, row, live, first, D, CHUNK)
        if dresidual is not None:
            store(dresidual, total, row, live, first, D, CHUNK)
    if SORTED:
        if tl.program_id(1) == 0:
            store_edits(owners, opening, current, changes, ROWS)
    if dscale is not None:
        finish(dscale, sum_scale, edits, first, D, ROWS, CHUNK, SORTED)
    if dbias is not None:
        finish(dbias, sum_bias, edits, first, D, ROWS, CHUNK, SORTED)
    if dweight is not None:
        finish(dweight, sum_weight, edits, first, D, ROWS, CHUNK, False)
    if dnorm_bias is not None:
        finish(dnorm_bias, sum_norm_bias, edits, first, D, ROWS, CHUNK, False)
