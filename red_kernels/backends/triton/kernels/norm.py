"""Norms with an edit before or behind them, for rows that fit into the registers of a program.

One pair of kernels serves LayerNorm and RMSNorm (``mean`` or not) and both places of the edit: ``z = residual +
dropout(scale * x + bias)``, ``y = norm(z)``, or with ``EDIT_LAST`` ``y = scale * norm(x) + bias``. Absent arguments are
None, and are compiled away. Formulas: :mod:`red_kernels.backends.reference`.
"""

import triton
import triton.language as tl

from .device import (
    RUNTIME,
    edit_gradient,
    edited,
    finish_row,
    first_edit,
    flush_row,
    line_of,
    load,
    load_ids,
    load_row,
    over_width,
    places,
    reciprocal_root,
    store_edits,
    store_row,
    tiles,
    zero_row,
)
from .norm_math import affine, mean_from_value, moments, norm_gradient, norm_terms, stream


@triton.jit(do_not_specialize=RUNTIME)
def norm_forward(
    x, residual, scale, bias, weight, norm_bias, ids, seed, y, z, mean, rstd,
    rows: tl.int64, edits: tl.int64, threshold: tl.int64, factor: tl.float32, eps: tl.float32,
    weight_offset: tl.float32,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EDIT_LAST: tl.constexpr,
):  # fmt: skip
    """One tile for each program: reads x and residual once, writes y and, if requested, z."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    id = load_ids(ids, row, live) if ids is not None else None
    xs = load_row(x, row, live, D, CHUNK, CHUNKS)
    rs = load_row(residual, row, live, D, CHUNK, CHUNKS) if residual is not None else None
    zs = ()
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for c in tl.static_range(CHUNKS):
        if EDIT_LAST:
            v = xs[c].to(tl.float32)
        else:
            r = rs[c] if residual is not None else xs[c]
            v = stream(xs[c], xs[c], r, scale, bias, id, edits, seed, threshold, factor, row, c * CHUNK, D, ROWS, CHUNK,
                       False, residual is not None)  # fmt: skip
        zs = zs + (v,)
        total += v if mean is not None else v * v
    if z is not None:
        store_row(z, zs, row, live, D, CHUNK, CHUNKS)
    average = over_width(tl.sum(total, axis=1), D)
    if mean is not None:
        middle, average, sound = moments(zs, average, D, ROWS, CHUNK, CHUNKS)
        if tl.min(sound.to(tl.int32), axis=0) == 0:  # rare
            other, variance, _ = moments(zs, mean_from_value(zs, D, ROWS, CHUNK, CHUNKS), D, ROWS, CHUNK, CHUNKS)
            middle = tl.where(sound, middle, other)
            average = tl.where(sound, average, variance)
        tl.store(mean + row, middle, mask=live)
    scaled = reciprocal_root(average + eps)
    tl.store(rstd + row, scaled, mask=live)
    ys = ()
    for c in tl.static_range(CHUNKS):
        v = zs[c] - middle[:, None] if mean is not None else zs[c]
        v = affine(v * scaled[:, None], weight, norm_bias, weight_offset, c * CHUNK, D, ROWS, CHUNK)
        if EDIT_LAST:
            v = edited(v, scale, bias, id, edits, None, threshold, factor, row, c * CHUNK, D, ROWS, CHUNK)
        ys = ys + (v.to(y.dtype.element_ty),)
    store_row(y, ys, row, live, D, CHUNK, CHUNKS)


@triton.jit
def _inputs(dy, dz, z, x, residual, row, live, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """A piece of every input. An absent input is replaced by that of ``dy``, since a tuple cannot contain None."""
    a = load(dy, row, live, first, D, CHUNK)
    b = load(dz, row, live, first, D, CHUNK) if dz is not None else a
    c = load(z, row, live, first, D, CHUNK) if z is not None else a
    d = load(x, row, live, first, D, CHUNK) if x is not None else a
    e = load(residual, row, live, first, D, CHUNK) if residual is not None else a
    return a, b, c, d, e


@triton.jit(do_not_specialize=RUNTIME)
def norm_backward(
    dy, dz, z, x, residual, scale, bias, weight, norm_bias, ids, order, owners, seed, mean, rstd,
    dx, dresidual, dscale, dbias, dweight, dnorm_bias,
    rows: tl.int64, edits: tl.int64, length: tl.int64, threshold: tl.int64, factor: tl.float32,
    weight_offset: tl.float32,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EDIT_LAST: tl.constexpr,
):  # fmt: skip
    """A persistent grid. ``dscale`` to ``dnorm_bias`` are the buffers of column sums, None if not requested.

    With ``order`` the rows are read in the order of their ``ids``, which are sorted. Ids without order are unsorted,
    and serve if no sum is kept for each edit.
    """
    SORTED: tl.constexpr = order is not None
    if dscale is not None:
        sum_scale = zero_row(ROWS, CHUNK, CHUNKS)
    if dbias is not None:
        sum_bias = zero_row(ROWS, CHUNK, CHUNKS)
    if dweight is not None:
        sum_weight = zero_row(ROWS, CHUNK, CHUNKS)
    if dnorm_bias is not None:
        sum_norm_bias = zero_row(ROWS, CHUNK, CHUNKS)
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
        held = ()
        for c in tl.static_range(CHUNKS):
            held = held + (_inputs(dy, dz, z, x, residual, row, live, c * CHUNK, D, CHUNK),)
        scaled = tl.load(rstd + row, mask=live, other=0.0)
        middle = tl.load(mean + row, mask=live, other=0.0) if mean is not None else None
        # All loads are issued before any is awaited: x and dz too, although they are used only after the row's sums.
        # Without this barrier the assembler moves their loads down to the use, to save registers.
        tl.debug_barrier()
        if SORTED:
            done = live & (id != current)
            if tl.max(done.to(tl.int32), axis=0) > 0:  # rare: then the sums change threads to be written
                line = line_of(current, changes, edits, ROWS)
                if dscale is not None:
                    sum_scale = flush_row(dscale, sum_scale, line, done, D, CHUNK, CHUNKS)
                if dbias is not None:
                    sum_bias = flush_row(dbias, sum_bias, line, done, D, CHUNK, CHUNKS)
                changes += done.to(tl.int32)
                current = tl.where(live, id, current)

        products = tl.zeros([ROWS, CHUNK], tl.float32)
        plain = tl.zeros([ROWS, CHUNK], tl.float32)
        for c in tl.static_range(CHUNKS):
            v = stream(held[c][2], held[c][3], held[c][4], scale, bias, id, edits, seed, threshold, factor, row,
                       c * CHUNK, D, ROWS, CHUNK, z is not None, residual is not None)  # fmt: skip
            normed, g, weighted = norm_terms(held[c][0], v, scale, weight, id, edits, weight_offset, middle, scaled,
                                             c * CHUNK, D, ROWS, CHUNK, EDIT_LAST)  # fmt: skip
            products += normed * weighted
            plain += weighted
        c1 = over_width(tl.sum(products, axis=1), D)
        c2 = over_width(tl.sum(plain, axis=1), D) if mean is not None else None

        new_scale, new_bias, new_weight, new_norm_bias = (), (), (), ()
        dxs, dresiduals = (), ()
        for c in tl.static_range(CHUNKS):
            v = stream(held[c][2], held[c][3], held[c][4], scale, bias, id, edits, seed, threshold, factor, row,
                       c * CHUNK, D, ROWS, CHUNK, z is not None, residual is not None)  # fmt: skip
            normed, g, weighted = norm_terms(held[c][0], v, scale, weight, id, edits, weight_offset, middle, scaled,
                                             c * CHUNK, D, ROWS, CHUNK, EDIT_LAST)  # fmt: skip
            if dweight is not None:
                new_weight = new_weight + (sum_weight[c] + g * normed,)
            if dnorm_bias is not None:
                new_norm_bias = new_norm_bias + (sum_norm_bias[c] + g,)
            total = norm_gradient(normed, weighted, scaled, c1, c2, mean is not None)
            if EDIT_LAST:
                edit, gx = held[c][0].to(tl.float32), total
                h = affine(normed, weight, norm_bias, weight_offset, c * CHUNK, D, ROWS, CHUNK)
            else:
                if dz is not None:
                    total = total + held[c][1].to(tl.float32)
                gx, edit = edit_gradient(total, scale, id, edits, seed, threshold, factor, row, c * CHUNK,
                                         D, ROWS, CHUNK, dx is not None)  # fmt: skip
                h = held[c][3].to(tl.float32)
            if dscale is not None:
                new_scale = new_scale + (sum_scale[c] + edit * h,)
            if dbias is not None:
                new_bias = new_bias + (sum_bias[c] + edit,)
            dxs = dxs + (gx.to(dy.dtype.element_ty),)
            dresiduals = dresiduals + (total.to(dy.dtype.element_ty),)
        if dx is not None:
            store_row(dx, dxs, row, live, D, CHUNK, CHUNKS)
        if dresidual is not None:
            store_row(dresidual, dresiduals, row, live, D, CHUNK, CHUNKS)
        if dscale is not None:
            sum_scale = new_scale
        if dbias is not None:
            sum_bias = new_bias
        if dweight is not None:
            sum_weight = new_weight
        if dnorm_bias is not None:
            sum_norm_bias = new_norm_bias
    if SORTED:
        store_edits(owners, opening, current, changes, ROWS)
    if dscale is not None:
        finish_row(dscale, sum_scale, edits, D, ROWS, CHUNK, CHUNKS, SORTED)
    if dbias is not None:
        finish_row(dbias, sum_bias, edits, D, ROWS, CHUNK, CHUNKS, SORTED)
    if dweight is not None:
        finish_row(dweight, sum_weight, edits, D, ROWS, CHUNK, CHUNKS, False)
    if dnorm_bias is not None:
        finish_row(dnorm_bias, sum_norm_bias, edits, D, ROWS, CHUNK, CHUNKS, False)
