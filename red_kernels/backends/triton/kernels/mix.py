"""Rotations and reflections with the residual add and the norm behind them: ``z = residual + dropout(mix(x))``.

One pair of kernels serves both formulas, with a norm and without. A program has either whole rows, or a slab of whole
blocks or pairs, which are independent of others. A backward with a norm then takes the averages of its rows from
:func:`.wide.wide_averages`. Blocks too wide for a program's registers take their dot products from :func:`mix_dots`,
with which every column is independent. Absent arguments are None, and are compiled away. Formulas:
:mod:`red_kernels.backends.reference`.
"""

import triton
import triton.language as tl

from .device import RUNTIME, first_edit, line_of, load_ids, places, reciprocal_root, store_edits, tiles
from .mix_math import (
    average,
    columns,
    dots,
    finish_pieces,
    flush_pieces,
    kept_piece,
    load_dots,
    load_piece,
    load_pieces,
    load_vector,
    mean_from_value,
    moments,
    normed_terms,
    slab,
    some_columns,
    store_pieces,
    zero_pieces,
)


@triton.jit
def norm_gradient(normed, weighted, rstd, c1, c2, CENTERED: tl.constexpr):
    """As :func:`.norm_math.norm_gradient`."""
    g = weighted - normed * c1[:, None, None]
    if CENTERED:
        g = g - c2[:, None, None]
    return g * rstd[:, None, None]


@triton.jit(do_not_specialize=RUNTIME)
def mix_forward(
    x, residual, first, second, bias, weight, norm_bias, ids, seed, along, y, z, mean, rstd,
    rows: tl.int64, edits: tl.int64, threshold: tl.int64, factor: tl.float32, eps: tl.float32,
    weight_offset: tl.float32,
    D: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """One tile for each program; the grid is (tiles, slabs), with ``y`` of one slab. ``along``: of :func:`mix_dots`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    id = load_ids(ids, row, live) if ids is not None else None
    block, offset = slab(D, BLOCKS, TOGETHER, CHUNK, CHUNKS)
    at = columns(block, offset, D, BLOCKS, TOGETHER, CHUNK, CHUNKS)
    xs = load_pieces(x, row, live, at, D, CHUNKS)
    rs = load_pieces(residual, row, live, at, D, CHUNKS) if residual is not None else xs
    if BLOCKS > 0:
        if along is not None:
            of_first = load_dots(along, 0, rows, row, live, block, BLOCKS)
        else:
            of_first = dots(first, id, edits, xs, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)
        if second is not None:
            if along is not None:
                of_second = load_dots(along, 1, rows, row, live, block, BLOCKS)
            else:
                of_second = dots(second, id, edits, xs, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)
    zs = ()
    total = tl.zeros([ROWS, TOGETHER, CHUNK], tl.float32)
    for c in tl.static_range(CHUNKS):
        h = xs[c].to(tl.float32)
        u = load_vector(first, id, edits, at[c], D, ROWS)
        if BLOCKS > 0:
            h = h - u * of_first[:, :, None]
            if second is not None:
                h = h + load_vector(second, id, edits, at[c], D, ROWS) * of_second[:, :, None]
        else:
            h = u * h + load_vector(second, id, edits, at[c], D, ROWS) * xs[c ^ 1].to(tl.float32)
        if bias is not None:
            h = h + load_vector(bias, id, edits, at[c], D, ROWS)
        if seed is not None:
            h = h * kept_piece(seed, row, block, offset, c, threshold, factor, D, BLOCKS, ROWS, TOGETHER, CHUNK)
        if residual is not None:
            h = rs[c].to(tl.float32) + h
        h = h.to(z.dtype.element_ty).to(tl.float32)  # the norm reads the stored value
        zs = zs + (h,)
        total += h if mean is not None else h * h
    store_pieces(z, zs, row, live, at, D, CHUNKS)
    if y is not None:
        found = average(total, D)
        if mean is not None:
            middle, found, sound = moments(zs, found, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)
            if tl.min(sound.to(tl.int32), axis=0) == 0:  # rare
                other = mean_from_value(zs, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)
                other, variance, _ = moments(zs, other, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)
                middle = tl.where(sound, middle, other)
                found = tl.where(sound, found, variance)
            tl.store(mean + row, middle, mask=live)
        scaled = reciprocal_root(found + eps)
        tl.store(rstd + row, scaled, mask=live)
        ys = ()
        for c in tl.static_range(CHUNKS):
            v = zs[c] - middle[:, None, None] if mean is not None else zs[c]
            v = v * scaled[:, None, None]
            if weight is not None:
                v = v * (load_vector(weight, None, 0, at[c], D, ROWS) + weight_offset)
            if norm_bias is not None:
                v = v + load_vector(norm_bias, None, 0, at[c], D, ROWS)
            ys = ys + (v.to(y.dtype.element_ty),)
        store_pieces(y, ys, row, live, at, D, CHUNKS)


@triton.jit(do_not_specialize=RUNTIME)
def mix_dots(
    dy, dz, z, x, first, second, weight, ids, seed, mean, rstd, averages, along,
    rows: tl.int64, edits: tl.int64, threshold: tl.int64, factor: tl.float32, weight_offset: tl.float32,
    D: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One block of one row for each program, piece by piece: the dot products of ``first`` and ``second`` with the
    gradient behind the norm and the dropout, or with ``dy`` without both, and with ``x``: ``(4, rows, BLOCKS)``. The
    grid is (rows, blocks)."""
    WIDTH: tl.constexpr = D // BLOCKS
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live = row < rows
    id = load_ids(ids, row, live) if ids is not None else None
    block = tl.program_id(1) + tl.arange(0, 1)
    if rstd is not None:
        scaled = tl.load(rstd + row)
        middle = tl.load(mean + row) if mean is not None else None
        c1 = tl.load(averages + row)
        c2 = tl.load(averages + rows + row)
    first_g = tl.zeros([1, 1, CHUNK], tl.float32)
    second_g = tl.zeros([1, 1, CHUNK], tl.float32)
    first_x = tl.zeros([1, 1, CHUNK], tl.float32)
    second_x = tl.zeros([1, 1, CHUNK], tl.float32)
    for offset in range(0, WIDTH, CHUNK):
        at = some_columns(block, offset, 0, D, BLOCKS, 1, CHUNK, 1)
        g = load_piece(dy, row, live, at, D).to(tl.float32)
        if rstd is not None:
            v = load_piece(z, row, live, at, D)
            normed, _, weighted = normed_terms(g, v, weight, weight_offset, middle, scaled, at, D, 1)
            g = norm_gradient(normed, weighted, scaled, c1, c2, mean is not None)
            if dz is not None:
                g = g + load_piece(dz, row, live, at, D).to(tl.float32)
        if seed is not None:
            g = g * kept_piece(seed, row, block, offset, 0, threshold, factor, D, BLOCKS, 1, 1, CHUNK)
        u = load_vector(first, id, edits, at, D, 1)
        first_g += u * g
        if x is not None:
            h = load_piece(x, row, live, at, D).to(tl.float32)
            first_x += u * h
        if second is not None:
            u = load_vector(second, id, edits, at, D, 1)
            second_g += u * g
            if x is not None:
                second_x += u * h
    place = (row * BLOCKS)[:, None] + block[None, :]
    tl.store(along + place, tl.sum(first_g, axis=2))
    if second is not None:
        tl.store(along + rows * BLOCKS + place, tl.sum(second_g, axis=2))
    if x is not None:
        tl.store(along + 2 * rows * BLOCKS + place, tl.sum(first_x, axis=2))
        if second is not None:
            tl.store(along + 3 * rows * BLOCKS + place, tl.sum(second_x, axis=2))


@triton.jit
def _inputs(dy, dz, z, x, row, live, at, D: tl.constexpr):
    """A piece of every input. An absent input is replaced by that of ``dy``, since a tuple cannot contain None."""
    a = load_piece(dy, row, live, at, D)
    b = load_piece(dz, row, live, at, D) if dz is not None else a
    c = load_piece(z, row, live, at, D) if z is not None else a
    d = load_piece(x, row, live, at, D) if x is not None else a
    return a, b, c, d


@triton.jit(do_not_specialize=RUNTIME)
def mix_backward(
    dy, dz, z, x, first, second, weight, ids, order, owners, seed, mean, rstd, averages, along,
    dx, dresidual, dfirst, dsecond, dbias, dweight, dnorm_bias,
    rows: tl.int64, edits: tl.int64, length: tl.int64, threshold: tl.int64, factor: tl.float32,
    weight_offset: tl.float32,
    D: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The grid is (programs for each slab, slabs). Without a norm (``rstd``) ``dy`` is the gradient of ``z``.

    ``averages`` and ``along`` come from :func:`.wide.wide_averages` and :func:`mix_dots`; without them the tile has
    whole rows, or whole blocks. ``dfirst`` to ``dnorm_bias`` are the buffers of column sums. With ``order`` the rows
    are read in the order of their ``ids``, which are then sorted.
    """
    SORTED: tl.constexpr = order is not None
    OF_FIRST: tl.constexpr = dx is not None or dfirst is not None
    OF_SECOND: tl.constexpr = second is not None and (dx is not None or dsecond is not None)
    block, offset = slab(D, BLOCKS, TOGETHER, CHUNK, CHUNKS)
    at = columns(block, offset, D, BLOCKS, TOGETHER, CHUNK, CHUNKS)
    if dfirst is not None:
        sum_first = zero_pieces(ROWS, TOGETHER, CHUNK, CHUNKS)
    if dsecond is not None:
        sum_second = zero_pieces(ROWS, TOGETHER, CHUNK, CHUNKS)
    if dbias is not None:
        sum_bias = zero_pieces(ROWS, TOGETHER, CHUNK, CHUNKS)
    if dweight is not None:
        sum_weight = zero_pieces(ROWS, TOGETHER, CHUNK, CHUNKS)
    if dnorm_bias is not None:
        sum_norm_bias = zero_pieces(ROWS, TOGETHER, CHUNK, CHUNKS)
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
            held = held + (_inputs(dy, dz, z, x, row, live, at[c], D),)
        if rstd is not None:
            scaled = tl.load(rstd + row, mask=live, other=0.0)
            middle = tl.load(mean + row, mask=live, other=0.0) if mean is not None else None
        tl.debug_barrier()  # all loads are issued before any is awaited; see norm.py
        if SORTED:
            done = live & (id != current)
            if tl.max(done.to(tl.int32), axis=0) > 0:  # rare: then the sums change threads to be written
                line = line_of(current, changes, edits, ROWS)
                if dfirst is not None:
                    sum_first = flush_pieces(dfirst, sum_first, line, done, at, D, CHUNKS)
                if dsecond is not None:
                    sum_second = flush_pieces(dsecond, sum_second, line, done, at, D, CHUNKS)
                if dbias is not None:
                    sum_bias = flush_pieces(dbias, sum_bias, line, done, at, D, CHUNKS)
                changes += done.to(tl.int32)
                current = tl.where(live, id, current)

        if rstd is not None:
            if averages is not None:
                c1 = tl.load(averages + row, mask=live, other=0.0)
                c2 = tl.load(averages + rows + row, mask=live, other=0.0)
            else:
                products = tl.zeros([ROWS, TOGETHER, CHUNK], tl.float32)
                plain = tl.zeros([ROWS, TOGETHER, CHUNK], tl.float32)
                for c in tl.static_range(CHUNKS):
                    normed, _, weighted = normed_terms(held[c][0], held[c][2], weight, weight_offset, middle, scaled,
                                                       at[c], D, ROWS)  # fmt: skip
                    products += normed * weighted
                    plain += weighted
                c1 = average(products, D)
                c2 = average(plain, D) if mean is not None else None

        gs, xs, dresiduals = (), (), ()
        new_weight, new_norm_bias = (), ()
        for c in tl.static_range(CHUNKS):
            g = held[c][0].to(tl.float32)
            if rstd is not None:
                normed, gy, weighted = normed_terms(g, held[c][2], weight, weight_offset, middle, scaled, at[c], D,
                                                    ROWS)  # fmt: skip
                if dweight is not None:
                    new_weight = new_weight + (sum_weight[c] + gy * normed,)
                if dnorm_bias is not None:
                    new_norm_bias = new_norm_bias + (sum_norm_bias[c] + gy,)
                g = norm_gradient(normed, weighted, scaled, c1, c2, mean is not None)
                if dz is not None:
                    g = g + held[c][1].to(tl.float32)
                dresiduals = dresiduals + (g.to(dy.dtype.element_ty),)
            if seed is not None:
                g = g * kept_piece(seed, row, block, offset, c, threshold, factor, D, BLOCKS, ROWS, TOGETHER, CHUNK)
            gs = gs + (g,)
            xs = xs + (held[c][3],)
        if dresidual is not None:
            store_pieces(dresidual, dresiduals, row, live, at, D, CHUNKS)
        if dweight is not None:
            sum_weight = new_weight
        if dnorm_bias is not None:
            sum_norm_bias = new_norm_bias

        if BLOCKS > 0:
            if OF_FIRST:
                if along is not None:
                    first_g = load_dots(along, 0, rows, row, live, block, BLOCKS)
                else:
                    first_g = dots(first, id, edits, gs, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)
            if OF_SECOND:
                if along is not None:
                    second_g = load_dots(along, 1, rows, row, live, block, BLOCKS)
                else:
                    second_g = dots(second, id, edits, gs, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)
            if dfirst is not None:
                if along is not None:
                    first_x = load_dots(along, 2, rows, row, live, block, BLOCKS)
                else:
                    first_x = dots(first, id, edits, xs, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)
            if dsecond is not None:
                if along is not None:
                    second_x = load_dots(along, 3, rows, row, live, block, BLOCKS)
                else:
                    second_x = dots(second, id, edits, xs, at, D, ROWS, TOGETHER, CHUNK, CHUNKS)

        new_first, new_second, new_bias = (), (), ()
        dxs = ()
        for c in tl.static_range(CHUNKS):
            g = gs[c]
            if dx is not None:
                if BLOCKS > 0:
                    gx = g - load_vector(first, id, edits, at[c], D, ROWS) * first_g[:, :, None]
                    if second is not None:
                        gx = gx + load_vector(second, id, edits, at[c], D, ROWS) * second_g[:, :, None]
                else:
                    gx = g * load_vector(first, id, edits, at[c], D, ROWS)
                    gx = gx + load_vector(second, id, edits, at[c ^ 1], D, ROWS) * gs[c ^ 1]
                dxs = dxs + (gx.to(dy.dtype.element_ty),)
            if dfirst is not None:
                h = xs[c].to(tl.float32)
                if BLOCKS > 0:
                    h = -(first_x[:, :, None] * g + first_g[:, :, None] * h)
                else:
                    h = g * h
                new_first = new_first + (sum_first[c] + h,)
            if dsecond is not None:
                if BLOCKS > 0:
                    h = second_x[:, :, None] * g + second_g[:, :, None] * xs[c].to(tl.float32)
                else:
                    h = g * xs[c ^ 1].to(tl.float32)
                new_second = new_second + (sum_second[c] + h,)
            if dbias is not None:
                new_bias = new_bias + (sum_bias[c] + g,)
        if dx is not None:
            store_pieces(dx, dxs, row, live, at, D, CHUNKS)
        if dfirst is not None:
            sum_first = new_first
        if dsecond is not None:
            sum_second = new_second
        if dbias is not None:
            sum_bias = new_bias
    if SORTED:
        if tl.program_id(1) == 0:
            store_edits(owners, opening, current, changes, ROWS)
    if dfirst is not None:
        finish_pieces(dfirst, sum_first, edits, at, D, ROWS, CHUNKS, SORTED)
    if dsecond is not None:
        finish_pieces(dsecond, sum_second, edits, at, D, ROWS, CHUNKS, SORTED)
    if dbias is not None:
        finish_pieces(dbias, sum_bias, edits, at, D, ROWS, CHUNKS, SORTED)
    if dweight is not None:
        finish_pieces(dweight, sum_weight, edits, at, D, ROWS, CHUNKS, False)
    if dnorm_bias is not None:
        finish_pieces(dnorm_bias, sum_norm_bias, edits, at, D, ROWS, CHUNKS, False)
