"""Common device functions of the kernels: loading, editing, dropout and sums of pieces of rows.

A tile is ``ROWS`` rows by ``CHUNK`` columns from ``first`` on. A kernel that needs whole rows has several such pieces
of each, in a tuple: 5,120 columns take five pieces of 1,024 instead of 8,192 lanes.

Sums over rows are in fp32, in a buffer ``(lines, D)``. A plain sum has one line for each program. With edit_ids the
rows are in the order of their ids. Each row of a tile (a worker) has a stretch of that order, so a worker meets an edit
once. There is a line for each edit that begins and ends within one worker. Behind these lines each worker has two: for
its first and its last edit, which its neighbours may share.
"""

import triton
import triton.language as tl

NO_ROW = tl.constexpr(-2)
RUNTIME = ["rows", "edits", "length", "threshold", "lines"]  # arguments without specialisation


@triton.jit
def over_width(total, D: tl.constexpr):
    """``total / D``, rounded to nearest, unlike a plain division on a GPU; and without the code of a division.

    It multiplies by the reciprocal, and corrects once by the remainder. For whole D < 2^21 the remainder is exact,
    since it is less than 2 D units in the last place of the quotient. The corrected quotient is within 2^-23 of such a
    unit from ``total / D``, which is never a tie, and at least 2^-22 from one. For subnormal results a tie may go up or
    down; -0 becomes 0.
    """
    about = total * (1.0 / D)
    if D & (D - 1) == 0:
        return about
    else:
        rest = tl.fma(about, -1.0 * D, total)
        near = tl.fma(rest, 1.0 / D, about)
        return tl.where(rest == rest, near, about)  # an infinite one leaves inf - inf


@triton.jit
def reciprocal_root(v):
    """``1 / sqrt(v)``, with its root and its division rounded to nearest."""
    return tl.div_rn(1.0, tl.sqrt_rn(v))


@triton.jit
def load(p, row, live, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """A piece of the rows as stored; 0 beyond them."""
    cols = first + tl.arange(0, CHUNK)
    p = (p + row * D)[:, None] + cols[None, :]
    if D % CHUNK == 0:
        return tl.load(p, mask=live[:, None], other=0.0)
    else:
        return tl.load(p, mask=live[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def load_row(p, row, live, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """All pieces of the rows as stored. Kernels load all inputs before they store: loads do not cross stores."""
    found = ()
    for c in tl.static_range(CHUNKS):
        found = found + (load(p, row, live, c * CHUNK, D, CHUNK),)
    return found


@triton.jit
def store(p, value, row, live, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """Write the part of a piece within the rows, rounded to the dtype of ``p``."""
    cols = first + tl.arange(0, CHUNK)
    value = value.to(p.dtype.element_ty)
    p = (p + row * D)[:, None] + cols[None, :]
    if D % CHUNK == 0:
        tl.store(p, value, mask=live[:, None])
    else:
        tl.store(p, value, mask=live[:, None] & (cols < D)[None, :])


@triton.jit
def store_row(p, values, row, live, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """:func:`store` for all pieces."""
    for c in tl.static_range(CHUNKS):
        store(p, values[c], row, live, c * CHUNK, D, CHUNK)


@triton.jit
def load_vector(p, first, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """A piece of a vector in fp32, repeated for each row: every thread loads its own values, without waiting."""
    cols = first + tl.arange(0, CHUNK)
    p = p + tl.zeros([ROWS, 1], tl.int32) + cols[None, :]
    if D % CHUNK == 0:
        return tl.load(p, eviction_policy="evict_last").to(tl.float32)
    else:
        return tl.load(p, mask=(cols < D)[None, :], other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def load_ids(ids, place, live):
    """The edits of some rows: -1 for each id without an edit (all negative ones), and NO_ROW for no row.

    Beyond the rows no edit may be read: its NaN or infinite values would enter the sums.
    """
    return tl.where(live, tl.maximum(tl.load(ids + place, mask=live, other=0), -1), NO_ROW)


@triton.jit
def load_edit(p, ids, edits, first, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """A piece of an edit vector in fp32; with ``ids`` of each row's own edit: NaN if there is none, 0 for no row."""
    if ids is None:
        return load_vector(p, first, D, ROWS, CHUNK)
    else:
        known = (ids >= 0) & (ids < edits)
        value = load(p, tl.where(known, ids, 0), known, first, D, CHUNK)
        return tl.where((known | (ids == NO_ROW))[:, None], value.to(tl.float32), float("nan"))


@triton.jit
def kept(seed, row, first, threshold, factor, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """The dropout factors of a piece: ``factor`` if Philox's word reaches ``threshold``, else 0.

    Column ``j`` of row ``i`` takes word ``j % 4`` for the counter ``(j // 4, i, i >> 32, 0)``, as in the reference.
    """
    QUADS: tl.constexpr = (CHUNK + 3) // 4
    quad = (first // 4 + tl.arange(0, QUADS)).to(tl.uint32)[None, :] + tl.zeros([ROWS, 1], tl.uint32)
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None] + tl.zeros([1, QUADS], tl.uint32)
    high = (row >> 32).to(tl.uint32)[:, None] + tl.zeros([1, QUADS], tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), quad, low, high, tl.zeros_like(low))
    if CHUNK >= 4:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, CHUNK])
    else:
        words = tl.where(tl.arange(0, CHUNK)[None, :] == 0, w0, w1)
    return tl.where(words >= threshold.to(tl.uint32), factor, 0.0)


@triton.jit
def edited(x, scale, bias, ids, edits, seed, threshold, factor, row, first,
           D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """``dropout(scale * x + bias)`` of a piece, in fp32 (RED eq. 1)."""
    h = x.to(tl.float32)
    if scale is not None:
        h = h * load_edit(scale, ids, edits, first, D, ROWS, CHUNK)
    if bias is not None:
        h = h + load_edit(bias, ids, edits, first, D, ROWS, CHUNK)
    if seed is not None:
        h = h * kept(seed, row, first, threshold, factor, ROWS, CHUNK)
    return h


@triton.jit
def edit_gradient(g, scale, ids, edits, seed, threshold, factor, row, first,
                  D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
                  NEED_X: tl.constexpr):  # fmt: skip
    """From the gradient of the sum with the residual: that of ``x`` (0 if not requested), and that of the edit."""
    if seed is not None:
        g = g * kept(seed, row, first, threshold, factor, ROWS, CHUNK)
    dx = g
    if NEED_X:
        if scale is not None:
            dx = g * load_edit(scale, ids, edits, first, D, ROWS, CHUNK)
    return dx, g


@triton.jit
def zero_row(ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Pieces of zeros to sum into."""
    found = ()
    for _ in tl.static_range(CHUNKS):
        found = found + (tl.zeros([ROWS, CHUNK], tl.float32),)
    return found


@triton.jit
def tiles(rows, length, ROWS: tl.constexpr, SORTED: tl.constexpr):
    """First, end and step of a program's loop: tiles with a stride, or with edit_ids all of its workers' ``length``."""
    if SORTED:
        return length * 0, length, length * 0 + 1
    else:
        return tl.program_id(0) + rows * 0, (rows + ROWS - 1) // ROWS, tl.num_programs(0) + rows * 0


@triton.jit
def places(tile, length, ROWS: tl.constexpr, SORTED: tl.constexpr):
    """The positions of a tile's rows: adjacent, or with edit_ids the ``tile``-th of each worker's stretch."""
    lane = tl.arange(0, ROWS).to(tl.int64)
    if SORTED:
        return (tl.program_id(0).to(tl.int64) * ROWS + lane) * length + tile
    else:
        return lane + tile * ROWS


@triton.jit
def flush(sums, total, line, done, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """Write the sums of workers ``done`` with an edit to its ``line``, if it has one; return the other sums."""
    store(sums, total, tl.where(line < 0, 0, line), done & (line >= 0), first, D, CHUNK)
    return tl.where(done[:, None], 0.0, total)


@triton.jit
def flush_row(sums, totals, line, done, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """:func:`flush` for all pieces."""
    left = ()
    for c in tl.static_range(CHUNKS):
        left = left + (flush(sums, totals[c], line, done, c * CHUNK, D, CHUNK),)
    return left


@triton.jit
def finish(sums, total, edits, first, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, SORTED: tl.constexpr):
    """Write a program's final sums: one line, or with edit_ids each worker's last."""
    cols = first + tl.arange(0, CHUNK)
    if SORTED:
        line = edits + 2 * (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)) + 1
        tl.store((sums + line * D)[:, None] + cols[None, :], total, mask=(cols < D)[None, :])
    else:
        tl.store(sums + tl.program_id(0).to(tl.int64) * D + cols, tl.sum(total, axis=0), mask=cols < D)


@triton.jit
def finish_row(sums, totals, edits, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
               SORTED: tl.constexpr):  # fmt: skip
    """:func:`finish` for all pieces."""
    for c in tl.static_range(CHUNKS):
        finish(sums, totals[c], edits, c * CHUNK, D, ROWS, CHUNK, SORTED)


@triton.jit
def first_edit(ids, rows, length, ROWS: tl.constexpr):
    """The first edit of each worker; -1 without a row."""
    place = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)) * length
    return tl.maximum(tl.load(ids + place, mask=place < rows, other=-1), -1)


@triton.jit
def line_of(edit, changes, edits, ROWS: tl.constexpr):
    """The line of a worker's sum for ``edit``: its first line before any ``changes`` of edit, then the edit's own.

    -1 if there is no such edit.
    """
    worker = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return tl.where(changes == 0, edits + 2 * worker, tl.where(edit < edits, edit, -1))


@triton.jit
def store_edits(owners, opening, closing, changes, ROWS: tl.constexpr):
    """Write the edits of each worker's two lines; -1 for the first line of a worker with only one edit."""
    worker = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(owners + 2 * worker, tl.where(changes == 0, -1, opening))
    tl.store(owners + 2 * worker + 1, closing)
