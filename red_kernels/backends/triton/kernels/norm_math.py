"""The arithmetic of a norm and of its backward for one piece of rows, shared by the kernels for all widths."""

import triton
import triton.language as tl

from .device import edited, load_edit, load_vector, over_width


@triton.jit
def moments(zs, first, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and variance of rows about their ``first`` mean, which is corrected by its rounding error; and whether they
    are accurate: not if that sum overflowed, or its error exceeds the row's variation, as it may for equal values.
    """
    shift = tl.zeros([ROWS, CHUNK], tl.float32)
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for c in tl.static_range(CHUNKS):
        v = zs[c] - first[:, None]
        if (c + 1) * CHUNK > D:
            v = tl.where((c * CHUNK + tl.arange(0, CHUNK) < D)[None, :], v, 0.0)
        shift += v
        total += v * v
    lost = over_width(tl.sum(shift, axis=1), D)
    spread = over_width(tl.sum(total, axis=1), D)
    square = lost * lost
    finite = square <= 3.4028234663852886e38
    mean = tl.where(finite, first + lost, first)
    variance = tl.where(finite, spread - square, spread)
    return mean, tl.where(variance < 0.0, 0.0, variance), finite & (square <= 0.5 * spread)


@triton.jit
def mean_from_value(zs, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The mean of rows relative to their first value, to which equal values have no distance.

    Halves of the distances are divided before they are summed, so that they do not overflow.
    """
    origin = tl.sum(tl.where((tl.arange(0, CHUNK) == 0)[None, :], zs[0], 0.0), axis=1)
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for c in tl.static_range(CHUNKS):
        v = (0.5 * zs[c] - 0.5 * origin[:, None]) * (1.0 / D)
        if (c + 1) * CHUNK > D:
            v = tl.where((c * CHUNK + tl.arange(0, CHUNK) < D)[None, :], v, 0.0)
        total += v
    half = tl.sum(total, axis=1)
    return origin + half + half


@triton.jit
def affine(normed, weight, norm_bias, weight_offset, first,
           D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """``normed * (weight_offset + weight) + norm_bias``."""
    if weight is not None:
        normed = normed * (load_vector(weight, first, D, ROWS, CHUNK) + weight_offset)
    if norm_bias is not None:
        normed = normed + load_vector(norm_bias, first, D, ROWS, CHUNK)
    return normed


@triton.jit
def stream(z, x, residual, scale, bias, ids, edits, seed, threshold, factor, row, first,
           D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
           KEPT: tl.constexpr, ADDED: tl.constexpr):  # fmt: skip
    """The norm's input in fp32: ``z`` if it was kept, else recomputed from ``x`` and the residual, if there is one.

    It is always rounded to the dtype of ``x``, which is that of ``z``.
    """
    if KEPT:
        return z.to(tl.float32)
    else:
        h = edited(x, scale, bias, ids, edits, seed, threshold, factor, row, first, D, ROWS, CHUNK)
        if ADDED:
            h = residual.to(tl.float32) + h
        return h.to(x.dtype).to(tl.float32)


@triton.jit
def norm_terms(dy, z, scale, weight, ids, edits, weight_offset, mean, rstd, first,
               D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
               EDIT_LAST: tl.constexpr):  # fmt: skip
    """``normed``, the gradient of the norm's result, and that times the weight; 0 in columns that do not exist."""
    g = dy.to(tl.float32)
    if EDIT_LAST:
        if scale is not None:
            g = g * load_edit(scale, ids, edits, first, D, ROWS, CHUNK)
    if mean is not None:
        z = z - mean[:, None]
        if D % CHUNK != 0:  # a zero's distance from a large mean, times rstd, may be infinite
            z = tl.where((first + tl.arange(0, CHUNK) < D)[None, :], z, 0.0)
    weighted = g
    if weight is not None:
        weighted = g * (load_vector(weight, first, D, ROWS, CHUNK) + weight_offset)
    return z * rstd[:, None], g, weighted


@triton.jit
def norm_gradient(normed, weighted, rstd, c1, c2, CENTERED: tl.constexpr):
    """``rstd * (g - normed * mean(g * normed) - mean(g))``, g the weighted gradient; RMSNorm lacks the last term."""
    g = weighted - normed * c1[:, None]
    if CENTERED:
        g = g - c2[:, None]
    return g * rstd[:, None]
