"""The arithmetic of a norm and of its backward for one piece of rows, shared by the kernels for all widths."""

import triton
import triton.language as tl

from .device import edited, load_edit, load_vector


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
    """What the norm saw, in fp32: ``z`` if it was kept, or else made again from ``x`` and the residual, if added."""
    if KEPT:
        return z.to(tl.float32)
    else:
        h = edited(x, scale, bias, ids, edits, seed, threshold, factor, row, first, D, ROWS, CHUNK)
        if ADDED:
            h = residual.to(tl.float32) + h
        return h


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
