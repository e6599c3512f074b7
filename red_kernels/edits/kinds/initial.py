"""SIBO: a bottleneck that reads the stack's first input in addition to the site's output (arXiv 2402.11896).

It reads a fixed mix of both, so each layer sees a token's own embedding.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kind import Family, Kind, Part, Vectors
from .lowrank import own_columns

WIDTH = 256  # as in the authors' adapter, whose nonlinearity is tanh
SHARE = 0.1  # of the first input


def formula(h: Tensor, vectors: Vectors) -> Tensor:
    """`h + U tanh(D (0.9 h + 0.1 h0))`, with U as its transpose."""
    down, up, mixed = _of(h, vectors)
    if up.dim() > 2:  # each row of h has its own tensors
        inner = torch.tanh((down @ mixed.unsqueeze(-1)).squeeze(-1))
        return h + (inner.unsqueeze(-2) @ up).squeeze(-2)
    return h + torch.tanh(F.linear(mixed, down)) @ up


def by_row(h: Tensor, vectors: Vectors, ids: Tensor) -> Tensor:
    """For several edits: the thin products of all at once; each row keeps its own."""
    down, up, mixed = _of(h, vectors)
    inner = torch.tanh(F.linear(mixed, down.flatten(0, 1)))
    return h + (inner * own_columns(ids, up, h.dtype)) @ up.flatten(0, 1)


def _of(h: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
    down, up, first = vectors.get("down"), vectors.get("up"), vectors.get("initial")
    assert down is not None
    assert up is not None
    assert first is not None
    return down, up, torch.lerp(h, first, SHARE)


def _draw(down: Tensor) -> None:
    bound = 1 / math.sqrt(down.shape[-1])
    nn.init.uniform_(down, -bound, bound)


def kind(width: int) -> Kind:
    """The kind with a bottleneck of this width."""
    shape = partial(_rows, width)
    return Kind(
        "initial" if width == WIDTH else f"initial:{width}",
        (Part("down", shape=shape, draw=_draw), Part("up", shape=shape)),
        partial(formula),
        "h + U tanh(D (0.9 h + 0.1 h0)), h0 the input of the stack's first layer (SIBO)",
        identity=True,
        combines=False,
        context=("initial",),
        requires=("initial",),
        by_row=by_row,
        family="initial",
    )


def _rows(count: int, width: int) -> tuple[int, int]:
    return count, width


INITIAL = Family(kind, WIDTH, "the width of the bottleneck")
