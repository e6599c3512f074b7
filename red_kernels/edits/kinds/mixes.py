"""Edits that mix the columns of a row, in their kernel's form: rotations of pairs, reflections of blocks."""

from __future__ import annotations

from functools import cache, partial

from torch import Tensor

from .kind import FORMULAS, Dropout, Edit, Kind, Part, Vectors

PAIR = 32  # distance between the columns of a rotated pair: pairs are in groups of twice this size
GROUP = 2 * PAIR


def partners(h: Tensor) -> Tensor:
    """The columns with each pair exchanged."""
    return h.unflatten(-1, (-1, 2, PAIR)).flip(-2).flatten(-3)


def along(u: Tensor, h: Tensor, blocks: int) -> Tensor:
    """`u * (u . h)`, separately for each block of columns."""
    width = h.shape[-1] // blocks
    both = (u * h).unflatten(-1, (blocks, width)).sum(-1, keepdim=True)
    return u * both.expand(*both.shape[:-1], width).flatten(-2)


def formula(h: Tensor, vectors: Vectors, blocks: int) -> Tensor:
    """`first * h + second * partners(h) + bias`, or `h - first (first . h) + second (second . h) + bias` by block."""
    first, second, bias = vectors.get("first"), vectors.get("second"), vectors.get("bias")
    assert first is not None
    if blocks:
        edited = h - along(first, h, blocks)
        edited = edited if second is None else edited + along(second, h, blocks)
    else:
        assert second is not None
        edited = first * h + second * partners(h)
    return edited if bias is None else edited + bias


@cache
def _kind(blocks: int) -> Kind:
    parts = (Part("first"), Part("second"), Part("bias"))
    return Kind("mix", parts, partial(formula, blocks=blocks), "", kernel="mix", blocks=blocks)


def mix_edit(
    first: Tensor,
    second: Tensor | None,
    bias: Tensor | None,
    blocks: int,
    ids: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Edit:
    """The edit of given operands, see :class:`red_kernels.backends.arguments.Mix`."""
    return Edit(_kind(blocks), {"first": first, "second": second, "bias": bias}, ids, dropout)


def after_another(h: Tensor, vectors: Vectors, blocks: int) -> Tensor:
    """Two reflections of each block: `b` after `a = h - inner (inner . h)` is `a - outer (outer . a) + bias`."""
    once = formula(h, {"first": vectors.get("inner")}, blocks)
    return formula(once, {"first": vectors.get("outer"), "bias": vectors.get("bias")}, blocks)


FORMULAS["mix_mix"] = lambda kind: partial(after_another, blocks=kind.blocks)
FORMULAS["mix"] = lambda kind: partial(formula, blocks=kind.blocks)
