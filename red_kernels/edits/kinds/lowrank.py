"""Edits in a subspace of low dimension: LoReFT and DiReFT (arXiv 2404.03592, eq. 2 and 3), on a site's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kind import Family, Folded, Formula, Kind, Part, Vectors

RANK = 4
Made = tuple[Tensor, Tensor, Tensor]
Maker = Callable[[Vectors], Made]


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the span of `rows`, `(..., r, d)`; a row of zeros stays zero.

    Orthonormal rows stay unchanged, so training starts at the drawn values. The result is `L^-1 A` with
    `L L^T = A A^T`: each row is computed from itself and the rows before it, as in Gram-Schmidt.
    """
    empty = (rows == 0).all(-1)
    gram = rows @ rows.mT + torch.diag_embed(empty.to(rows.dtype))
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), rows, upper=False)


def towards(vectors: Vectors) -> Made:
    """LoReFT as `(up, down, offset)`: `h + up^T (down h + offset)` with `up = R` and `down = W - R`."""
    basis, target, shift = vectors.get("basis"), vectors.get("target"), vectors.get("shift")
    assert basis is not None
    assert target is not None
    assert shift is not None
    up = orthonormal(basis)
    return up, target - up, shift


def direct(vectors: Vectors) -> Made:
    """DiReFT, whose parts are these three."""
    up, down, offset = vectors.get("up"), vectors.get("down"), vectors.get("offset")
    assert up is not None
    assert down is not None
    assert offset is not None
    return up, down, offset


def loreft(h: Tensor, vectors: Vectors) -> Tensor:
    """`h + R^T (W h + b - R h)`, R with orthonormal rows."""
    return _moved(h, towards(vectors))


def direft(h: Tensor, vectors: Vectors) -> Tensor:
    """`h + U^T (W h + b)`."""
    return _moved(h, direct(vectors))


def _moved(h: Tensor, made: Made) -> Tensor:
    up, down, offset = made
    if up.dim() > 2:  # each row of h has its own tensors
        return h + ((down @ h.unsqueeze(-1)).squeeze(-1) + offset).unsqueeze(-2).matmul(up).squeeze(-2)
    inner = F.linear(h, down, offset)
    return torch.addmm(h.flatten(0, -2), inner.flatten(0, -2), up).view_as(h)


def by_row(h: Tensor, vectors: Vectors, ids: Tensor, make: Maker) -> Tensor:
    """For several edits: the thin products of all at once; each row keeps its own."""
    up, down, offset = make(vectors)
    inner = F.linear(h, down.flatten(0, 1), offset.flatten())
    return h + (inner * own_columns(ids, up, h.dtype)) @ up.flatten(0, 1)


def own_columns(ids: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask over the inner columns of several edits, `up` being `(n, r, d)`: 1 for those of a row's own edit."""
    return F.one_hot(ids, up.shape[0]).to(dtype).repeat_interleave(up.shape[1], -1)


def fold(weight: Tensor, bias: Tensor | None, vectors: Vectors, make: Maker) -> Folded:
    """`W + up^T (down W)`, and the same for the bias, with the offset."""
    up, down, offset = make(vectors)
    shift = offset if bias is None else down @ bias + offset
    moved = up.t() @ shift
    return weight + up.t() @ (down @ weight), moved if bias is None else bias + moved


def _uniform(tensor: Tensor, width: int) -> None:
    """torch's initialisation of the weight and the bias of a linear layer with this number of inputs."""
    nn.init.uniform_(tensor, -1 / math.sqrt(width), 1 / math.sqrt(width))


def _as_linear(tensor: Tensor) -> None:
    _uniform(tensor, tensor.shape[-1])


def _kind(name: str, rank: int, parts: tuple[str, str, str], formula: Formula, make: Maker, help: str) -> Kind:
    def matrix(width: int) -> tuple[int, ...]:
        return (rank, width)

    def fits(width: int) -> str | None:
        return f"needs at least {rank}, its rank" if width < rank else None

    first = nn.init.orthogonal_ if name == "lowrank" else _as_linear
    return Kind(
        name if rank == RANK else f"{name}:{rank}",
        (
            Part(parts[0], shape=matrix, draw=first),
            Part(parts[1], shape=matrix, draw=_as_linear),
            # PyTorch draws it by the layer's number of inputs, which a bias does not show; zeros serve as well.
            Part(parts[2], shape=lambda width: (rank,)),
        ),
        partial(formula),
        help,
        fold=partial(fold, make=make),
        identity=False,
        combines=False,
        by_row=partial(by_row, make=make),
        fits=fits,
        family=name,
    )


def _loreft(rank: int) -> Kind:
    return _kind(
        "lowrank",
        rank,
        ("basis", "target", "shift"),
        loreft,
        towards,
        "h + R^T (W h + b - R h), R orthonormal (LoReFT)",
    )


def _direft(rank: int) -> Kind:
    return _kind("direct", rank, ("up", "down", "offset"), direft, direct, "h + U^T (W h + b) (DiReFT)")


LOWRANK = Family(_loreft, RANK, "the rank")
DIRECT = Family(_direft, RANK, "the rank")
