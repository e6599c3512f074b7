"""A linear layer with its edit, in one matrix product: for inference, which keeps only the result.

``z = residual + scale * (x @ weight.T + linear_bias) + bias`` (RED eq. 1 behind a linear layer). The product is summed
in fp32 and stays in fp32: only ``z`` is rounded, not the linear layer's own output. Absent arguments are None, and are
compiled away.
"""

import triton
import triton.language as tl

from .device import RUNTIME, load, store

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def place_of(tile, tiles_m, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile. ``GROUP`` rows of tiles are taken together, column by column: concurrent programs read
    nearly a square, so that most of it comes from the L2 cache."""
    first = tile // (GROUP * TILES_N) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * TILES_N)
    return first + within % height, within // height


@triton.jit
def operand(p, row, first, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of the rows of ``x`` or ``weight``; 0 behind the last column."""
    cols = first + tl.arange(0, BLOCK_K)
    p = (p + row * K)[:, None] + cols[None, :]
    if K % BLOCK_K == 0:
        return tl.load(p)
    else:
        return tl.load(p, mask=(cols < K)[None, :], other=0.0)


@triton.jit
def product(x, weight, row, col, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """``x @ weight.T`` of a tile, in fp32."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        a = operand(x, row, first, K, BLOCK_K)
        b = operand(weight, col, first, K, BLOCK_K)
        if INTERPRETED:  # it would multiply the bits of bfloat16 numbers as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def edit_vector(p, ids, live, edits, first, D: tl.constexpr, CHUNK: tl.constexpr):
    """A piece of a vector in fp32 for all rows; with ``ids`` that of each row's own edit, NaN if there is none."""
    if ids is None:
        cols = first + tl.arange(0, CHUNK)
        return tl.load(p + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    else:
        known = (ids >= 0) & (ids < edits)
        value = load(p, ids, live & known, first, D, CHUNK)
        return tl.where(known[:, None], value.to(tl.float32), float("nan"))


@triton.jit
def halved(h, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a piece."""
    return tl.split(tl.permute(tl.reshape(h, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def pieces_of(h, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    """A tile halved this many times, in order."""
    found = (h,)
    for n in tl.static_range(SPLITS):
        smaller = ()
        for i in tl.static_range(2**n):
            smaller = smaller + halved(found[i], ROWS, COLUMNS // 2**n)
        found = smaller
    return found


@triton.jit
def finish(h, linear_bias, residual, scale, bias, ids, z, row, rows, edits, first,
           D: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """All operations behind the product of a piece of a tile, which is rounded once."""
    live = row < tl.where(first < D, rows, 0)  # the last tile may have whole pieces beyond the last column
    if linear_bias is not None:
        h = h + edit_vector(linear_bias, None, live, edits, first, D, CHUNK)
    id = tl.load(ids + row, mask=live, other=0) if ids is not None else None
    if scale is not None:
        h = h * edit_vector(scale, id, live, edits, first, D, CHUNK)
    if bias is not None:
        h = h + edit_vector(bias, id, live, edits, first, D, CHUNK)
    if residual is not None:
        h = load(residual, row, live, first, D, CHUNK).to(tl.float32) + h
    store(z, h, row, live, first, D, CHUNK)


@triton.jit(do_not_specialize=RUNTIME)
def linear_edit(
    x, weight, linear_bias, residual, scale, bias, ids, z,
    rows: tl.int64, edits: tl.int64,
    D: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A persistent grid of any size: each program takes tiles with a stride."""
    TILES_N: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(rows, BLOCK_M).to(tl.int32)
    for tile in range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0)):
        tile_m, tile_n = place_of(tile, tiles_m, TILES_N, GROUP)
        row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        # missing rows and columns repeat the first, which needs no mask in the loop; they are not stored
        h = product(x, weight, tl.where(row < rows, row, 0), tl.where(col < D, col, 0), K, BLOCK_M, BLOCK_N, BLOCK_K,
                    PRECISION)  # fmt: skip
        pieces = pieces_of(h, BLOCK_M, BLOCK_N, SPLITS)
        for i in tl.static_range(2**SPLITS):
            finish(pieces[i], linear_bias, residual, scale, bias, ids, z, row, rows, edits,
                   tile_n * BLOCK_N + i * (BLOCK_N // 2**SPLITS), D, BLOCK_N // 2**SPLITS)  # fmt: skip
