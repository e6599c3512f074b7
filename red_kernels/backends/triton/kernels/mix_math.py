"""Common code of the kernels of mixes: tiles of whole blocks or pairs, and the norm's statistics of these rows.

A tile is ``ROWS`` rows by ``TOGETHER`` blocks by ``CHUNK`` columns. A kernel has several, the pieces. Sums over a
block, and over a row, are then sums over axes, and no value changes threads. Piece ``c`` has the ``c``-th ``CHUNK``
columns of each block from ``offset`` on. In a rotation (``BLOCKS == 0``) two pieces have the same pairs, the second
(``c`` odd) their other columns: a value's partner is at the same place of piece ``c ^ 1``.
"""

import triton
import triton.language as tl

from .device import NO_ROW, over_width

PAIR = tl.constexpr(32)  # distance between the columns of a pair


@triton.jit
def slab(D: tl.constexpr, BLOCKS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The blocks of a program, and its start in them (or its pair)."""
    if BLOCKS == 0:
        return tl.arange(0, TOGETHER), tl.program_id(1) * (CHUNK * CHUNKS // 2)
    else:
        SLABS: tl.constexpr = (D // BLOCKS + CHUNK * CHUNKS - 1) // (CHUNK * CHUNKS)  # of a block
        block = tl.program_id(1) // SLABS * TOGETHER + tl.arange(0, TOGETHER)
        return block, tl.program_id(1) % SLABS * (CHUNK * CHUNKS)


@triton.jit
def some_columns(block, offset, c: tl.constexpr, D: tl.constexpr, BLOCKS: tl.constexpr, TOGETHER: tl.constexpr,
                 CHUNK: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """Every ``STEP``-th column of a piece, and a mask of existing ones: ``(1, TOGETHER, CHUNK // STEP)``."""
    if BLOCKS == 0:
        place = (offset + c // 2 * CHUNK + tl.arange(0, CHUNK // STEP) * STEP)[None, None, :]
        cols = place // PAIR * (2 * PAIR) + place % PAIR + c % 2 * PAIR
        WIDTH: tl.constexpr = D // 2
    else:
        WIDTH: tl.constexpr = D // BLOCKS
        place = (offset + c * CHUNK + tl.arange(0, CHUNK // STEP) * STEP)[None, None, :]
        cols = block[None, :, None] * WIDTH + place
    inside = tl.full([1, 1, 1], True, tl.int1)
    if WIDTH % CHUNK != 0:
        inside = inside & (place < WIDTH)
    if BLOCKS % TOGETHER != 0:
        inside = inside & (block < BLOCKS)[None, :, None]
    return cols, inside


@triton.jit
def columns(block, offset, D: tl.constexpr, BLOCKS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
            CHUNKS: tl.constexpr):  # fmt: skip
    """The columns of each piece, and masks of existing ones."""
    found = ()
    for c in tl.static_range(CHUNKS):
        found = found + (some_columns(block, offset, c, D, BLOCKS, TOGETHER, CHUNK, 1),)
    return found


@triton.jit
def load_piece(p, row, live, at, D: tl.constexpr):
    """The columns ``at`` of some rows as stored; 0 beyond them."""
    return tl.load((p + row * D)[:, None, None] + at[0], mask=live[:, None, None] & at[1], other=0.0)


@triton.jit
def load_pieces(p, row, live, at, D: tl.constexpr, CHUNKS: tl.constexpr):
    """:func:`load_piece` for all pieces."""
    found = ()
    for c in tl.static_range(CHUNKS):
        found = found + (load_piece(p, row, live, at[c], D),)
    return found


@triton.jit
def store_piece(p, value, row, live, at, D: tl.constexpr):
    """Write the part of a piece within the rows, rounded to the dtype of ``p``."""
    mask = live[:, None, None] & at[1]
    tl.store((p + row * D)[:, None, None] + at[0], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def store_pieces(p, values, row, live, at, D: tl.constexpr, CHUNKS: tl.constexpr):
    """:func:`store_piece` for all pieces."""
    for c in tl.static_range(CHUNKS):
        store_piece(p, values[c], row, live, at[c], D)


@triton.jit
def load_vector(p, ids, edits, at, D: tl.constexpr, ROWS: tl.constexpr):
    """A piece of a vector in fp32, repeated for each row; with ``ids`` of each row's own edit: NaN if there is none, 0
    for no row."""
    if ids is None:
        p = p + tl.zeros([ROWS, 1, 1], tl.int32) + at[0]
        return tl.load(p, mask=at[1], other=0.0, eviction_policy="evict_last").to(tl.float32)
    else:
        known = (ids >= 0) & (ids < edits)
        value = load_piece(p, tl.where(known, ids, 0), known, at, D)
        return tl.where((known | (ids == NO_ROW))[:, None, None], value.to(tl.float32), float("nan"))


@triton.jit
def kept_piece(seed, row, block, offset, c: tl.constexpr, threshold, factor, D: tl.constexpr, BLOCKS: tl.constexpr,
               ROWS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The dropout factors of a piece; see :func:`.device.kept`. Blocks that do not start at a multiple of four columns
    draw four words for each column, and take one."""
    WIDTH: tl.constexpr = PAIR if BLOCKS == 0 else D // BLOCKS
    FOURS: tl.constexpr = WIDTH % 4 == 0 and CHUNK % 4 == 0
    STEP: tl.constexpr = 4 if FOURS else 1
    cols, _ = some_columns(block, offset, c, D, BLOCKS, TOGETHER, CHUNK, STEP)
    zeros = tl.zeros([ROWS, TOGETHER, CHUNK // STEP], tl.uint32)
    quad = (cols // 4).to(tl.uint32) + zeros
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None, None] + zeros
    high = (row >> 32).to(tl.uint32)[:, None, None] + zeros
    w0, w1, w2, w3 = tl.philox(tl.load(seed), quad, low, high, zeros)
    if FOURS:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, TOGETHER, CHUNK])
    else:
        place = cols % 4
        words = tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))
    return tl.where(words >= threshold.to(tl.uint32), factor, 0.0)


@triton.jit
def dots(u, ids, edits, values, at, D: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr,
         CHUNK: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """``u . values`` of each block: ``(ROWS, TOGETHER)``."""
    total = tl.zeros([ROWS, TOGETHER, CHUNK], tl.float32)
    for c in tl.static_range(CHUNKS):
        total += load_vector(u, ids, edits, at[c], D, ROWS) * values[c].to(tl.float32)
    return tl.sum(total, axis=2)


@triton.jit
def load_dots(p, plane: tl.constexpr, rows, row, live, block, BLOCKS: tl.constexpr):
    """A plane of ``(4, rows, BLOCKS)`` numbers from another kernel, in the form of :func:`dots`."""
    place = (plane * rows + row)[:, None] * BLOCKS + block[None, :]
    return tl.load(p + place, mask=live[:, None] & (block < BLOCKS)[None, :], other=0.0)


@triton.jit
def average(value, D: tl.constexpr):
    """Averages of whole rows: ``(ROWS,)``."""
    total = tl.sum(tl.sum(value, axis=2), axis=1)
    if D & (D - 1) == 0:
        return over_width(total, D)
    else:  # the same with a division, without which the assembler spills 8 bytes for sm_80 (d = 768)
        return tl.div_rn(total, D * 1.0)


@triton.jit
def moments(zs, first, at, D: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
            CHUNKS: tl.constexpr):  # fmt: skip
    """As :func:`.norm_math.moments`: mean and variance of rows about a ``first`` mean, and their accuracy."""
    shift = tl.zeros([ROWS, TOGETHER, CHUNK], tl.float32)
    total = tl.zeros([ROWS, TOGETHER, CHUNK], tl.float32)
    for c in tl.static_range(CHUNKS):
        v = tl.where(at[c][1], zs[c] - first[:, None, None], 0.0)
        shift += v
        total += v * v
    lost = average(shift, D)
    spread = average(total, D)
    square = lost * lost
    finite = square <= 3.4028234663852886e38
    variance = tl.where(finite, spread - square, spread)
    mean = tl.where(finite, first + lost, first)
    return mean, tl.where(variance < 0.0, 0.0, variance), finite & (square <= 0.5 * spread)


@triton.jit
def mean_from_value(zs, at, D: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr,
                    CHUNKS: tl.constexpr):  # fmt: skip
    """As :func:`.norm_math.mean_from_value`: the mean of rows relative to their first value."""
    origin = tl.sum(tl.sum(tl.where(at[0][0] == 0, zs[0], 0.0), axis=2), axis=1)
    total = tl.zeros([ROWS, TOGETHER, CHUNK], tl.float32)
    for c in tl.static_range(CHUNKS):
        v = (0.5 * zs[c] - 0.5 * origin[:, None, None]) * (1.0 / D)
        total += tl.where(at[c][1], v, 0.0)
    half = tl.sum(tl.sum(total, axis=2), axis=1)
    return origin + half + half


@triton.jit
def normed_terms(dy, z, weight, weight_offset, mean, rstd, at, D: tl.constexpr, ROWS: tl.constexpr):
    """``normed``, the gradient of the norm's result, and that times the weight; 0 in columns that do not exist."""
    g = dy.to(tl.float32)
    v = z.to(tl.float32)
    if mean is not None:  # a zero's distance from a large mean, times rstd, may be infinite
        v = tl.where(at[1], v - mean[:, None, None], 0.0)
    weighted = g
    if weight is not None:
        weighted = g * (load_vector(weight, None, 0, at, D, ROWS) + weight_offset)
    return v * rstd[:, None, None], g, weighted


@triton.jit
def zero_pieces(ROWS: tl.constexpr, TOGETHER: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Pieces of zeros to sum into."""
    found = ()
    for _ in tl.static_range(CHUNKS):
        found = found + (tl.zeros([ROWS, TOGETHER, CHUNK], tl.float32),)
    return found


@triton.jit
def flush_pieces(sums, totals, line, done, at, D: tl.constexpr, CHUNKS: tl.constexpr):
    """As :func:`.device.flush_row`."""
    left = ()
    for c in tl.static_range(CHUNKS):
        store_piece(sums, totals[c], tl.where(line < 0, 0, line), done & (line >= 0), at[c], D)
        left = left + (tl.where(done[:, None, None], 0.0, totals[c]),)
    return left


@triton.jit
def finish_pieces(sums, totals, edits, at, D: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
                  SORTED: tl.constexpr):  # fmt: skip
    """As :func:`.device.finish_row`."""
    for c in tl.static_range(CHUNKS):
        if SORTED:
            line = edits + 2 * (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)) + 1
            store_piece(sums, totals[c], line, line >= 0, at[c], D)
        else:
            line = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
            store_piece(sums, tl.sum(totals[c], axis=0, keep_dims=True), line, line >= 0, at[c], D)
