"""ETHER and ETHER+: blocks of columns are reflected at a hyperplane, or along two of them (arXiv 2405.20271).

A pair of reflections rotates each block in the plane of its two vectors. It starts with equal vectors, the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from . import mixes
from .kind import Family, Folded, Formula, Kind, Part, Vectors, kind_named

BLOCKS = 4  # the authors' choice in most of their runs


def units(u: Tensor, blocks: int, length: float = 1.0) -> Tensor:
    """`u` with this length in each block; zeros stay zeros, which is no reflection."""
    parts = u.unflatten(-1, (blocks, -1))
    squares = parts.square().sum(-1, keepdim=True)
    there = squares > 0
    # It never divides by zero, in the derivative neither: a length has no derivative at zero.
    inverse = torch.where(there, length * torch.where(there, squares, 1.0).rsqrt(), 0.0)
    return (parts * inverse).flatten(-2)


def once(vectors: Vectors, blocks: int) -> Vectors:
    """`h - 2 n (n . h)` with the unit vector `n` of `normal`, for the linear layer's output without its bias."""
    normal = vectors.get("normal")
    assert normal is not None
    return _behind({"first": units(normal, blocks, math.sqrt(2.0))}, vectors.get("linear_bias"), mixes.formula, blocks)


def twice(vectors: Vectors, blocks: int) -> Vectors:
    """`h - u (u . h) + v (v . h)` with the unit vectors of `away` and `toward`, without the linear layer's bias."""
    away, toward = vectors.get("away"), vectors.get("toward")
    assert away is not None
    assert toward is not None
    made = {"first": units(away, blocks), "second": units(toward, blocks)}
    return _behind(made, vectors.get("linear_bias"), mixes.formula, blocks)


def paired(vectors: Vectors, blocks: int) -> Vectors:
    """Two reflections in sequence, with the unit vectors of `inner` and of `outer`."""
    inner, outer = vectors.get("inner"), vectors.get("outer")
    assert inner is not None
    assert outer is not None
    length = math.sqrt(2.0)
    made = {"inner": units(inner, blocks, length), "outer": units(outer, blocks, length)}
    return _behind(made, vectors.get("linear_bias"), mixes.after_another, blocks)


def _behind(made: dict[str, Tensor], bias: Tensor | None, formula: Callable[..., Tensor], blocks: int) -> Vectors:
    """The operands for an output that includes the bias: `edit(h - b) + b = edit(h) + (b - edit(b))`."""
    if bias is None:
        return made
    bias = bias.to(next(iter(made.values())).dtype)
    return {**made, "bias": bias - formula(bias, made, blocks)}


def fold(weight: Tensor, bias: Tensor | None, vectors: Vectors, formula: Formula) -> Folded:
    """Each column of the weight reflected; the bias is added after the reflection and stays."""
    return formula(weight.t(), {**vectors, "linear_bias": None}).t(), bias


def _kind(
    name: str,
    parts: tuple[Part, ...],
    operands: partial[Vectors],
    blocks: int,
    help: str,
    identity: bool,
    kernel: str = "mix",
) -> Kind:
    of_operands = mixes.formula if kernel == "mix" else mixes.after_another

    def formula(h: Tensor, vectors: Vectors) -> Tensor:
        return of_operands(h, operands(vectors), blocks)

    def fits(width: int) -> str | None:
        return f"needs a multiple of {blocks}, its number of blocks" if width % blocks else None

    return Kind(
        name if blocks == BLOCKS else f"{name}:{blocks}",
        parts,
        formula,
        help,
        kernel=kernel,
        operands=operands,
        fold=partial(fold, formula=formula),
        identity=identity,
        combines=False,
        blocks=blocks,
        context=("linear_bias",),
        fits=fits,
        family=name,
        part_of=part_of,
    )


def part_of(kind: Kind, width: int, count: int) -> Kind:
    """The kind with the blocks of one of `count` processes. Raises ValueError if they are not whole."""
    if kind.blocks % count:
        number = f"{kind.blocks} block" + ("" if kind.blocks == 1 else "s")
        raise ValueError(f"reflects {number} of columns, which {count} processes cannot share evenly")
    return kind_named(f"{kind.family}:{kind.blocks // count}")


def reflection(blocks: int) -> Kind:
    """ETHER: one reflection of each block, initially random."""
    parts = (Part("normal", draw=nn.init.normal_),)
    what = "h - 2 n (n . h) in each block of columns, n a unit vector (ETHER)"
    return _kind("reflection", parts, partial(once, blocks=blocks), blocks, what, False)


def reflections(blocks: int) -> Kind:
    """ETHER+: away along one vector and toward another one, initially equal."""
    parts = (Part("away", draw=nn.init.normal_), Part("toward", like="away"))
    what = "h - u (u . h) + v (v . h) in each block of columns, u and v unit vectors (ETHER+)"
    return _kind("reflections", parts, partial(twice, blocks=blocks), blocks, what, True)


def pair(blocks: int) -> Kind:
    """Two reflections of each block; initially the second undoes the first."""
    parts = (Part("inner", draw=nn.init.normal_), Part("outer", like="inner"))
    what = "H_m H_n h with H_n h = h - 2 n (n . h) in each block of columns, m = n at the start (a pair of ETHER's)"
    return _kind("reflection_pair", parts, partial(paired, blocks=blocks), blocks, what, True, "mix_mix")


REFLECTION = Family(reflection, BLOCKS, "the number of blocks")
REFLECTIONS = Family(reflections, BLOCKS, "the number of blocks")
REFLECTION_PAIR = Family(pair, BLOCKS, "the number of blocks")
